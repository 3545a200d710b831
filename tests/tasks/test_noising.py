"""Noise schedules against diffusers' own, in float64. Run: pytest tests/tasks/test_noising.py"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from torch import Tensor

from zotune.core.noise import Key
from zotune.errors import BadInput
from zotune.tasks.noising import Flow, indices, noising
from zotune.training.batches import drawing

DRAW = drawing(Key(3))
X = DRAW("x", 6 * 48, normal=True).double().view(6, 3, 4, 4)
E = DRAW("e", 6 * 48, normal=True).double().view(6, 3, 4, 4)
PLACES = torch.tensor([0.0, 0.1234, 0.5, 0.77, 0.999, 1.0])


def close(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == wanted.dtype == torch.float64
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_diffusion_is_the_schedulers_own(prediction: str, schedule: str) -> None:
    scheduler: Any = DDPMScheduler(prediction_type=prediction, beta_schedule=schedule)
    found = noising(scheduler, "uniform", "none").at(X, E, PLACES)
    t = found.timestep
    assert t.tolist() == [0, 123, 500, 770, 999, 999]
    close(found.noisy, scheduler.add_noise(X, E, t))
    wanted = {"epsilon": E, "sample": X, "v_prediction": scheduler.get_velocity(X, E, t)}
    close(found.target, wanted[prediction])
    assert found.weight.tolist() == [1.0] * 6


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_is_the_schedulers_own(shift: float) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    found = noising(scheduler, "uniform", "none").at(X, E, PLACES)
    assert torch.equal(found.timestep, scheduler.timesteps[indices(PLACES, 1000)])
    wanted = scheduler.scale_noise(X, found.timestep, E)
    torch.testing.assert_close(found.noisy, wanted, atol=1e-6, rtol=1e-6)  # its sigmas are float32
    close(found.target, E - X)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("none", "none"), ("sigma-sqrt", "sigma_sqrt"), ("cosmap", "cosmap")]
)
def test_weights_are_those_of_the_reference_training(ours: str, theirs: str) -> None:
    schedule = noising(FlowMatchEulerDiscreteScheduler(), "uniform", ours)
    assert isinstance(schedule, Flow)
    weight = schedule.at(X, E, PLACES).weight
    sigmas = schedule.sigmas[indices(PLACES, 1000)].float()
    torch.testing.assert_close(weight, compute_loss_weighting_for_sd3(theirs, sigmas))


def test_places_have_the_density_of_the_reference_training() -> None:
    """Quantiles of 20,000 draws; the standard error of a quantile is below 0.006."""
    n, levels = 20_000, torch.linspace(0.05, 0.95, 19)
    generator = torch.Generator().manual_seed(0)
    for density, name in (("logit-normal", "logit_normal"), ("uniform", "none")):
        schedule = noising(FlowMatchEulerDiscreteScheduler(), density, "none")
        ours = schedule.places(DRAW, n)
        theirs = compute_density_for_timestep_sampling(name, n, 0.0, 1.0, generator=generator)
        assert ours.min() >= 0
        assert ours.max() <= 1
        assert (ours.quantile(levels) - theirs.quantile(levels)).abs().max() < 0.025


def test_what_is_not_known_is_refused() -> None:
    flow = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(BadInput, match="timesteps='mode'; want 'logit-normal' or 'uniform'"):
        noising(flow, "mode", "none")
    with pytest.raises(BadInput, match="weighting='snr'; want one of none, sigma-sqrt, cosmap"):
        noising(flow, "uniform", "snr")
    assert noising(EulerDiscreteScheduler(), "uniform", "none").at(X, E, PLACES).noisy.shape
    with pytest.raises(BadInput, match="prediction_type='flow'"):
        noising(type("Odd", (), {"config": {"prediction_type": "flow"}})(), "uniform", "none")
