"""A paper's update in float64 beside the tuner's run: what the tests of single methods share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import batch, small

from zotune.core import spaces
from zotune.core.evaluator import TorchEvaluator
from zotune.core.method import Method
from zotune.core.noise import Key
from zotune.core.perturbation import Perturbation
from zotune.core.step import Tuner
from zotune.tasks.batch import Batch

Tensors = dict[str, Tensor]


def exact(model: nn.Module, here: Batch) -> tuple[Tensor, Tensor]:
    """Cross entropy per example in the model's own precision, float64 here."""
    loss = F.cross_entropy(model(here["input_ids"]), here["label"], reduction="none")
    return loss, torch.ones_like(loss)


class Restated:
    """Two equal float64 models: `theta` of one is moved by hand, the other's `space` is tuned."""

    def __init__(self, space: str = "weights", seed: int = 3) -> None:
        self.seed, self.model = seed, small().double()
        self.tuned = small().double()
        self.space = spaces.parse(space).build(self.tuned)
        self.blocks = {b.name: b for b in self.space}
        self.theta = {n: self.model.get_parameter(n).detach() for n in self.blocks}
        self.start = {n: p.clone() for n, p in self.theta.items()}

    def key(self, t: int, query: int = 0) -> Key:
        return Key(self.seed, step=t, query=query)

    def direction(self, law: Perturbation, key: Key) -> Tensors:
        return {n: law.draw(key, b).double() for n, b in self.blocks.items()}

    def move_(self, step: Tensors, amount: float = 1.0) -> None:
        for name, p in self.theta.items():
            p.add_(amount * step[name])

    def losses(self, t: int, u: Tensors | None = None, amount: float = 0.0) -> Tensor:
        """Of each example of batch t at theta + amount u."""
        before = {n: p.clone() for n, p in self.theta.items()}
        if u is not None:
            self.move_(u, amount)
        with torch.no_grad():
            found = exact(self.model, batch(6, t))[0]
        for name, p in self.theta.items():
            p.copy_(before[name])
        return found

    def loss(self, t: int, u: Tensors | None = None, amount: float = 0.0) -> float:
        return float(self.losses(t, u, amount).mean())

    def tune(self, method: Method, steps: int) -> Tuner:
        evaluator = TorchEvaluator(self.tuned, self.space, exact)
        tuner = Tuner(self.space, method, self.seed, evaluator=evaluator, total=steps)
        for t in range(steps):
            assert tuner.step(batch(6, t)).applied
        return tuner

    def apart(self) -> float:
        """Distance between the two runs, relative to how far they went."""
        pairs = [(p, self.tuned.get_parameter(n), self.start[n]) for n, p in self.theta.items()]
        error = sum(float((p - other).square().sum()) for p, other, _ in pairs)
        length = sum(float((p - start).square().sum()) for p, _, start in pairs)
        assert length > 0
        return math.sqrt(error / length)
