"""A tiny run that needs no files: a small module, an objective, a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import toys
from torch import Tensor

from zotune.quant import quantize_model_
from zotune.training.config import TrainConfig
from zotune.training.objective import Objective

KINDS: dict[str, dict[str, Any]] = {
    "mezo": {"method": "mezo(units='relative')", "space": "weights", "learning_rate": 0.02},
    "queries": {
        "method": "mezo(lr=0.05, queries=3, units='relative')",
        "space": "lora(targets='up|down')",
    },
    "example": {
        "method": "mezo(directions='example', units='relative', schedule='linear', lr=0.05)",
        "space": "adapter(rank=2)+head",
    },
    "one-sided": {"method": "zo-sign(directions='one-sided')", "space": "norms+biases"},
    "stored": {"method": "zo-adam(lr=0.01)", "space": "weights"},
    "rebuilt": {"method": "zo-adam(lr=0.01, moments='rebuilt', history=5)", "space": "head"},
    "qzo": {"method": "qzo", "space": "scales", "scheme": "int4-g8"},
    "zoqo": {"method": "zoqo", "space": "codes", "scheme": "int8-channel-a8"},
    "quzo": {"method": "quzo(lr=2.0)", "space": "codes", "scheme": "int4-g8"},
    "svrg": {
        "method": "mezo-svrg(lr=0.02, eps=0.05, every=3, batches=2, units='relative')",
        "space": "weights",
    },
    "adamw": {"method": "adamw(lr=0.01)", "space": "weights"},
}
"""One configuration of every kind of state a run can have."""
TIGHT = "17KB"  # memory for three of the four layers of `toys.layered`
FORWARD = [kind for kind in KINDS if kind != "adamw"]


def rows(count: int = 40) -> list[dict[str, Tensor]]:
    whole = toys.batch(count)
    return [{name: t[i] for name, t in whole.tensors.items()} for i in range(count)]


def base(kind: str) -> torch.nn.Module:
    """The model as a run of this kind starts with it."""
    model = toys.small()
    if "scheme" in KINDS[kind]:
        quantize_model_(model, KINDS[kind]["scheme"])
    return model


def task(**options: Any) -> Objective:
    return Objective(toys.cross_entropy, rows(), rows(12), **options)


def config(out: Path, kind: str = "mezo", **options: Any) -> TrainConfig:
    given = {
        "output_dir": str(out),
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "save_steps": 5,
        "logging_steps": 3,
        "journal_sync": 100,
        "show_progress": False,
        **KINDS[kind],
    }
    return TrainConfig(**{**given, **options})


def states(model: torch.nn.Module) -> dict[str, str]:
    return toys.digest(model)


def broken_after(steps: int, value: float = float("nan")) -> Any:
    """cross_entropy that turns non-finite after so many calls."""
    calls = {"n": 0}

    def losses(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        loss, weight = toys.cross_entropy(model, batch)
        calls["n"] += 1
        return (loss if calls["n"] <= steps else loss * value), weight

    return losses
