"""Sparse-MeZO: only weights of small magnitude are probed and moved."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zotune.core.block import Block, FloatBlock
from zotune.core.estimator import estimator
from zotune.core.method import Decay, Method, Schedule, Units
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian, Perturbation
from zotune.core.space import Space
from zotune.errors import BadInput
from zotune.methods import method


@dataclass(frozen=True)
class Small(Perturbation):
    """u = m z, z ~ N(0, I), m = 1 where |theta| <= h: h is the quantile `share` of a block's
    magnitudes before training, m is that of theta as it stands. E[u u^T] = diag(m).

    theta stands still from a step's first probe until a row is moved, so the directions probed
    and stepped along have one mask; those of earlier steps cannot be drawn again. A block whose
    h is 0 (a bias at zero) would be frozen by its first move: it is tuned as a whole.
    """

    share: float = 0.75

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise BadInput(f"share={self.share}; want 0 < share <= 1")

    def check(self, space: Space) -> None:
        for block in space.probed:
            if not isinstance(block, FloatBlock):
                raise BadInput(
                    f"block {block.name!r} holds integer codes, whose size is no weight's "
                    "magnitude; tune 'weights' or 'head'"
                )

    def notes(self, space: Space) -> list[str]:
        whole = [b.name for b in space.probed if b.memory["threshold"] == math.inf]
        return [f"tuned as a whole, being zero: {', '.join(whole)}"] if whole else []

    def state(self, block: Block) -> dict[str, Tensor]:
        magnitudes = block.value().abs().flatten()
        rank = max(1, math.ceil(self.share * magnitudes.numel()))
        threshold = float(magnitudes.kthvalue(rank).values) or math.inf
        return {"threshold": torch.tensor(threshold, device=block.device)}

    def draw(self, key: Key, block: Block, start: int = 0, stop: int | None = None) -> Tensor:
        stop = block.rows if stop is None else stop
        return Gaussian().draw(key, block, start, stop) * _mask(block, slice(start, stop))

    def draw_lanes(self, keys: Sequence[Key], block: Block) -> Tensor:
        return Gaussian().draw_lanes(keys, block) * _mask(block, slice(None))

    def draw_rows(self, key: Key, block: Block, rows: Sequence[int]) -> Tensor:
        return Gaussian().draw_rows(key, block, rows) * _mask(block, list(rows))

    def combine(
        self,
        keys: Sequence[Key],
        coefficients: Sequence[float],
        block: Block,
        start: int,
        stop: int,
    ) -> Tensor:
        g = Gaussian().combine(keys, coefficients, block, start, stop)
        return g * _mask(block, slice(start, stop))


def _mask(block: Block, rows: slice | list[int]) -> Tensor:
    value = block.value()
    return (value[rows] if block.shape else value).abs() <= block.memory["threshold"]


@method(
    paper="Sparse MeZO: Less Parameters for Better Performance in Zeroth-Order LLM Fine-Tuning",
    year=2024,
    arxiv="2402.15751",
    spaces=("weights", "head", "norms", "biases", "latents"),
    memory="4 bytes per tensor: its threshold",
)
def sparse_mezo(
    lr: float = 1e-6,
    eps: float = 1e-3,
    share: float = 0.75,
    queries: int = 1,
    schedule: Decay = "constant",
    warmup: int = 0,
    directions: str = "batch",
    units: Units = "absolute",
) -> Method:
    """MeZO on the weights of small magnitude, with a threshold for each tensor (Liu et al. 2024).

        m = [|theta| <= h],  h the quantile `share` of |theta| before training,  u = m z
        c = (L(theta + eps u) - L(theta - eps u)) / (2 eps),  theta <- theta - lr c u

    The mask is computed from the unperturbed weights and is stored nowhere; u is not normalised,
    as in the paper. A weight that grows beyond h stays from then on. There is no weight decay:
    it would move weights, and so the mask, between the probes and the step.

    Defaults: lr and eps are MeZO's; `share` lies in the paper's range of 0.5 to 0.8, read as the
    percentile below which weights are tuned. Changed: magnitudes, where its pseudo-code omits
    the |.|; tensors of zeros are tuned as a whole.

    >>> sparse_mezo(share=0.5).perturbation
    Small(share=0.5)
    """
    return Method(
        "sparse-mezo",
        estimator(directions, eps, queries),
        Small(share),
        lr=lr,
        schedule=Schedule(schedule, warmup),
        units=units,
    )
