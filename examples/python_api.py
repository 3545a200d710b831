"""Any nn.Module: quantize it, choose a space and a method, call `step`.

    python examples/python_api.py

Three noisy rings are to be told apart. The network's random weights are quantized to int4 and stay
frozen; only their scales, the norms and the head move, by forward passes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zotune
from zotune.core import spaces
from zotune.methods.mezo import mezo
from zotune.quant import quantize_model_
from zotune.tasks import Batch

RINGS = 3


class Network(nn.Module):
    """Random weights, drawn from a generator of their own."""

    def __init__(self, generator: torch.Generator, width: int = 64) -> None:
        super().__init__()
        first, second = nn.Linear(2, width), nn.Linear(width, width)
        self.body = nn.Sequential(first, nn.Tanh(), nn.LayerNorm(width), second, nn.Tanh())
        self.head = nn.Linear(width, RINGS)
        for layer in (first, second, self.head):
            nn.init.normal_(layer.weight, std=1.5 * layer.in_features**-0.5, generator=generator)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(first.bias, std=1.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits


def rings(size: int, generator: torch.Generator) -> Batch:
    """Points (size, 2) on three circles around 0, and which circle each is on."""
    label = torch.randint(RINGS, (size,), generator=generator)
    angle = 6.2832 * torch.rand(size, generator=generator)
    radius = 1.0 + label + 0.1 * torch.randn(size, generator=generator)
    points = radius.unsqueeze(1) * torch.stack([angle.cos(), angle.sin()], dim=1)
    return Batch({"x": points, "label": label}, size)


def objective(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss and weight of each example: what every objective returns."""
    loss = F.cross_entropy(model(batch["x"]), batch["label"], reduction="none")
    return loss, torch.ones_like(loss)


@torch.no_grad()
def accuracy(model: nn.Module, batch: Batch) -> float:
    return float((model(batch["x"]).argmax(-1) == batch["label"]).float().mean())


def main(steps: int = 600) -> tuple[float, float]:
    """Accuracy on fresh points before and after."""
    generator = torch.Generator().manual_seed(0)
    model = Network(generator).requires_grad_(False)
    quantize_model_(model, "int4-g2", exclude=("head",))
    space = spaces.parse("scales + norms + head").build(model)
    method = mezo(lr=0.3, eps=0.02, units="relative", queries=4, schedule="linear")
    evaluator = zotune.TorchEvaluator(model, space, objective)
    tuner = zotune.Tuner(space, method, seed=0, evaluator=evaluator, total=steps)

    test = rings(1000, generator)
    before = accuracy(model, test)
    for _ in range(steps):
        tuner.step(rings(64, generator))
    after = accuracy(model, test)
    print(f"accuracy {before:.3f} -> {after:.3f}, {evaluator.forwards} forward passes, no backward")
    return before, after


if __name__ == "__main__":
    main()
