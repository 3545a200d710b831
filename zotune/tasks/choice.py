"""Multiple choice: each example brings its own candidates (COPA and the like).

loss = cross-entropy over the candidates' log-probabilities behind the prompt; padding candidates
are masked out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from zotune.errors import BadInput, DataError
from zotune.tasks.batch import Batch
from zotune.tasks.candidates import Candidates, CandidateScorer
from zotune.tasks.classification import evaluate_scores
from zotune.tasks.data import Row
from zotune.tasks.encoding import Bos, TextEncoder, length_limit, require
from zotune.tasks.labels import pick_split
from zotune.tasks.objectives import check_objective, label_losses, label_metrics
from zotune.tasks.scoring import CausalScorer
from zotune.tasks.sources import Data, Sizes, load
from zotune.tasks.task import Example, Task

if TYPE_CHECKING:
    from zotune.models import Loaded


class Choice(Task):
    """Choose among an example's own `choices` as the continuation of its `prompt`.

    Args:
        tables: split name to rows {"prompt", "choices" (a list of texts), "label" (an index)}.
        reduce: "sum" or "mean" over a candidate's tokens ("mean" favours long answers less).
        objective: "loss", or the non-differentiable "accuracy".
    """

    kinds = ("causal",)
    metric = "accuracy"

    def __init__(
        self,
        tables: Mapping[str, Sequence[Example]],
        *,
        name: str = "choice",
        reduce: str = "sum",
        objective: str = "loss",
        max_length: int | None = None,
        bos: Bos = "auto",
    ) -> None:
        self.name = name
        self.objective = check_objective(objective, ("loss", "accuracy"))
        self._tables = dict(tables)
        self._reduce, self._max_length, self._bos = reduce, max_length, bos
        self._scorer: CandidateScorer | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._tables)

    @property
    def truncated(self) -> int:
        return self._bound().encoder.truncated

    def split(self, name: str) -> Sequence[Example]:
        return pick_split(self._tables, name)

    def prepare(self, loaded: Loaded) -> nn.Module:
        if loaded.kind != "causal":
            raise BadInput(f"task {self.name!r} needs a causal model, got kind {loaded.kind!r}")
        limit = length_limit(loaded, self._max_length)
        encoder = TextEncoder(loaded.tokenizer, limit, self._bos)
        self._scorer = CandidateScorer(encoder, CausalScorer.probe(loaded.model), self._reduce)
        return loaded.model

    def encode(self, example: Example) -> Candidates:
        require(example, ("prompt", "choices", "label"))
        prompt = str(example["prompt"]).rstrip(" ")
        join = "" if prompt.endswith("\n") else " "
        choices = [str(choice).strip() for choice in example["choices"]]
        return self._bound().encode(prompt, choices, join, int(example["label"]))

    def extent(self, features: Candidates) -> tuple[int, int]:
        return features.extent

    def collate(self, features: Sequence[Candidates]) -> Batch:
        return self._bound().collate(features)

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """(batch.size, most candidates) float32, -inf for candidates an example does not have."""
        return self._bound().scores(model, batch)

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return label_losses(self.objective, self.scores(model, batch), batch)

    def evaluate(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int
    ) -> dict[str, float]:
        """loss and accuracy."""
        scores = evaluate_scores(self, model, examples, batch_size)
        found = label_metrics(scores, [int(e["label"]) for e in examples], binary=False)
        return {"loss": found["loss"], "accuracy": found["accuracy"]}

    def _bound(self) -> CandidateScorer:
        if self._scorer is None:
            raise BadInput(f"task {self.name!r} has no tokenizer yet; call prepare(loaded) first")
        return self._scorer


def check_choices(row: Row) -> Example:
    """A row with prompt, two or more distinct choices, and the index of the right one.

    >>> check_choices({"prompt": "2 + 2 =", "choices": ["4", "5"], "label": "0"})["label"]
    0
    """
    require(row, ("prompt", "choices", "label"))
    choices = row["choices"]
    if not isinstance(choices, list | tuple) or len(choices) < 2:
        raise DataError(f"wanted a list of two or more choices, got {choices!r}")
    if not all(str(choice).strip() for choice in choices):
        raise DataError(f"an empty choice cannot be scored: {choices!r}")
    label = row["label"]
    if label in choices:
        label = list(choices).index(label)
    if not str(label).isdecimal() or int(label) >= len(choices):
        raise DataError(f"label {label!r} is not one of the {len(choices)} choices (from 0 on)")
    return {**row, "choices": list(choices), "label": int(label)}


def choice(
    data: Data,
    max_length: int | None = None,
    objective: str = "loss",
    reduce: str = "sum",
    bos: Bos = "auto",
    encoding: str = "utf-8",
    train_size: int | None = None,
    dev_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    name: str = "choice",
) -> Choice:
    """A multiple-choice task over rows {"prompt", "choices", "label"} (index or text of a choice).

    Raises:
        DataError: naming the row, for missing fields and bad labels.
    """
    tables = Sizes(train_size, dev_size, test_size, seed).apply(load(data, encoding))
    checked = {split: rows.map(check_choices) for split, rows in tables.items()}
    return Choice(
        checked, name=name, reduce=reduce, objective=objective, max_length=max_length, bos=bos
    )
