"""Directions for images. Run: pytest tests/core/test_image_laws.py"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zotune.core import nouns
from zotune.core.block import FloatBlock
from zotune.core.grid import Grid
from zotune.core.image_laws import PerImage, Square, Tiled
from zotune.core.inputs import Budget, InputBlock
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian, Perturbation, Rademacher, Sphere
from zotune.errors import BadInput

LAWS: list[Perturbation] = [
    Gaussian(), Grid(3.0), Grid(200.0), Grid(2.0, density=0.3), Sphere(),
    Tiled(Rademacher(), 3), Square(Grid(4.0), 0.2), Square(Gaussian(), 1.0),
]  # fmt: skip


def block(images: int = 4, channels: int = 3, side: int = 7, first: int = 0) -> InputBlock:
    original = torch.zeros(images, channels, side, side, dtype=torch.uint8)
    return InputBlock.of(original, Budget("linf", 9), first)


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_drawing_lanes_together_is_drawing_each(law: Perturbation) -> None:
    image = FloatBlock.of("images", torch.empty(3, 7, 7))
    keys = [Key(5, step=2).fold(query=j, lane=b) for j in range(2) for b in (0, 3, 9)]
    together = law.draw_lanes(keys, image)
    assert torch.equal(together, torch.stack([law.draw(key, image) for key in keys]))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_a_direction_moves_its_own_image_alone(law: Perturbation) -> None:
    u = PerImage(law).draw(Key(0).fold(lane=2), block())
    assert bool(u[2].any())
    assert not bool(u[[0, 1, 3]].any())


@given(rows=st.tuples(st.integers(0, 4), st.integers(0, 4)), seed=st.integers(0, 20))
def test_combining_is_the_sum_of_the_directions(rows: tuple[int, int], seed: int) -> None:
    start, stop = min(rows), max(rows)
    law, images = PerImage(Square(Grid(2.0), 0.3)), block()
    keys = [Key(seed).fold(query=j, lane=b) for j in range(2) for b in range(4)]
    weights = [0.5, 0.0, -2.0, 1.0, 1.0, 0.0, 0.25, -1.0]
    wanted = sum(c * law.draw(k, images) for k, c in zip(keys, weights, strict=True))
    assert isinstance(wanted, torch.Tensor)
    found = law.combine(keys, weights, images, start, stop)
    assert torch.equal(found, wanted[start:stop])


def test_an_image_has_its_directions_in_whatever_batch_it_comes() -> None:
    whole = PerImage(Gaussian()).draw(Key(1).fold(lane=3), block())
    alone = PerImage(Gaussian()).draw(Key(1).fold(lane=0), block(images=1, first=3))
    assert torch.equal(whole[3], alone[0])


@given(
    height=st.integers(1, 9), width=st.integers(1, 9), share=st.floats(0.01, 1),
    step=st.integers(0, 99),
)  # fmt: skip
def test_a_window_is_a_square_of_its_share_inside_the_image(
    height: int, width: int, share: float, step: int
) -> None:
    image = FloatBlock.of("images", torch.empty(2, height, width))
    u = Square(Rademacher(), share, halving=10).draw(Key(0, step=step), image)
    rows, columns = u[0].any(1), u[0].any(0)
    area = share * height * width * 0.5 ** (step / 10)
    side = max(1, min(height, width, round(area**0.5)))
    assert (int(rows.sum()), int(columns.sum())) == (side, side)
    assert int((u[0] != 0).sum()) == side * side
    assert len(u[0][u[0] != 0].unique()) == 1


def test_windows_fall_everywhere() -> None:
    image = FloatBlock.of("images", torch.empty(1, 5, 5))
    law = Square(Rademacher(), 0.04)
    hits = sum((law.draw(Key(0, query=j), image) != 0).double() for j in range(500))
    assert isinstance(hits, torch.Tensor)
    # 500 windows of one pixel, 20 expected each with deviation 4.4: five deviations.
    assert bool(((hits - 20).abs() < 22).all())
    assert bool((hits > 0).all())


def test_tiles_have_one_colour_and_cut_off_edges() -> None:
    image = FloatBlock.of("images", torch.empty(1, 5, 7))
    u = Tiled(Gaussian(), 3).draw(Key(0), image)[0]
    for top in (0, 3):
        for left in (0, 3, 6):
            assert len(u[top : top + 3, left : left + 3].unique()) == 1
    assert len(u.unique()) == 6


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_a_law_is_rebuilt_from_its_repr(law: Perturbation) -> None:
    made = PerImage(law)
    assert eval(repr(made), {name: getattr(nouns, name) for name in nouns.__all__}) == made


@pytest.mark.parametrize("make", [
    lambda: Square(share=0.0), lambda: Square(share=1.1), lambda: Square(halving=0),
    lambda: Tiled(side=0),
])  # fmt: skip
def test_shapes_of_nothing_are_refused(make: object) -> None:
    with pytest.raises(BadInput, match="want"):
        make()  # type: ignore[operator]
