"""The attack: images as one space, a registered method on it, and an oracle that counts."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zotune.attacks.classifier import Classifier
from zotune.attacks.config import AttackConfig
from zotune.attacks.opening import open_budget, open_method, steps_of
from zotune.attacks.oracle import Oracle, margins
from zotune.attacks.outcome import Outcome
from zotune.core.inputs import InputBlock, on_grid
from zotune.core.step import Tuner
from zotune.errors import BadInput

log = logging.getLogger("zotune")


def attack(
    classifier: Any,
    images: Any,
    labels: Any,
    *,
    targets: Any = None,
    config: AttackConfig | None = None,
    **options: Any,
) -> Outcome:
    """Look for misclassified images within a budget, to test a model of one's own.

        minimise f(x + d),  f = z_y - max_{j != y} z_j,  |d| <= budget,  x + d in {0, ..., 255}^n

    from answers alone: each image is a zeroth-order problem of its own (ZOQO's second experiment,
    Bar & Giryes 2025, arXiv 2501.06736), and leaves at its first success.

    Args:
        classifier: an `nn.Module` (of float images in [0, 1]), a function of uint8 images, a
            foolbox model or an adversarial-robustness-toolbox estimator.
        images: (n, channels, height, width), uint8 or floats k/255.
        labels: (n,), the true classes. Images that are misclassified anyway are not attacked.
        targets: (n,), the classes to be reached; any wrong one when None.
        config: the attack. options: fields of `AttackConfig` that differ from it.

    Raises:
        BadInput: images off the grid, labels out of range, a budget or a number of queries that
            allows nothing, a method without directions per image, answers that are all not finite.

    >>> def by_brightness(images):
    ...     light = images.float().mean((1, 2, 3))
    ...     return torch.stack([light - 100, 100 - light], 1)
    >>> images = torch.full((2, 1, 4, 4), 104, dtype=torch.uint8)
    >>> found = attack(by_brightness, images, [0, 0], budget="8/255", queries=100)
    >>> found.success_rate, int(found.adversarial.min()) >= 96
    (1.0, True)
    """
    config = replace(config or AttackConfig(), **options)
    began = time.perf_counter()
    images = on_grid(images)
    labels = _classes("labels", labels, len(images))
    wanted = None if targets is None else _classes("targets", targets, len(images))
    shape = tuple(images.shape[1:])
    budget, method = open_budget(config, shape), open_method(config, shape)
    steps = steps_of(config, method)
    asked = Classifier(classifier, config.probabilities)
    correct, broken = _originals(asked, images, labels, wanted, config.batch_size)
    oracles = []
    for first in range(0, len(images), config.batch_size):
        rows = slice(first, first + config.batch_size)
        block = InputBlock.of(images[rows], budget, first)
        aim = labels if wanted is None else wanted
        oracle = Oracle(asked, block, aim[rows], wanted is not None)
        oracle.queries += 1
        oracle.open &= correct[rows]
        tuner = Tuner(oracle.space, method, config.seed, evaluator=oracle, total=steps)
        while tuner.done < steps and bool(oracle.open.any()):
            tuner.step(None)
        oracle.ask_current()
        oracles.append(oracle)
    _warn(broken := broken | torch.cat([o.broken for o in oracles]))
    return Outcome(
        config, images, torch.cat([o.result for o in oracles]), labels, wanted, correct,
        torch.cat([o.success for o in oracles]), broken, torch.cat([o.queries for o in oracles]),
        time.perf_counter() - began,
    )  # fmt: skip


def _originals(
    classifier: Classifier, images: Tensor, labels: Tensor, targets: Tensor | None, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Which originals are classified rightly, and which answers are not finite: (n,) each."""
    starts = range(0, len(images), batch_size)
    scores = torch.cat([classifier(images[first : first + batch_size]) for first in starts])
    for name, given in (("label", labels), ("target", targets)):
        if given is not None and int(given.max()) >= scores.shape[1]:
            number = int((given >= scores.shape[1]).nonzero()[0])
            raise BadInput(
                f"{name} {int(given[number])} of image {number} is no class of this classifier, "
                f"which has {scores.shape[1]}: want 0 to {scores.shape[1] - 1}"
            )
    gaps = margins(scores, labels, targeted=False)
    broken = ~gaps.isfinite()
    if bool(broken.all()):
        raise BadInput(
            "the classifier's answer is not finite for any image; want finite scores: check its "
            "weights and the range of images it expects"
        )
    return ~broken & (gaps >= 0), broken


def _classes(name: str, given: Any, count: int) -> Tensor:
    found = torch.as_tensor(given).detach().cpu()
    if found.shape != (count,) or found.is_floating_point() or found.dtype == torch.bool:
        raise BadInput(
            f"{name} of shape {tuple(found.shape)} and {found.dtype} for {count} images; want one "
            "whole number each"
        )
    if int(found.min()) < 0:
        number = int((found < 0).nonzero()[0])
        raise BadInput(f"{name[:-1]} {int(found[number])} of image {number}; want at least 0")
    return found.long()


def _warn(broken: Tensor) -> None:
    if bool(broken.any()):
        numbers = broken.nonzero().flatten().tolist()
        shown = ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
        log.warning(
            "%d images were left where the classifier's answer was not finite: %s",
            len(numbers), shown,
        )  # fmt: skip
