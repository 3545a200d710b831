"""No model at all: ask for points, measure them wherever you like, tell the losses.

    python examples/ask_tell.py

A simulation with four knobs is fitted to a measured curve. The two halves of a step need not run
in the same place: probes are a few numbers, so the losses may come from another machine.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

import zotune
from zotune.core.probe import Losses, Probe
from zotune.core.space import tensors
from zotune.methods.zo_adam import zo_adam

TIMES = [0.1 * i for i in range(60)]
TRUTH = (2.0, 0.4, 3.0, 0.5)


def swing(amplitude: float, damping: float, frequency: float, phase: float) -> list[float]:
    """A damped oscillation."""
    return [amplitude * math.exp(-damping * t) * math.cos(frequency * t + phase) for t in TIMES]


MEASURED = swing(*TRUTH)


def loss(knobs: list[float]) -> float:
    """Mean squared distance from the measured curve; any Python function will do."""
    return sum((a - b) ** 2 for a, b in zip(swing(*knobs), MEASURED, strict=True)) / len(TIMES)


def main(steps: int = 800) -> tuple[float, float]:
    """Loss before and after."""
    space = tensors({"knobs": torch.tensor([1.5, 0.6, 2.8, 0.3])})
    (knobs,) = space
    method = zo_adam(lr=0.01, eps=1e-3, queries=4, schedule="linear")
    tuner = zotune.Tuner(space, method, seed=0, total=steps)

    def point(probe: Probe) -> list[float]:
        """theta + step * u: the values whose loss a probe asks for."""
        u: Tensor = method.perturbation.draw(probe.key, knobs)
        return knobs.at(u, probe.step).tolist()

    before = loss(knobs.value().tolist())
    with ThreadPoolExecutor() as pool:
        for _ in range(steps):
            points = [point(probe) for probe in tuner.ask()]
            tuner.tell(Losses.of(list(pool.map(loss, points))))
    after = loss(knobs.value().tolist())
    found = ", ".join(f"{x:.3f}" for x in knobs.value().tolist())
    print(f"loss {before:.4f} -> {after:.6f}; knobs {found}, the truth is {TRUTH}")
    return before, after


if __name__ == "__main__":
    main()
