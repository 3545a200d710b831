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

Draw = Callable[[str, str, int], Tensor]
"""draw(law, name, n): n numbers that are a function of the example and of when it is seen."""
WEIGHTINGS = {
    "none": lambda s: 1.0,
    "sigma-sqrt": lambda s: s**-2,
    "cosmap": lambda s: 2 / (math.pi * (1 - 2 * s + 2 * s * s)),
}


@dataclass(frozen=True, eq=False)
class Noised:
    """An image with noise in it: tensors of the image's shape, the time, and the loss's weight."""

    noisy: Tensor
    target: Tensor
    timestep: Tensor
    weight: float


class Noising(ABC):
    """A schedule of noise over places in [0, 1)."""

    @abstractmethod
    def place(self, draw: Draw) -> float:
        """Where a training example is looked at."""

    @abstractmethod
    def at(self, x: Tensor, noise: Tensor, place: float) -> Noised:
        """The image with noise as strong as it is at a place."""


@dataclass(frozen=True, eq=False)
class Diffused(Noising):
    """Diffusion with the scheduler's `alphas` (T,), float64, the products called a_t above."""

    alphas: Tensor
    prediction: str

    def place(self, draw: Draw) -> float:
        return float(draw("uniform", "timestep", 1)) / 2 + 0.5

    def at(self, x: Tensor, noise: Tensor, place: float) -> Noised:
        t = index(place, len(self.alphas))
        a, s = float(self.alphas[t].sqrt()), float((1 - self.alphas[t]).sqrt())
        targets = {"epsilon": noise, "sample": x, "v_prediction": a * noise - s * x}
        return Noised(a * x + s * noise, targets[self.prediction], torch.tensor(t), 1.0)


@dataclass(frozen=True, eq=False)
class Flow(Noising):
    """Flow matching with the scheduler's `sigmas` and `timesteps`, both (N,), noisiest first.

    density: "logit-normal" places examples at sigmoid(N(0, 1)), "uniform" anywhere.
    """

    sigmas: Tensor
    timesteps: Tensor
    density: str
    weighting: str

    def place(self, draw: Draw) -> float:
        if self.density == "uniform":
            return float(draw("uniform", "timestep", 1)) / 2 + 0.5
        return float(draw("gaussian", "timestep", 1).sigmoid())

    def at(self, x: Tensor, noise: Tensor, place: float) -> Noised:
        i = index(place, len(self.sigmas))
        s = float(self.sigmas[i])
        weight = WEIGHTINGS[self.weighting](s)
        return Noised((1 - s) * x + s * noise, noise - x, self.timesteps[i], weight)


def index(place: float, count: int) -> int:
    """Which of `count` equal parts of [0, 1) a place lies in.

    >>> index(0.0, 4), index(0.49, 4), index(1.0, 4)
    (0, 1, 3)
    """
    return min(int(place * count), count - 1)


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
