"""Normalisation layers: their gains and biases, or what new data shift them by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from zotune.core.block import FloatBlock, Owner
from zotune.core.space import Observe, Space, SpaceSpec, matching
from zotune.core.spaces.parameters import blocks_of, is_norm
from zotune.errors import BadInput
from zotune.models.adapter import CHILD, attach
from zotune.models.shift import Shift, measuring, norms_of, shifts

SHIFT_EXAMPLES: Final = 4096  # training examples that statistics are measured on, at most


@dataclass(frozen=True)
class Norms(SpaceSpec):
    """Gains and biases of normalisation layers.

    basis="shift" is for batch norms under images of another kind than the network was trained on:
    forward passes over training examples, whose labels are not looked at, measure what flows into
    each norm now, and two numbers a layer are tuned: how far to go from the statistics it came
    with to those, for the mean and for the standard deviation. Both begin at `share`; 1 is AdaBN
    (Li et al. 2016, arXiv 1603.04779), and `lr=0` leaves them there. The end is folded into gains
    and biases.
    """

    pattern: str | None = None
    basis: str | None = None
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.basis not in (None, "shift"):
            raise BadInput(f"basis={self.basis!r}; want 'shift', or none for gains and biases")
        if not -1 <= self.share <= 2:
            raise BadInput(f"share={self.share}; want 0 (as it came) to 1 (the new statistics)")

    def build(self, model: nn.Module, observe: Observe | None = None) -> Space:
        if self.basis is None:
            return blocks_of(model, self, is_norm, self.pattern, "norms")
        found = norms_of(model)
        if not found:
            raise BadInput(
                "norms(basis='shift') moves batch norms with running statistics, and this model "
                "has none (folded into convolutions, or norms of another kind); use norms"
            )
        wanted = matching([path for path, _ in found], self.pattern)
        held = {path for path, _, _ in shifts(model)}
        self._attach(model, [n for path, n in found if wanted(path) and path not in held], observe)
        return Space(
            FloatBlock.of(f"{path}.share", shift.share, [_owner(path, shift)], **self.options)
            for path, _, shift in shifts(model)
            if wanted(path)
        )

    def _attach(self, model: nn.Module, norms: list[_BatchNorm], observe: Observe | None) -> None:
        if not norms:
            return
        if observe is None:
            raise BadInput("norms(basis='shift') measures activations: it needs `observe`")
        with measuring(norms) as statistics:
            observe(model, None, SHIFT_EXAMPLES)
        for norm, (mean, variance) in zip(norms, statistics, strict=True):
            attach(norm, Shift.of(norm, mean, variance, self.share))


def _owner(path: str, shift: Shift) -> Owner:
    return Owner(f"{path}.{CHILD}", shift, "share")
