"""Supervised fine-tuning on answers: prompt and completion, or conversations.

loss = mean nll of the answer's tokens (for conversations: the assistant's turns); an example's
weight is their number.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from torch import Tensor, nn

from zotune.errors import BadInput, DataError
from zotune.tasks.batch import Batch
from zotune.tasks.chat import chat_tokens, check_messages, renderer
from zotune.tasks.data import Row
from zotune.tasks.encoding import Bos, TextEncoder, length_limit
from zotune.tasks.labels import pick_split
from zotune.tasks.scoring import CausalScorer, Target
from zotune.tasks.sources import Data, Sizes, load
from zotune.tasks.spans import collate_targets, evaluate_spans, span_losses
from zotune.tasks.task import Example, Task

if TYPE_CHECKING:
    from zotune.models import Loaded

log = logging.getLogger("zotune")


class SFT(Task):
    """Learn to give the answers of the data.

    A prompt and its completion are joined by `separator` and tokenized as one text; EOS is
    appended. Conversations are rendered by the tokenizer's own chat template. Sequences longer
    than `max_length` lose the left of the prompt; an answer that alone is too long loses its end.

    Args:
        tables: split name to rows {"prompt", "completion"} or {"messages"}.
        separator: text between prompt and completion; part of the answer.
        append_eos: train EOS behind completions, so that the model learns to stop.
        bos: put the BOS token before prompts (see TextEncoder); conversations have the template's.
    """

    kinds = ("causal",)
    metric = "loss"
    higher_is_better = False

    def __init__(
        self,
        tables: Mapping[str, Sequence[Example]],
        *,
        name: str = "sft",
        max_length: int | None = None,
        separator: str = "",
        append_eos: bool = True,
        bos: Bos = "auto",
    ) -> None:
        self.name = name
        self._tables = dict(tables)
        self._max_length, self._bos = max_length, bos
        self._separator, self._append_eos = separator, append_eos
        self._encoder: TextEncoder | None = None
        self._scorer = CausalScorer(split=False)
        self._stops: set[int] = set()
        self._checked = False

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._tables)

    @property
    def truncated(self) -> int:
        return self._bound().truncated

    def split(self, name: str) -> Sequence[Example]:
        return pick_split(self._tables, name)

    def prepare(self, loaded: Loaded) -> nn.Module:
        if loaded.kind != "causal":
            raise BadInput(f"task {self.name!r} needs a causal model, got kind {loaded.kind!r}")
        encoder = TextEncoder(loaded.tokenizer, length_limit(loaded, self._max_length), self._bos)
        if any("messages" in row for rows in self._tables.values() for row in rows):
            renderer(loaded.tokenizer)  # a missing template is said now, not in the first step
        self._encoder, self._scorer = encoder, CausalScorer.probe(loaded.model)
        ends = getattr(getattr(loaded.model, "generation_config", None), "eos_token_id", None)
        also = ends if isinstance(ends, list) else [ends]
        self._stops = {i for i in (encoder.eos, *also) if i is not None}
        self._checked = False
        return loaded.model

    def encode(self, example: Example) -> Target:
        ids, trained = self._tokens(example)
        if not self._checked:
            self._say_missing_eos(ids, trained)
            self._checked = True
        ids, trained = self._fit(ids, trained)
        scored = [i for i in range(1, len(ids)) if trained[i]]
        if not scored:
            raise DataError(
                f"no answer token is left within max_length={self._bound().limit}; raise it, or "
                "give the example an answer and a prompt"
            )
        return Target(ids, scored)

    def _tokens(self, example: Example) -> tuple[list[int], list[bool]]:
        """All token ids, and which are trained."""
        encoder = self._bound()
        row = check_row(example)
        if "messages" in row:
            return chat_tokens(encoder.tokenizer, row["messages"])
        prompt, answer = encoder.pair(row["prompt"], self._separator + row["completion"])
        if self._append_eos and encoder.eos is not None and answer[-1] != encoder.eos:
            answer = [*answer, encoder.eos]
        return prompt + answer, [False] * len(prompt) + [True] * len(answer)

    def _fit(self, ids: list[int], trained: list[bool]) -> tuple[list[int], list[bool]]:
        """Within the limit; tokens behind the last trained one cost time and change nothing."""
        encoder = self._bound()
        end = max((i + 1 for i, flag in enumerate(trained) if flag), default=len(ids))
        ids, trained = ids[:end], trained[:end]
        if end <= encoder.limit:
            return ids, trained
        encoder.count_truncated(end, "on the left of the prompt")
        head = len(encoder.head) if ids[: len(encoder.head)] == encoder.head else 0
        last = end - 1
        while last > 0 and trained[last - 1]:
            last -= 1
        # one untrained token before the last answer must stay, else its end is cut instead
        start = min(end - (encoder.limit - head), max(last - 1, head))
        keep = slice(start, start + encoder.limit - head)
        return ids[:head] + ids[keep], trained[:head] + trained[keep]

    def _say_missing_eos(self, ids: Sequence[int], trained: Sequence[bool]) -> None:
        answer = [i for i, flag in zip(ids, trained, strict=True) if flag]
        if answer and answer[-1] in self._stops:
            return
        log.warning(
            "the end of an answer is never trained, so the model will not learn to stop: %s",
            "the tokenizer has no EOS token; set tokenizer.eos_token"
            if not self._stops
            else "set append_eos=true, or for conversations use a chat template that ends the "
            "assistant's turn with the EOS token",
        )

    def extent(self, features: Target) -> tuple[int, int]:
        return features.extent

    def collate(self, features: Sequence[Target]) -> Batch:
        return collate_targets(features, self._bound().pad)

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return span_losses(self._scorer, model, batch)

    def evaluate(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int
    ) -> dict[str, float]:
        """loss (nll per answer token), perplexity = exp(loss), tokens."""
        targets = [self.encode(example) for example in examples]
        return evaluate_spans(self._scorer, model, targets, batch_size, self._bound().pad)

    def mask_spans(self, example: Example) -> list[tuple[str, bool]]:
        """The encoded example as text stretches, each with whether it is trained."""
        target, tokenizer = self.encode(example), self._bound().tokenizer
        scored = set(target.scored)
        runs = groupby(range(len(target.ids)), key=lambda i: i in scored)
        return [(tokenizer.decode([target.ids[i] for i in run]), flag) for flag, run in runs]

    def show_mask(self, example: Example) -> str:
        """The encoded example with the trained stretches between ⟦ and ⟧."""
        return "".join(f"⟦{t}⟧" if flag else t for t, flag in self.mask_spans(example))

    def _bound(self) -> TextEncoder:
        if self._encoder is None:
            raise BadInput(f"task {self.name!r} has no tokenizer yet; call prepare(loaded) first")
        return self._encoder


def check_row(row: Row) -> Example:
    """A row with "messages", or with "prompt" and "completion" as non-empty texts.

    Raises:
        DataError: naming the fields found and wanted.
    """
    if row.get("messages") is not None:
        return {**row, "messages": check_messages(row["messages"])}
    if row.get("prompt") is None or row.get("completion") is None:
        found = ", ".join(map(str, row)) or "none"
        raise DataError(f"wanted the fields prompt and completion, or messages; found {found}")
    for name in ("prompt", "completion"):
        if not isinstance(row[name], str):
            raise DataError(f"{name} must be text, got {type(row[name]).__name__}")
    if not row["completion"].strip():
        raise DataError("an empty completion has nothing to train on")
    return row


def sft(
    data: Data,
    max_length: int | None = None,
    separator: str = "",
    append_eos: bool = True,
    prompt_field: str = "prompt",
    completion_field: str = "completion",
    messages_field: str = "messages",
    bos: Bos = "auto",
    encoding: str = "utf-8",
    train_size: int | None = None,
    dev_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    name: str = "sft",
) -> SFT:
    """Fine-tune on rows {"prompt", "completion"} or {"messages": [{"role", "content"}, ...]}.

    Raises:
        DataError: naming the row, for missing fields and empty answers.
    """
    names = {prompt_field: "prompt", completion_field: "completion", messages_field: "messages"}

    def check(row: Row) -> Example:
        return check_row({names.get(key, key): value for key, value in row.items()})

    tables = Sizes(train_size, dev_size, test_size, seed).apply(load(data, encoding))
    checked = {split: rows.map(check) for split, rows in tables.items()}
    _say_touching(checked, separator)
    return SFT(
        checked,
        name=name,
        max_length=max_length,
        separator=separator,
        append_eos=append_eos,
        bos=bos,
    )


def _say_touching(tables: Mapping[str, Sequence[Example]], separator: str) -> None:
    """Prompts and completions without a space between them are most often a mistake: say so."""
    rows = [row for rows in tables.values() for row in rows if "messages" not in row]
    glued = sum(
        r["prompt"][-1:].isalnum() and r["completion"][0].isalnum() and not separator for r in rows
    )
    if glued:
        log.warning(
            "%d of %d completions follow their prompt without a space; separator=' ' adds one",
            glued,
            len(rows),
        )
