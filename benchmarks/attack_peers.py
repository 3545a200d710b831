"""Other libraries' attacks, asked through one counter.

A peer attacks one image at a time, and every image it shows the classifier is counted. It succeeds
if one of its first `queries` images lies within the L-inf budget and is misclassified, or if its
result does once clamped to the budget: more generous than its own report. It may leave the uint8
grid, which zotune's attacks never do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Scores = Callable[[Tensor], Tensor]  # of float images in [0, 1]


class Spent(Exception):
    """The queries are used up."""


@dataclass
class Counter:
    """One image's classifier, as a peer sees it: numpy images in [0, 1] to scores."""

    scores: Scores
    image: Tensor  # uint8 (channels, height, width)
    label: int
    budget: float
    queries: int
    asked: int = 0
    fooled: bool = False

    def __call__(self, given: Any) -> Any:
        left = self.queries - self.asked
        shown = torch.from_numpy(np.asarray(given, np.float32)[:left])
        if not len(shown):
            raise Spent
        self.asked += len(shown)
        scores = self.scores(shown)
        self.see(shown, scores)
        if self.fooled or left < len(given):
            raise Spent
        return scores.numpy()

    def see(self, shown: Tensor, scores: Tensor) -> None:
        away = (shown - self.image / 255).abs().flatten(1).amax(1)
        inside = away <= self.budget + 1e-6
        self.fooled |= bool((inside & (scores.argmax(1) != self.label)).any())

    def finish(self, result: Tensor) -> None:
        base = self.image / 255
        clamped = (base + (result - base).clamp(-self.budget, self.budget)).clamp(0, 1)
        self.see(clamped, self.scores(clamped))


def zoo(model: Any, budget: float, queries: int, size: int) -> Any:
    from art.attacks.evasion import ZooAttack

    # Two queries per coordinate, and one per iteration for the result; as many coordinates at
    # once as leave ten iterations, ART's default number of them.
    coordinates = max(1, min(size, queries // 20))
    return ZooAttack(
        model, max_iter=max(1, queries // (2 * coordinates + 1)), nb_parallel=coordinates,
        binary_search_steps=1, initial_const=10.0, learning_rate=budget, variable_h=budget / 2,
        abort_early=False, use_resize=False, use_importance=False, batch_size=1, verbose=False,
    )  # fmt: skip


def square(model: Any, budget: float, queries: int, size: int) -> Any:
    from art.attacks.evasion import SquareAttack

    return SquareAttack(model, eps=budget, max_iter=queries, nb_restarts=1, verbose=False)


def hop_skip_jump(model: Any, budget: float, queries: int, size: int) -> Any:
    from art.attacks.evasion import HopSkipJump

    return HopSkipJump(
        model, norm=np.inf, max_iter=50, max_eval=1000, init_eval=20, verbose=False
    )  # fmt: skip


PEERS: dict[str, Callable[[Any, float, int, int], Any]] = {
    "ART ZOO": zoo, "ART Square": square, "ART HopSkipJump": hop_skip_jump,
}  # fmt: skip


def attacked(
    peer: str, scores: Scores, images: Tensor, labels: Tensor, budget: float, queries: int,
    seed: int,
) -> tuple[float, float]:  # fmt: skip
    """Success rate and mean queries over images that are classified rightly."""
    from art.estimators.classification import BlackBoxClassifierNeuralNetwork

    counters = []
    shape = tuple(images.shape[1:])
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        counter = Counter(scores, image, label, budget, queries)
        model = BlackBoxClassifierNeuralNetwork(counter, shape, 10, clip_values=(0.0, 1.0))
        np.random.seed(1000 * seed + number)  # noqa: NPY002 - ART draws from the global generator
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                attack = PEERS[peer](model, budget, queries, image.numel())
                start = (image / 255).unsqueeze(0).numpy()
                counter.finish(torch.from_numpy(attack.generate(start, np.array([label]))))
            except Spent:
                pass
        counters.append(counter)
    fooled = sum(c.fooled for c in counters) / len(counters)
    return fooled, sum(c.asked for c in counters) / len(counters)


def pgd(
    model: nn.Module, scores: Scores, images: Tensor, labels: Tensor, budget: float, steps: int
) -> float:
    """Success of foolbox's PGD, which has the float model's gradients, on the quantized model."""
    import foolbox

    start = images / 255
    bounded = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    found, _, _ = foolbox.attacks.LinfPGD(steps=steps)(bounded, start, labels, epsilons=budget)
    found = (found[0] if isinstance(found, list) else found).mul(255).round() / 255
    assert float((found - start).abs().max()) <= budget + 1e-6
    return float((scores(found).argmax(1) != labels).double().mean())
