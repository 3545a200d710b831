"""Extractive question answering by generation (SQuAD): teacher-forced loss, F1 and exact match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zotune.errors import BadInput, DataError
from zotune.tasks import metrics
from zotune.tasks.batch import Batch, pad_stack
from zotune.tasks.data import Row
from zotune.tasks.encoding import Bos, Template, TextEncoder, length_limit, require
from zotune.tasks.generation import greedy
from zotune.tasks.labels import pick_split
from zotune.tasks.objectives import check_objective
from zotune.tasks.scoring import CausalScorer, Target, answer_target
from zotune.tasks.sources import Data, Sizes, load
from zotune.tasks.spans import bytes_rows, collate_targets, evaluate_spans, rows_texts, span_losses
from zotune.tasks.task import Example, Task, chunks, device_of, evaluating

if TYPE_CHECKING:
    from zotune.models import Loaded

TEMPLATE = "Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:"
BARE_TEMPLATE = "Context: {context}\nQuestion: {question}\nAnswer:"
_SEPARATOR = "\x1e"


@dataclass(frozen=True)
class QAFeatures:
    """The first gold answer behind its prompt, the prompt alone, and all gold answers."""

    target: Target
    prompt: list[int]
    golds: str

    @property
    def extent(self) -> tuple[int, int]:
        """(rows, tokens of the longest) in a batch."""
        return self.target.extent


class QuestionAnswering(Task):
    """Answer a question about a context.

    Training: loss = mean nll of the first gold answer and the line break that ends it (objective
    "loss"), or -F1 of the greedily generated answer (objective "f1", not differentiable).
    Evaluation generates and reports SQuAD F1 and exact match.

    Args:
        tables: split name to rows with the template's fields and "answers" (a list of texts).
        max_new_tokens: longest generated answer; also the longest trained one.
    """

    kinds = ("causal",)
    metric = "f1"

    def __init__(
        self,
        tables: Mapping[str, Sequence[Example]],
        template: str = TEMPLATE,
        *,
        name: str = "qa",
        objective: str = "loss",
        max_length: int | None = None,
        max_new_tokens: int = 50,
        bos: Bos = "auto",
    ) -> None:
        if max_new_tokens < 1:
            raise BadInput(f"max_new_tokens={max_new_tokens} leaves no answer; use 1 or more")
        self.name = name
        self.objective = check_objective(objective, ("loss", "f1"))
        self.template = Template(template)
        self.max_new_tokens = max_new_tokens
        self._tables = dict(tables)
        self._max_length, self._bos = max_length, bos
        self._encoder: TextEncoder | None = None
        self._scorer = CausalScorer(split=False)
        self._stop: list[int] = []

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._tables)

    def split(self, name: str) -> Sequence[Example]:
        return pick_split(self._tables, name)

    def prepare(self, loaded: Loaded) -> nn.Module:
        if loaded.kind != "causal":
            raise BadInput(f"task {self.name!r} needs a causal model, got kind {loaded.kind!r}")
        limit = length_limit(loaded, self._max_length)
        if limit <= self.max_new_tokens + 1:
            raise BadInput(
                f"max_length={limit} leaves no room for a prompt beside max_new_tokens="
                f"{self.max_new_tokens}; lower the latter"
            )
        encoder = self._encoder = TextEncoder(loaded.tokenizer, limit, self._bos)
        self._scorer = CausalScorer.probe(loaded.model)
        line = encoder.raw("a\n")[len(encoder.raw("a")) :][-1:]
        self._stop = [i for i in (encoder.eos, *line) if i is not None]
        return loaded.model

    def encode(self, example: Example) -> QAFeatures:
        require(example, (*self.template.fields, "answers"))
        encoder, golds = self._bound(), [str(answer) for answer in example["answers"]]
        if not golds:
            raise DataError("an example without any gold answer; give at least one")
        prompt, answer = encoder.pair(self.template.fill(example), golds[0].strip() + "\n", " ")
        room = encoder.limit - self.max_new_tokens
        answer = answer[: self.max_new_tokens]
        if len(prompt) > room:  # leave the same room in training and in generation
            encoder.count_truncated(len(prompt) + len(answer), "on the left of the prompt")
            head = encoder.head
            prompt = head + prompt[len(prompt) - (room - len(head)) :]
        return QAFeatures(answer_target(prompt, answer), prompt, _SEPARATOR.join(golds))

    def extent(self, features: QAFeatures) -> tuple[int, int]:
        return features.extent

    def collate(self, features: Sequence[QAFeatures]) -> Batch:
        """The teacher-forced rows; for objective "f1" the prompts, padded left, and the answers."""
        pad = self._bound().pad
        if self.objective == "loss":
            return collate_targets([f.target for f in features], pad)
        return self._prompts(features)

    def _prompts(self, features: Sequence[QAFeatures]) -> Batch:
        ids, mask = pad_stack([f.prompt for f in features], self._bound().pad, side="left")
        golds = bytes_rows([f.golds for f in features])
        return Batch({"input_ids": ids, "attention_mask": mask, "golds": golds}, len(features))

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.objective == "loss":
            return span_losses(self._scorer, model, batch)
        golds = [text.split(_SEPARATOR) for text in rows_texts(batch["golds"])]
        found = [
            -metrics.squad_f1(answer, gold)
            for answer, gold in zip(self.answers(model, batch), golds, strict=True)
        ]
        loss = torch.tensor(found, dtype=torch.float32, device=batch["input_ids"].device)
        return loss, torch.ones_like(loss)

    def answers(self, model: nn.Module, batch: Batch) -> list[str]:
        """Greedy answers to left-padded prompts, up to the first line break."""
        encoder = self._bound()
        made = greedy(
            model,
            batch["input_ids"],
            batch["attention_mask"],
            self.max_new_tokens,
            self._stop,
            encoder.pad,
        )
        texts = encoder.tokenizer.batch_decode(made, skip_special_tokens=True)
        return [text.strip().split("\n")[0].strip() for text in texts]

    def evaluate(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int
    ) -> dict[str, float]:
        """loss (teacher-forced nll per token), f1 and exact_match, both in 0..1."""
        features = [self.encode(example) for example in examples]
        targets = [f.target for f in features]
        loss = evaluate_spans(self._scorer, model, targets, batch_size, self._bound().pad)["loss"]
        f1, exact = 0.0, 0.0
        device = device_of(model)
        with evaluating(model):
            for part in chunks([len(f.prompt) for f in features], batch_size):
                batch = self._prompts([features[i] for i in part]).to(device)
                for i, answer in zip(part, self.answers(model, batch), strict=True):
                    golds = features[i].golds.split(_SEPARATOR)
                    f1 += metrics.squad_f1(answer, golds)
                    exact += metrics.squad_exact(answer, golds)
        return {"loss": loss, "f1": f1 / len(features), "exact_match": exact / len(features)}

    @property
    def truncated(self) -> int:
        return self._bound().truncated

    def _bound(self) -> TextEncoder:
        if self._encoder is None:
            raise BadInput(f"task {self.name!r} has no tokenizer yet; call prepare(loaded) first")
        return self._encoder


def check_answers(row: Row, fields: Sequence[str]) -> Example:
    """A row whose answers are a non-empty list of texts; "answer" or SQuAD's dict are accepted."""
    answers = row.get("answers", row.get("answer"))
    if isinstance(answers, dict):
        answers = answers.get("text")
    if isinstance(answers, str):
        answers = [answers]
    require({**row, "answers": answers}, (*fields, "answers"))
    if not answers or not all(str(a).strip() for a in answers):
        raise DataError(f"wanted one or more non-empty answers, got {answers!r}")
    return {**row, "answers": [str(answer) for answer in answers]}


def qa(
    data: Data,
    template: str = BARE_TEMPLATE,
    objective: str = "loss",
    max_length: int | None = None,
    max_new_tokens: int = 50,
    bos: Bos = "auto",
    encoding: str = "utf-8",
    train_size: int | None = None,
    dev_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    name: str = "qa",
) -> QuestionAnswering:
    """Question answering over rows {"context", "question", "answers"}.

    Raises:
        DataError: naming the row, for missing fields or empty answers.
    """
    fields = Template(template).fields
    tables = Sizes(train_size, dev_size, test_size, seed).apply(
        load(data, encoding), group=lambda row: row.get("context")
    )
    checked = {k: rows.map(lambda row: check_answers(row, fields)) for k, rows in tables.items()}
    return QuestionAnswering(
        checked,
        template,
        name=name,
        objective=objective,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        bos=bos,
    )
