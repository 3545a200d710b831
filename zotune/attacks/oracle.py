"""The one place that asks the classifier: it counts, and sees who is fooled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zotune.attacks.classifier import Classifier
from zotune.core.evaluator import Evaluator
from zotune.core.image_laws import PerImage
from zotune.core.inputs import InputBlock
from zotune.core.noise import Key
from zotune.core.perturbation import Perturbation
from zotune.core.probe import Losses, Probe
from zotune.core.space import Space


def margins(scores: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """The Carlini-Wagner margin f(x), below 0 exactly where the attack succeeds: float64 (n,).

    Untargeted z_y - max_{j != y} z_j for the true class y; targeted max_{j != t} z_j - z_t for
    the class t that is wanted (Carlini & Wagner 2017, arXiv 1608.04644, f_6 without its floor).

    >>> margins(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]), targeted=False).tolist()
    [1.0]
    """
    own = scores.gather(1, labels[:, None])
    others = scores.scatter(1, labels[:, None], -torch.inf).amax(1, keepdim=True)
    gap = (own - others).squeeze(1)
    return -gap if targeted else gap


class Oracle(Evaluator):
    """Losses of images that are still `open`, one query each; the first success ends an image.

    labels: (images,), the true classes or, if targeted, those wanted. found: the image that
    fooled the classifier, where there is one. queries: how often each image was asked about.
    broken: images whose answer was not finite; they leave like those that succeeded.
    """

    def __init__(
        self, classifier: Classifier, block: InputBlock, labels: Tensor, targeted: bool
    ) -> None:
        self.classifier, self.block, self.space = classifier, block, Space([block])
        self.labels, self.targeted = labels, targeted
        self.found = block.original.clone()
        self.queries = torch.zeros(block.rows, dtype=torch.int64)
        self.open = torch.ones(block.rows, dtype=torch.bool)
        self.broken = torch.zeros(block.rows, dtype=torch.bool)
        self.success = torch.zeros(block.rows, dtype=torch.bool)

    @property
    def result(self) -> Tensor:
        """What fooled the classifier; the image as it stands where nothing did."""
        return torch.where(self.success.view(-1, 1, 1, 1), self.found, self.block.current)

    def ask(self, rows: Tensor, images: Tensor) -> Tensor:
        """The margins of these images, those of `rows`: one query each."""
        self.queries[rows] += 1
        margin = margins(self.classifier(images), self.labels[rows], self.targeted)
        broken = ~margin.isfinite()
        fooled = ~broken & (margin < 0)
        self.broken[rows[broken]] = True
        self.success[rows[fooled]] = True
        self.found[rows[fooled]] = images[fooled]
        self.open[rows[broken | fooled]] = False
        return margin

    def ask_current(self) -> None:
        """One query about each open image as it now stands."""
        rows = self.open.nonzero().squeeze(1)
        if len(rows):
            self.ask(rows, self.block.current[rows])

    def losses(self, probes: Sequence[Probe], batch: Any, perturbation: Perturbation) -> Losses:
        """An image that leaves has equal losses, so that it does not move. The weights are 1: the
        objective is the sum over images, whose gradient in one image is that image's own."""
        assert isinstance(perturbation, PerImage)
        values = torch.zeros(len(probes), self.block.rows, dtype=torch.float64)
        began = self.open.nonzero().squeeze(1)
        drawn: dict[Key, Tensor] = {}
        for number, probe in enumerate(probes):
            rows = began[self.open[began]]
            if not len(rows):
                break
            if probe.key not in drawn:
                keys = [probe.key.fold(lane=row) for row in began.tolist()]
                drawn[probe.key] = perturbation.directions(keys, self.block)
            u = drawn[probe.key][self.open[began]]
            images = self.block.at_rows(rows, u, probe.step)
            values[number, rows] = self.ask(rows, images)
        values[:, ~self.open] = 0.0
        self.forwards += len(probes)
        return Losses(values, torch.ones(self.block.rows, dtype=torch.float64))
