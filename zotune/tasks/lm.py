"""Plain-text language modelling: documents, windows, token-weighted loss, perplexity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from zotune.errors import BadInput, DataError
from zotune.tasks.batch import Batch
from zotune.tasks.data import Row, Table, read_text
from zotune.tasks.encoding import Bos, TextEncoder, length_limit, require
from zotune.tasks.labels import pick_split
from zotune.tasks.scoring import CausalScorer, Target
from zotune.tasks.sources import Data, Sizes, load
from zotune.tasks.spans import collate_targets, evaluate_spans, span_losses
from zotune.tasks.task import Example, Task

if TYPE_CHECKING:
    from zotune.models import Loaded

WINDOW = 512
"""Longest window when neither the user nor the model asks for less."""


class LanguageModel(Task):
    """Predict every next token of a text.

    Documents are cut into windows of at most `max_length` tokens (BOS included) that do not
    overlap; each window is one example. The loss of an example is its mean token nll and its
    weight the number of predicted tokens. `prepare` tokenizes and cuts; before it, `split` gives
    the documents.

    Args:
        tables: split name to rows {"text": document}.
        max_length: window length in tokens; the model's own limit, at most 512, when None.
        bos: put the BOS token before each window: True, False or "auto" (see TextEncoder).
        pack: join all documents of a split (EOS between) before cutting, so windows are full.
        overflow: what becomes of a document's tokens behind its first window: "window" (more
            windows, each without memory of the one before) or "drop" (counted, said once).
    """

    kinds = ("causal",)
    metric = "perplexity"
    higher_is_better = False

    def __init__(
        self,
        tables: Mapping[str, Sequence[Example]],
        *,
        name: str = "lm",
        max_length: int | None = None,
        bos: Bos = "auto",
        pack: bool = False,
        overflow: str = "window",
    ) -> None:
        if overflow not in ("window", "drop"):
            raise BadInput(f"overflow={overflow!r} is not known; use 'window' or 'drop'")
        if pack and overflow == "drop":
            raise BadInput("pack=true with overflow='drop' would keep one window; use 'window'")
        self.name = name
        self._tables = dict(tables)
        self._max_length, self._bos = max_length, bos
        self._pack, self._overflow = pack, overflow
        self._encoder: TextEncoder | None = None
        self._scorer = CausalScorer(split=False)
        self._windows: dict[str, list[Example]] = {}

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._tables)

    def prepare(self, loaded: Loaded) -> nn.Module:
        if loaded.kind != "causal":
            raise BadInput(f"task {self.name!r} needs a causal model, got kind {loaded.kind!r}")
        limit = length_limit(loaded, self._max_length)
        limit = limit if self._max_length is not None else min(limit, WINDOW)
        self._encoder = TextEncoder(loaded.tokenizer, limit, self._bos)
        self._scorer = CausalScorer.probe(loaded.model)
        self._windows = {}
        return loaded.model

    def split(self, name: str) -> Sequence[Example]:
        """Windows {"ids", "document"} of one split; its documents before `prepare`."""
        documents = pick_split(self._tables, name)
        if self._encoder is None:
            return documents
        if name not in self._windows:
            self._windows[name] = list(self._cut(documents))
            if not self._windows[name]:
                raise DataError(f"the {name} documents have no token to predict")
        return self._windows[name]

    def _cut(self, documents: Sequence[Example]) -> Iterator[Example]:
        encoder = self._bound()
        streams = [encoder.raw(str(d["text"])) for d in documents]
        if self._pack:
            between = [] if encoder.eos is None else [encoder.eos]
            streams = [[i for stream in streams for i in (*stream, *between)]]
        room = encoder.limit - len(encoder.head)
        for number, stream in enumerate(streams):
            if self._overflow == "drop" and len(stream) > room:
                encoder.count_truncated(len(stream) + len(encoder.head), "at its end")
                stream = stream[:room]
            for start in range(0, len(stream), room):
                ids = encoder.head + stream[start : start + room]
                if len(ids) > 1:  # a lone token has nothing before it to be predicted from
                    yield {"ids": ids, "document": number}

    def encode(self, example: Example) -> Target:
        """A window, or a text {"text"} cut on its right to one window."""
        if "ids" in example:
            ids = list(example["ids"])
        else:
            require(example, ("text",))
            encoder = self._bound()
            ids = encoder.head + encoder.raw(str(example["text"]))
            if len(ids) > encoder.limit:
                encoder.count_truncated(len(ids), "at its end")
                ids = ids[: encoder.limit]
        return Target(ids, list(range(1, len(ids))))

    def extent(self, features: Target) -> tuple[int, int]:
        return features.extent

    def collate(self, features: Sequence[Target]) -> Batch:
        return collate_targets(features, self._bound().pad)

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return span_losses(self._scorer, model, batch)

    def evaluate(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int
    ) -> dict[str, float]:
        """loss (nll per token), perplexity = exp(sum nll / sum tokens), tokens."""
        targets = [self.encode(example) for example in examples]
        return evaluate_spans(self._scorer, model, targets, batch_size, self._bound().pad)

    @property
    def truncated(self) -> int:
        return self._bound().truncated

    def _bound(self) -> TextEncoder:
        if self._encoder is None:
            raise BadInput(f"task {self.name!r} has no tokenizer yet; call prepare(loaded) first")
        return self._encoder


def read_documents(path: Path, unit: str, encoding: str) -> Table:
    """The documents of a .txt file: one a "line", one a "paragraph" (blank lines), or the "file".

    Raises:
        DataError: an unknown unit, or no text.
    """
    text = read_text(path, encoding)
    if unit == "file":
        parts = [(1, text)]
    elif unit == "line":
        parts = list(enumerate(text.split("\n"), start=1))
    elif unit == "paragraph":
        parts, line = [], 1
        for part in text.replace("\r\n", "\n").split("\n\n"):
            parts.append((line, part))
            line += part.count("\n") + 2
    else:
        raise DataError(f"document={unit!r} is not known; use 'line', 'paragraph' or 'file'")
    kept = [(line, part.strip()) for line, part in parts if part.strip()]
    if not kept:
        raise DataError(f"{path} holds no text")
    return Table([{"text": part} for _, part in kept], str(path), [line for line, _ in kept])


def _cut_off_dev(train: Table) -> dict[str, Table]:
    """The last tenth of a lone document as dev, cut at a space."""
    text = train[0]["text"]
    cut = text.rfind(" ", 0, len(text) * 9 // 10)
    if cut < 1:
        raise DataError(f"{train.source} is too short to hold out a dev part; give a dev file")
    parts = {"train": text[:cut], "dev": text[cut + 1 :]}
    return {k: Table([{"text": v}], train.source, train.lines) for k, v in parts.items()}


def check_text(row: Row, field: str = "text") -> Example:
    """A row with a non-empty text."""
    require(row, (field,))
    return {"text": str(row[field])}


def lm(
    data: Data,
    text_field: str = "text",
    document: str = "line",
    max_length: int | None = None,
    bos: Bos = "auto",
    pack: bool = False,
    overflow: str = "window",
    encoding: str = "utf-8",
    train_size: int | None = None,
    dev_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    name: str = "lm",
) -> LanguageModel:
    """Language modelling over a .txt file or rows with a text field.

    Args:
        document: how a single .txt file is cut into documents: "line", "paragraph" or "file".
        train_size: (and dev_size, test_size) in documents.
    """
    path = Path(data).expanduser() if isinstance(data, str | Path) else None
    if path is not None and path.suffix == ".txt" and path.is_file():
        tables = {"train": read_documents(path, document, encoding)}
    elif path is not None and path.is_dir() and document != "line":
        tables = {
            split: read_documents(Path(rows.source), document, encoding)
            if rows.source.endswith(".txt")
            else rows
            for split, rows in load(path, encoding).items()
        }
    else:
        tables = load(data, encoding)
    checked = {k: rows.map(lambda row: check_text(row, text_field)) for k, rows in tables.items()}
    if "dev" not in checked and len(checked.get("train", ())) == 1:
        checked |= _cut_off_dev(checked["train"])
    checked = Sizes(train_size, dev_size, test_size, seed).apply(checked)
    return LanguageModel(
        checked, name=name, max_length=max_length, bos=bos, pack=pack, overflow=overflow
    )
