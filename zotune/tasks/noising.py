"""Noise put into images, and what a denoiser should make of it.

Diffusion (Ho et al. 2020, arXiv 2006.11239; v: Salimans and Ho 2022, arXiv 2202.00512):

    x_t = sqrt(a_t) x + sqrt(1 - a_t) e,    target e,  x,  or  v = sqrt(a_t) e - sqrt(1 - a_t) x

Flow matching (Esser et al. 2024, arXiv 2403.03206; diffusers' SD3 training script):

    x_s = (1 - s) x + s e,    target e - x,    loss weighted by 1, s^-2 or 2 / (pi (1 - 2s + 2s^2))
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zotune.errors import BadInput
from zotune.tasks.task import Draw

WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.ones_like,
    "sigma-sqrt": lambda s: s**-2,
    "cosmap": lambda s: 2 / (math.pi * (1 - 2 * s + 2 * s * s)),
}


@dataclass(frozen=True, eq=False)
class Noised:
    """Images with noise in them: (n, ...) `noisy` and `target`, (n,) `timestep` and `weight`."""

    noisy: Tensor
    target: Tensor
    timestep: Tensor
    weight: Tensor


class Noising(ABC):
    """A schedule of noise over places in [0, 1)."""

    @abstractmethod
    def places(self, draw: Draw, n: int) -> Tensor:
        """Where n training examples are looked at, (n,)."""

    @abstractmethod
    def at(self, x: Tensor, noise: Tensor, places: Tensor) -> Noised:
        """The images x (n, ...) with noise as strong as it is at their places."""


@dataclass(frozen=True, eq=False)
class Diffused(Noising):
    """Diffusion with the scheduler's `alphas` (T,), float64, the products called a_t above."""

    alphas: Tensor
    prediction: str

    def places(self, draw: Draw, n: int) -> Tensor:
        return draw("timestep", n)

    def at(self, x: Tensor, noise: Tensor, places: Tensor) -> Noised:
        t = indices(places, len(self.alphas))
        a, s = (beside(v.sqrt(), x) for v in (self.alphas[t], 1 - self.alphas[t]))
        targets = {"epsilon": noise, "sample": x, "v_prediction": a * noise - s * x}
        return Noised(a * x + s * noise, targets[self.prediction], t, torch.ones(len(x)))


@dataclass(frozen=True, eq=False)
class Flow(Noising):
    """Flow matching with the scheduler's `sigmas` (N,), float64, and `timesteps` (N,), noisiest
    first.

    density: "logit-normal" places examples at sigmoid(N(0, 1)), "uniform" anywhere.
    """

    sigmas: Tensor
    timesteps: Tensor
    density: str
    weighting: str

    def places(self, draw: Draw, n: int) -> Tensor:
        if self.density == "uniform":
            return draw("timestep", n)
        return draw("timestep", n, normal=True).sigmoid()

    def at(self, x: Tensor, noise: Tensor, places: Tensor) -> Noised:
        i = indices(places, len(self.sigmas))
        s = beside(self.sigmas[i], x)
        weight = WEIGHTINGS[self.weighting](self.sigmas[i]).float()
        return Noised((1 - s) * x + s * noise, noise - x, self.timesteps[i], weight)


def indices(places: Tensor, count: int) -> Tensor:
    """Which of `count` equal parts of [0, 1) each place lies in.

    >>> indices(torch.tensor([0.0, 0.49, 1.0]), 4).tolist()
    [0, 1, 3]
    """
    return (places * count).long().clamp_max(count - 1)


def beside(values: Tensor, x: Tensor) -> Tensor:
    """One value per example, (n,), in x's dtype and shaped to be multiplied with x (n, ...)."""
    return values.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def noising(scheduler: Any, density: str, weighting: str) -> Noising:
    """The schedule of a diffusers scheduler.

    Raises:
        BadInput: an option or a kind of scheduler that is not known.
    """
    if density not in ("logit-normal", "uniform"):
        raise BadInput(f"timesteps={density!r}; want 'logit-normal' or 'uniform'")
    if weighting not in WEIGHTINGS:
        raise BadInput(f"weighting={weighting!r}; want one of {', '.join(WEIGHTINGS)}")
    name, config = type(scheduler).__name__, scheduler.config
    if name == "FlowMatchEulerDiscreteScheduler":
        count = config.num_train_timesteps  # behind them lies the end, sigma 0
        return Flow(scheduler.sigmas[:count].double(), scheduler.timesteps, density, weighting)
    prediction = config.get("prediction_type", "epsilon")
    if not hasattr(scheduler, "alphas_cumprod") or prediction not in (
        "epsilon", "sample", "v_prediction"
    ):  # fmt: skip
        raise BadInput(
            f"scheduler {name} (prediction_type={prediction!r}) is not trained with; use one with "
            "alphas_cumprod that predicts epsilon, sample or v_prediction, or "
            "FlowMatchEulerDiscreteScheduler"
        )
    return Diffused(scheduler.alphas_cumprod.double(), prediction)
