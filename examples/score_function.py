"""An objective without a gradient: a score that only counts.

    python examples/score_function.py

A small network rates products; what counts is whether the best of five is rated highest. That is
0 or 1 per list, so there is nothing to differentiate. `zotune.train` raises the mean and leaves a
run folder as for any other task.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor, nn

import zotune
from zotune.tasks import FunctionTask

CHOICES, FEATURES = 5, 6


def lists(count: int, seed: int) -> list[tuple[Tensor, int]]:
    """Features (5, 6) of five products, and the best one by a rule that the network must find."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, CHOICES, FEATURES, generator=generator)
    worth = features[..., 0] - 2 * features[..., 1] + features[..., 2] * 1.5
    return list(zip(features, worth.argmax(1).tolist(), strict=True))


def score(model: nn.Module, examples: list[Any]) -> float:
    """The share of lists whose best product comes first; more is better."""
    features = torch.stack([features for features, _ in examples])
    chosen = model(features).squeeze(-1).argmax(1).tolist()
    return sum(a == best for a, (_, best) in zip(chosen, examples, strict=True)) / len(examples)


def main(steps: int = 300) -> tuple[float, float]:
    """The score on held-out lists before and after."""
    model = nn.Linear(FEATURES, 1).requires_grad_(False)
    nn.init.zeros_(model.weight)
    task = FunctionTask(score, train=lists(2000, seed=1), test=lists(500, seed=2))
    with tempfile.TemporaryDirectory() as folder:
        config = zotune.TrainConfig(
            output_dir=folder, method="mezo(lr=0.2, eps=0.3, units='absolute')", space="weights",
            max_steps=steps, per_device_train_batch_size=128, report_to="none", show_progress=False,
        )  # fmt: skip
        result = zotune.train(config, model=model, task=task)
    assert result.before is not None
    print(f"score {result.before:.3f} -> {result.after:.3f}, {result.forwards} forward passes")
    return result.before, result.after


if __name__ == "__main__":
    main()
