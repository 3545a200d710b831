"""Text classification: label words for causal models, label texts or a trained head for encoders.

loss = cross-entropy over the candidates' scores. For causal models a candidate's score is the
log-probability of its label word behind the prompt (MeZO, arXiv 2305.17333, appendix E).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.tasks.batch import Batch
from zotune.tasks.candidates import Candidates, CandidateScorer
from zotune.tasks.encoding import Bos, Template, TextEncoder, length_limit, require
from zotune.tasks.heads import (
    HeadFeatures,
    HeadScorer,
    head_labels,
    label_columns,
    pooled,
    takes_segments,
)
from zotune.tasks.labels import (
    Words,
    find_labels,
    labelled,
    parse_list,
    parse_words,
    pick_split,
)
from zotune.tasks.objectives import check_objective, is_per_example, label_losses, label_metrics
from zotune.tasks.scoring import CausalScorer
from zotune.tasks.sources import Data, Sizes, Tables, load
from zotune.tasks.task import Example, Task, chunks, device_of, evaluating

if TYPE_CHECKING:
    from zotune.models import Loaded


class Classification(Task):
    """Classify an example into one of `labels`.

    Args:
        tables: split name to rows, labels already indices (see `labels.labelled`).
        labels: label names, in index order.
        template: prompt for causal models, e.g. "{text} It was".
        words: a label word per label, put behind the prompt.
        texts: for encoders, one or more texts per label that start the head.
        inputs: the one or two fields an encoder reads (two are encoded as a pair).
        reduce: "sum" or "mean" over the tokens of a label word.
        objective: "loss", or the non-differentiable "accuracy" or "f1".
        metric: "accuracy", "macro_f1", or "f1" (of label 1 of two).
        temperature: factor on the cosines of the label-text head.
        fast: allow the one-sequence path for label words of one token.
    """

    def __init__(
        self,
        tables: Mapping[str, Sequence[Example]],
        labels: Sequence[str],
        template: str,
        words: Words = None,
        texts: str | Sequence[str | Sequence[str]] | None = None,
        inputs: Sequence[str] = ("text",),
        *,
        name: str = "classification",
        reduce: str = "sum",
        objective: str = "loss",
        metric: str = "accuracy",
        max_length: int | None = None,
        bos: Bos = "auto",
        temperature: float = 20.0,
        fast: bool = True,
    ) -> None:
        if metric not in ("accuracy", "macro_f1", "f1"):
            raise BadInput(f"metric={metric!r} is not known; use accuracy, macro_f1 or f1")
        if metric == "f1" and len(labels) != 2:
            raise BadInput(f"metric='f1' needs two labels, got {len(labels)}; use 'macro_f1'")
        self.name, self.metric, self.labels = name, metric, list(labels)
        self.objective = check_objective(objective)
        self.per_example = is_per_example(objective)
        self.template = Template(template)
        self.words = parse_words(words, self.labels)
        self.texts = _label_texts(texts, self.words)
        self.inputs = tuple(inputs)
        self._tables = dict(tables)
        self._reduce, self._max_length, self._bos = reduce, max_length, bos
        self._temperature, self._fast = temperature, fast
        self._scorer: CandidateScorer | HeadScorer | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._tables)

    @property
    def truncated(self) -> int:
        scorer = self._bound()
        return scorer.truncated if isinstance(scorer, HeadScorer) else scorer.encoder.truncated

    def split(self, name: str) -> Sequence[Example]:
        return pick_split(self._tables, name)

    def prepare(self, loaded: Loaded) -> nn.Module:
        """The module to run: the model itself, or for encoders a head over pooled states."""
        model, tokenizer = loaded.model, loaded.tokenizer
        limit = length_limit(loaded, self._max_length)
        if loaded.kind == "causal":
            encoder = TextEncoder(tokenizer, limit, self._bos)
            scorer = CausalScorer.probe(model)
            self._scorer = CandidateScorer(encoder, scorer, self._reduce, self._fast)
        elif loaded.kind == "classifier":
            columns = label_columns(head_labels(loaded), self.labels)
            self._scorer = HeadScorer(tokenizer, limit, takes_segments(model), columns)
        elif loaded.kind == "encoder":
            model = pooled(loaded, self.labels, self.texts, self._temperature)
            self._scorer = HeadScorer(tokenizer, limit, takes_segments(model))
        else:
            raise BadInput(f"task {self.name!r} cannot run a model of kind {loaded.kind!r}")
        return model

    def encode(self, example: Example) -> Candidates | HeadFeatures:
        scorer, label = self._bound(), int(example["label"])
        if isinstance(scorer, HeadScorer):
            require(example, self.inputs)
            return scorer.encode([str(example[name]).strip() for name in self.inputs], label)
        return scorer.encode(self.template.fill(example), self.words, self.template.join, label)

    def extent(self, features: Candidates | HeadFeatures) -> tuple[int, int]:
        return features.extent

    def collate(self, features: Sequence[Any]) -> Batch:
        return self._bound().collate(features)

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """(batch.size, labels) float32, up to a constant per row."""
        return self._bound().scores(model, batch)

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return label_losses(self.objective, self.scores(model, batch), batch)

    def evaluate(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int
    ) -> dict[str, float]:
        """loss (cross-entropy), accuracy, macro_f1 and, for two labels, f1 of label 1."""
        scores = evaluate_scores(self, model, examples, batch_size)
        return label_metrics(scores, [int(e["label"]) for e in examples], len(self.labels) == 2)

    def _bound(self) -> CandidateScorer | HeadScorer:
        if self._scorer is None:
            raise BadInput(f"task {self.name!r} has no tokenizer yet; call prepare(loaded) first")
        return self._scorer


def evaluate_scores(
    task: Any, model: nn.Module, examples: Sequence[Example], batch_size: int
) -> list[Tensor]:
    """Scores (K,) of every example, in order; batches are made of examples of like length."""
    features = [task.encode(example) for example in examples]
    found: list[Tensor] = [torch.empty(0)] * len(features)
    device = device_of(model)
    with evaluating(model):
        for part in chunks([f.extent[1] for f in features], batch_size):
            scores = task.scores(model, task.collate([features[i] for i in part]).to(device)).cpu()
            for i, row in zip(part, scores, strict=True):
                found[i] = row
    return found


def _label_texts(
    texts: str | Sequence[str | Sequence[str]] | None, words: Sequence[str]
) -> list[list[str]]:
    texts = parse_list(texts) if isinstance(texts, str) else texts
    chosen = [[t] if isinstance(t, str) else list(t) for t in (words if texts is None else texts)]
    if len(chosen) != len(words) or not all(chosen):
        raise BadInput(f"{len(chosen)} label texts for {len(words)} labels; give one or more each")
    return chosen


def classification(
    data: Data,
    template: str = "{text}\nLabel:",
    label_words: Words = None,
    labels: str | Sequence[str] | None = None,
    label_texts: str | Sequence[str | Sequence[str]] | None = None,
    inputs: str | Sequence[str] | None = None,
    label_field: str = "label",
    max_length: int | None = None,
    objective: str = "loss",
    metric: str = "accuracy",
    reduce: str = "sum",
    bos: Bos = "auto",
    encoding: str = "utf-8",
    columns: str | Sequence[str] = (),
    train_size: int | None = None,
    dev_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    name: str = "classification",
) -> Classification:
    """A classification task over the user's own rows.

    Args:
        data: see `sources.load`; rows have the template's fields and `label_field`.
        labels: label names in index order; found in the train rows when None.
        inputs: fields that an encoder reads; the template's first two when None.

    Raises:
        DataError: naming the row, for missing fields and unknown labels.
    """
    fields = Template(template).fields
    tables = Sizes(train_size, dev_size, test_size, seed).apply(load(data, encoding, columns))
    names = parse_list(labels) if labels is not None else found_labels(tables, label_field)
    read = tuple(parse_list(inputs)) if inputs is not None else fields[:2]
    wanted = tuple(dict.fromkeys((*fields, *read)))
    checked = {k: labelled(rows, wanted, label_field, names) for k, rows in tables.items()}
    return Classification(
        checked,
        names,
        template,
        label_words,
        label_texts,
        read,
        name=name,
        reduce=reduce,
        objective=objective,
        metric=metric,
        max_length=max_length,
        bos=bos,
    )


def found_labels(tables: Tables, field: str) -> list[str]:
    """The labels of the train rows (of the first split there is, without train)."""
    first = tables.get("train") or next(iter(tables.values()))
    return find_labels(first, field)
