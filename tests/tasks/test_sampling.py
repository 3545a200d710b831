"""Sampling with denoisers whose answer is known. Run: pytest tests/tasks/test_sampling.py"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from zotune.core.noise import Key
from zotune.errors import BadInput
from zotune.models.conditioning import Canvas
from zotune.tasks.sampling import Sampler, Sampling, sampler_of
from zotune.training.batches import drawing

DRAW = drawing(Key(0))
SHAPE = (1, 4, 4)
IMAGE = torch.arange(16).view(SHAPE) * 17  # 0, 17, ..., 255
CLEAN = IMAGE / 127.5 - 1


class Knowing(nn.Module):
    """Knows the image, which `states` raises: what it says is right for that image."""

    def __init__(self, scheduler: Any, states: float = 0.0) -> None:
        super().__init__()
        self.scheduler, self.asked = scheduler, list[int]()

    def forward(self, x: Tensor, timestep: Tensor, return_dict: bool, **known: Tensor) -> Any:
        self.asked.append(len(x))
        target = CLEAN + (known["states"].view(-1, 1, 1, 1) if known else 0.0)
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            sigma = (timestep / 1000).view(-1, 1, 1, 1)
            return ((x - target) / sigma,)
        a = self.scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        return ((x - a.sqrt() * target) / (1 - a).sqrt(),)


def noise(i: int) -> Tensor:
    return DRAW(f"sample {i}", 16, normal=True).view(SHAPE)


def images(scheduler: Any, known: list[dict[str, Tensor]], **sampling: Any) -> tuple[Tensor, Any]:
    model = Knowing(scheduler)
    blank = {"states": torch.tensor(0.0)} if known[0] else {}
    sampler = Sampler(scheduler, Canvas(None, SHAPE, 1, (4, 4)), blank, Sampling(**sampling))
    return sampler.images(model, known, noise, batch_size=2), model


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize(
    "scheduler",
    [DDPMScheduler(), DDIMScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0)],
    ids=lambda s: type(s).__name__,
)
def test_who_knows_the_image_arrives_at_it_from_any_noise(scheduler: Any, steps: int) -> None:
    found, model = images(scheduler, [{}], count=3, steps=steps)
    assert model.asked == [2] * steps + [1] * steps
    assert found.dtype == torch.uint8
    assert (found.int() - IMAGE.int()).abs().max() <= 1


def test_captions_go_in_turn_and_guidance_pushes_them() -> None:
    """Guidance g moves the answer from the blank one by g times the caption's difference."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    known = [{"states": torch.tensor(-0.1)}, {"states": torch.tensor(-0.2)}]
    plain, _ = images(scheduler, known, count=3, steps=4)
    pushed, model = images(scheduler, known, count=3, steps=4, guidance=2.0)
    for k, (once, twice) in enumerate(zip(plain, pushed, strict=True)):
        state = -0.1 if k % 2 == 0 else -0.2
        for found, factor in ((once, 1), (twice, 2)):
            wanted = ((CLEAN + factor * state).clamp(-1, 1) + 1) * 127.5
            assert (found - wanted).abs().max() <= 1.01
    assert len(model.asked) == 2 * 2 * 4


def test_what_makes_no_set_of_samples_is_refused() -> None:
    with pytest.raises(BadInput, match="samples=1"):
        Sampling(count=1)
    with pytest.raises(BadInput, match="sample_steps=0"):
        Sampling(steps=0)
    with pytest.raises(BadInput, match="use_dynamic_shifting"):
        sampler_of(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
