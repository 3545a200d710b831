"""Images from noise: a denoiser run backwards in time by its scheduler, without further noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.models.conditioning import Canvas, Conditions
from zotune.tasks.task import device_of

Noise = Callable[[int], Tensor]
"""noise(i): where image i starts, float32 of the latents' shape."""


@dataclass(frozen=True)
class Sampling:
    """How an evaluation makes images: `count` of them (0: none) in `steps` steps, the captions'
    part of the output multiplied by `guidance` (classifier-free, Ho and Salimans 2022, arXiv
    2207.12598; 1: as it is)."""

    count: int = 16
    steps: int = 20
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.count < 0 or self.count == 1 or self.steps < 1:
            raise BadInput(
                f"samples={self.count}, sample_steps={self.steps}; want 0 or at least 2 samples, "
                "in at least 1 step"
            )


@dataclass(frozen=True, eq=False)
class Sampler:
    """Makes a pipeline's images: its scheduler and canvas, and the conditions of no caption."""

    scheduler: Any
    canvas: Canvas
    blank: Conditions
    sampling: Sampling

    @torch.no_grad()
    def images(
        self, model: nn.Module, known: Sequence[Conditions], noise: Noise, batch_size: int
    ) -> Tensor:
        """uint8 images (count, channels, height, width), with the conditions in turn."""
        device, count, made = device_of(model), self.sampling.count, []
        for start in range(0, count, batch_size):
            numbers = range(start, min(start + batch_size, count))
            x = torch.stack([noise(i) for i in numbers]).to(device)
            each = [known[i % len(known)] for i in numbers]
            stacked = {k: torch.stack([c[k] for c in each]).to(device) for k in self.blank}
            made.append(self.canvas.pixels(self._latents(partial(self._made, model, stacked), x)))
        return torch.cat(made)

    def _latents(self, denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        sampler = sampler_of(self.scheduler)
        sampler.set_timesteps(self.sampling.steps, device=x.device)
        for t in sampler.timesteps:
            x = sampler.step(denoise(x, t.expand(len(x))), t, x).prev_sample
        return x

    def _made(self, model: nn.Module, known: Conditions, x: Tensor, t: Tensor) -> Tensor:
        made, guidance = run(model, x, t, known), self.sampling.guidance
        if guidance == 1 or not known:
            return made
        blank = {k: v.to(x.device).expand(len(x), *v.shape) for k, v in self.blank.items()}
        plain = run(model, x, t, blank)
        return plain + guidance * (made - plain)


def sampler_of(scheduler: Any) -> Any:
    """A fresh deterministic sampler for models trained with `scheduler`: Euler for flow matching,
    DDIM with eta = 0 (Song et al. 2021, arXiv 2010.02502) for diffusion.

    Raises:
        BadInput: the scheduler's times go by the size of the image.
    """
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    if flow and scheduler.config.get("use_dynamic_shifting"):
        raise BadInput(
            "schedulers with use_dynamic_shifting are not read; set it to false in "
            "scheduler_config.json"
        )
    return (type(scheduler) if flow else DDIMScheduler).from_config(scheduler.config)


def run(model: Any, noisy: Tensor, timestep: Tensor, known: Conditions) -> Tensor:
    """What the denoiser says, float32; it gets its inputs in its own dtype."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), noisy.dtype)
    inputs = {name: tensor.to(dtype) for name, tensor in known.items()}
    made: Tensor = model(noisy.to(dtype), timestep=timestep, **inputs, return_dict=False)[0]
    return made.float()
