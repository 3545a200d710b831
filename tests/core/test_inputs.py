"""Images as a block: the grid, the budget, the rounding. Run: pytest tests/core/test_inputs.py"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zotune.core.inputs import Budget, InputBlock, Norm, on_grid
from zotune.core.noise import Key
from zotune.errors import BadInput


def images(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


@given(
    norm=st.sampled_from(["linf", "l2"]),
    radius=st.floats(1, 600),
    shape=st.tuples(*[st.integers(1, 4)] * 4),
    spread=st.sampled_from([0.3, 3.0, 100.0, 1e6]),
    seed=st.integers(0, 99),
)
def test_what_lies_inside_is_a_uint8_image_within_the_radius(
    norm: Norm, radius: float, shape: tuple[int, ...], spread: float, seed: int
) -> None:
    budget, original = Budget(norm, radius), images(seed, *shape)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    found = budget.inside(original, original + spread * noise)
    assert found.dtype == torch.uint8
    assert float(budget.sizes(original, found).max()) <= radius
    assert torch.equal(budget.inside(original, found.float()), found), "what is inside stays"


def test_a_small_even_perturbation_does_not_vanish_in_an_l2_budget() -> None:
    """All +-1 over 400 numbers has norm 20; cut to whole numbers after scaling it would be 0."""
    original = torch.full((1, 1, 20, 20), 100, dtype=torch.uint8)
    moved = Budget("l2", 10.0).inside(original, original.float() + 1)
    assert int((moved != original).sum()) == 100
    rows = (moved != original)[0, 0].sum(1)
    assert int(rows.max()) < 15, "the top of the image alone would be moved"


@given(step=st.floats(-3, 3), seed=st.integers(0, 50))
def test_a_step_is_rounded_to_one_of_the_two_levels_beside_it(step: float, seed: int) -> None:
    original = torch.full((1, 1, 8, 8), 100, dtype=torch.uint8)
    block = InputBlock.of(original, Budget("linf", 50))
    block.move_(0, 1, torch.full((1, 1, 8, 8), step), Key(seed))
    moved = 100 - block.current.double()
    low = torch.tensor(step).floor().double()
    assert bool(((moved == low) | (moved == low + 1)).all())


def test_steps_are_rounded_to_the_mean_of_the_step() -> None:
    original = torch.full((100, 1, 10, 10), 100, dtype=torch.uint8)
    block = InputBlock.of(original, Budget("linf", 50))
    block.move_(0, 100, torch.full((100, 1, 10, 10), 0.3), Key(0))
    # 10,000 draws of variance 0.21: four standard errors are 0.018.
    assert float((100 - block.current.double()).mean()) == pytest.approx(0.3, abs=0.018)


def test_an_image_is_rounded_alike_in_whatever_batch_it_comes() -> None:
    whole = InputBlock.of(images(0, 5, 2, 3, 3), Budget("linf", 9))
    alone = InputBlock.of(whole.original[3:4], Budget("linf", 9), first=3)
    step = torch.rand(5, 2, 3, 3, generator=torch.Generator().manual_seed(1)) * 4
    whole.move_(0, 5, step, Key(4))
    alone.move_(0, 1, step[3:4], Key(4))
    assert torch.equal(whole.current[3:4], alone.current)


def test_probes_write_nothing_and_state_comes_back() -> None:
    block = InputBlock.of(images(0, 2, 1, 3, 3), Budget("l2", 20.0))
    before = block.state().clone()
    probed = block.at(torch.full((2, 1, 3, 3), 5.0), 1.0)
    assert torch.equal(block.current, before)
    assert not torch.equal(probed, before)
    block.load_(probed)
    assert torch.equal(block.value(), probed)


def test_images_do_not_decay() -> None:
    with pytest.raises(BadInput, match="weight_decay"):
        InputBlock.of(images(0, 1, 1, 2, 2), Budget()).decay_(0.1, Key(0))


@given(seed=st.integers(0, 50))
def test_floats_on_the_grid_are_the_uint8_images_they_show(seed: int) -> None:
    shown = images(seed, 2, 3, 4, 4)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(on_grid(shown.to(dtype) / 255), shown)
    assert torch.equal(on_grid(shown.numpy()), shown)


OFF = torch.zeros(3, 1, 2, 2)
OFF[1, 0, 0, 0] = 0.5


@pytest.mark.parametrize(("given", "told"), [
    (OFF, "image 1 is not on the uint8 grid"),
    (OFF * 0 - 1, "image 0 is not on the uint8 grid"),
    (OFF * torch.nan, "image 0 is not on the uint8 grid"),
    (torch.zeros(2, 3, 3), "want .images, channels, height, width."),
    (torch.zeros(0, 1, 2, 2), "at least one"),
    (torch.zeros(1, 1, 2, 2, dtype=torch.int64), "want uint8"),
])  # fmt: skip
def test_images_off_the_grid_are_refused(given: Tensor, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        on_grid(given)


@pytest.mark.parametrize("radius", [0.0, 0.99, float("inf"), float("nan"), -3.0])
def test_a_budget_that_holds_one_image_only_is_refused(radius: float) -> None:
    with pytest.raises(BadInput, match="want at least 1/255"):
        Budget("linf", radius)
