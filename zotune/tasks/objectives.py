"""What is minimised over label scores: cross-entropy, or accuracy and F1 as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from zotune.errors import BadInput
from zotune.tasks import metrics
from zotune.tasks.batch import Batch

OBJECTIVES = ("loss", "accuracy", "f1")


def check_objective(objective: str, known: Sequence[str] = OBJECTIVES) -> str:
    """The objective, or BadInput listing the known ones."""
    if objective not in known:
        raise BadInput(f"objective={objective!r} is not known; use {', '.join(known)}")
    return objective


def is_per_example(objective: str) -> bool:
    """Macro F1 is one number per batch; the others are sums over examples."""
    return objective != "f1"


def label_losses(objective: str, scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """(loss, weight) of scores (batch.size, K).

    "loss": -log softmax(scores)[label] per example. "accuracy": 1 - [argmax = label] per example.
    "f1": -macro F1 of each stacked copy, shape (batch.copies,).
    """
    label = batch["label"]
    if objective == "loss":
        loss = functional.cross_entropy(scores, label, reduction="none")
        return loss, torch.ones_like(loss)
    chosen = scores.argmax(-1)
    if objective == "accuracy":
        loss = (chosen != label).float()
        return loss, torch.ones_like(loss)
    rows = zip(
        chosen.view(batch.copies, -1).tolist(), label.view(batch.copies, -1).tolist(), strict=True
    )
    found = [-metrics.macro_f1(predicted, wanted) for predicted, wanted in rows]
    loss = torch.tensor(found, dtype=torch.float32, device=scores.device)
    return loss, torch.ones_like(loss)


def label_metrics(
    scores: Sequence[Tensor], wanted: Sequence[int], binary: bool
) -> dict[str, float]:
    """loss, accuracy, macro_f1 (and f1 of label 1 when binary) of scores (K,) per example."""
    chosen = [int(row.argmax()) for row in scores]
    losses = [-float(row.log_softmax(-1)[w]) for row, w in zip(scores, wanted, strict=True)]
    found = {
        "loss": sum(losses) / len(losses),
        "accuracy": metrics.accuracy(chosen, wanted),
        "macro_f1": metrics.macro_f1(chosen, wanted),
    }
    if binary:
        found["f1"] = metrics.f1_of(1, chosen, wanted)
    return found
