"""Label scores of encoders: a pooled head started from label texts, or a checkpoint's own head."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.tasks.batch import Batch, pad_stack

if TYPE_CHECKING:
    from zotune.models import Loaded

log = logging.getLogger("zotune")


@dataclass(frozen=True)
class HeadFeatures:
    """One encoded example: token ids, segment ids (empty where unused), label."""

    ids: list[int]
    segments: list[int]
    label: int

    @property
    def extent(self) -> tuple[int, int]:
        """(rows, tokens of the longest) in a batch."""
        return 1, len(self.ids)


class HeadScorer:
    """Scores (N, K) of a module that maps input_ids and attention_mask to logits.

    Args:
        tokenizer: adds its own special tokens; text pairs are encoded as pairs.
        limit: longest sequence; longer ones are cut by the tokenizer (longest part first).
        segments: whether the module takes token_type_ids.
        columns: column of the module's logits for each label; None when they agree.
    """

    def __init__(
        self, tokenizer: Any, limit: int, segments: bool, columns: Sequence[int] | None = None
    ) -> None:
        self.tokenizer, self.limit, self.segments = tokenizer, limit, segments
        self.columns = None if columns is None else list(columns)
        self.truncated = 0
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def encode(self, texts: Sequence[str], label: int) -> HeadFeatures:
        """Tokenize one text, or two as a pair."""
        if len(texts) not in (1, 2):
            raise BadInput(f"an encoder reads one text or a pair, got {len(texts)}")
        found = self.tokenizer(*texts, verbose=False)
        if len(found["input_ids"]) > self.limit:
            if self.truncated == 0:
                log.warning(
                    "a text of %d tokens is longer than max_length=%d and is cut at its end; "
                    "further ones are counted, not said",
                    len(found["input_ids"]),
                    self.limit,
                )
            self.truncated += 1
            found = self.tokenizer(*texts, truncation=True, max_length=self.limit, verbose=False)
        segments = list(found.get("token_type_ids", ())) if self.segments else []
        return HeadFeatures(list(found["input_ids"]), segments, label)

    def collate(self, features: Sequence[HeadFeatures]) -> Batch:
        """Right-padded batch, one row per example."""
        ids, mask = pad_stack([f.ids for f in features], self.pad)
        tensors = {"input_ids": ids, "attention_mask": mask}
        if all(f.segments for f in features):
            tensors["token_type_ids"], _ = pad_stack([f.segments for f in features], 0)
        tensors["label"] = torch.tensor([f.label for f in features])
        return Batch(tensors, len(features))

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """(batch.size, K) float32 logits in the order of the task's labels."""
        names = ("input_ids", "attention_mask", "token_type_ids")
        out = model(**{name: batch[name] for name in names if name in batch})
        logits: Tensor = out if isinstance(out, Tensor) else out.logits
        logits = logits.float()
        return logits if self.columns is None else logits[:, self.columns]


def takes_segments(module: nn.Module) -> bool:
    """Whether the module (or the encoder under a pooled head) takes token_type_ids."""
    body = getattr(module, "encoder", None) if hasattr(module, "head") else None
    forward = (body if isinstance(body, nn.Module) else module).forward
    return "token_type_ids" in inspect.signature(forward).parameters


def label_columns(theirs: Sequence[str], labels: Sequence[str]) -> list[int] | None:
    """Which of a checkpoint's logits belongs to which label; None when the orders agree.

    By name where the checkpoint's label names contain ours; by position where it has none of them
    (LABEL_0, LABEL_1, ...) and the counts agree.

    Raises:
        BadInput: the names or the counts contradict each other.

    >>> label_columns(["NEUTRAL", "entailment"], ["entailment", "neutral"])
    [1, 0]
    """
    names = [name.lower() for name in theirs]
    ours = [label.lower() for label in labels]
    if all(label in names for label in ours):
        columns = [names.index(label) for label in ours]
        return None if columns == list(range(len(names))) else columns
    if len(names) != len(labels) or any(label in names for label in ours):
        raise BadInput(
            f"the checkpoint's labels ({', '.join(theirs)}) are not the task's "
            f"({', '.join(labels)}); give labels= in the data's own names, or another checkpoint"
        )
    if not all(name.startswith("label_") for name in names):
        log.warning(
            "taking the checkpoint's labels in order: %s",
            ", ".join(f"{a} = {b}" for a, b in zip(labels, theirs, strict=True)),
        )
    return None


def head_labels(loaded: Loaded) -> list[str]:
    """The label names of a classifier checkpoint, in the order of its logits."""
    named = getattr(loaded.model, "labels", None)
    if named is not None:
        return [str(name) for name in named]
    return [str(name) for _, name in sorted(loaded.config.id2label.items())]


def pooled(
    loaded: Loaded, labels: Sequence[str], texts: Sequence[Sequence[str]], temperature: float
) -> nn.Module:
    """A head over mean-pooled states, a row = temperature * unit mean of a label's embeddings.

    Before any training this is zero-shot classification by cosine.
    """
    from zotune.models import PooledClassifier

    flat = [text for group in texts for text in group]
    each = PooledClassifier.from_texts(loaded.model, loaded.tokenizer, flat, temperature=1.0)
    rows = torch.split(each.head.weight.detach(), [len(group) for group in texts])
    weight = nn.functional.normalize(torch.stack([group.mean(0) for group in rows]), dim=-1)
    head = nn.Linear(weight.shape[1], len(labels), device=weight.device)
    with torch.no_grad():
        head.weight.copy_(temperature * weight)
        head.bias.zero_()
    return PooledClassifier(loaded.model, labels, head)
