"""Perturbations: one direction, however it is asked for.

Run: pytest tests/core/test_perturbations.py
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import float_block, perturbations

from zotune.core import nouns
from zotune.core.block import CodeBlock, Owner
from zotune.core.grid import Grid, Rounded
from zotune.core.low_rank import LowRank
from zotune.core.noise import Key, draw
from zotune.core.perturbation import (
    Gaussian,
    Perturbation,
    Rademacher,
    Sparse,
    Sphere,
    Uniform,
)
from zotune.errors import BadInput
from zotune.quant import QuantLinear, Scheme

LAWS = [*perturbations(), LowRank(3), Sparse(0.5), Grid(2.0), Grid(3.0, density=0.5), Rounded(8)]
ISOTROPIC = [Gaussian(), Rademacher(), Uniform(), Sphere(), Sparse(0.5), LowRank(1), LowRank(3)]
law_of = st.sampled_from(LAWS)
shape_of = st.lists(st.integers(1, 40), min_size=0, max_size=3).map(tuple)


def test_every_law_is_listed_and_is_rebuilt_from_its_repr() -> None:
    names = {type(p).__name__ for p in perturbations()}
    assert names == {
        "Gaussian", "Rademacher", "Uniform", "Sphere", "Sparse", "LowRank", "Grid", "Rounded",
    }  # fmt: skip
    for law in LAWS:
        assert eval(repr(law), vars(nouns).copy()) == law


@given(law=law_of, shape=shape_of, cut=st.integers(0, 40), lane=st.integers(0, 3))
def test_runs_of_rows_are_rows_of_the_whole(
    law: Perturbation, shape: tuple[int, ...], cut: int, lane: int
) -> None:
    block = float_block("w", *shape)
    key = Key(1, step=2, lane=lane)
    whole = law.draw(key, block)
    assert whole.shape == shape
    assert whole.dtype == torch.float32
    if shape:
        cut = min(cut, shape[0])
        parts = [law.draw(key, block, 0, cut), law.draw(key, block, cut, shape[0])]
        assert torch.allclose(torch.cat(parts), whole, rtol=1e-6, atol=1e-6)
        rows = [shape[0] - 1, 0, cut % shape[0]]
        assert torch.allclose(law.draw_rows(key, block, rows), whole[rows], rtol=1e-6, atol=1e-6)


@given(law=law_of, shape=shape_of)
def test_a_displacement_is_the_direction_as_it_is_drawn(
    law: Perturbation, shape: tuple[int, ...]
) -> None:
    block, key = float_block("w", *shape), Key(1, step=2)
    u = law.displacement(key, block)
    assert u.dtype == (torch.int8 if isinstance(law, Grid) else torch.float32)
    assert torch.equal(u.float(), law.draw(key, block))


@given(radius=st.sampled_from((1.0, 3.7, 127.0, 128.0, 500.0)), density=st.sampled_from((1.0, 0.3)),
       relative=st.booleans())  # fmt: skip
def test_grid_directions_are_the_published_uniforms_whatever_their_dtype(
    radius: float, density: float, relative: bool
) -> None:
    """Few codes or many, one M for all or one per row: a restatement in float32."""
    layer = QuantLinear(33, 7, Scheme.parse("int8-channel"))
    layer.scale.copy_(torch.logspace(-4, -1, 7).view(7, 1))
    block = CodeBlock.of("w", Owner("w", layer, "codes"))
    key, name = Key(1, step=2), block.name
    most = torch.tensor(radius // 1)
    if not relative:
        most = (radius * 1e-3 / layer.scale).floor().clamp_min(1.0)
    law = Grid(radius if relative else radius * 1e-3, relative, density)
    uniform = draw("uniform", key, name, 0, block.numel).view(block.shape) * 0.5 + 0.5
    moved = draw("uniform", key, f"{name}#mask", 0, block.numel).view(block.shape) * 0.5 + 0.5
    truth = ((uniform * (2 * most + 1)).floor() - most) * (moved < density)
    assert torch.equal(law.draw(key, block), truth)
    assert torch.equal(law.displacement(key, block).float(), truth)


@given(law=law_of, shape=shape_of, lanes=st.integers(1, 5))
def test_lanes_drawn_at_once_are_the_lanes_drawn_alone(
    law: Perturbation, shape: tuple[int, ...], lanes: int
) -> None:
    block = float_block("w", *shape)
    keys = [Key(1, lane=b) for b in range(lanes)]
    together = law.draw_lanes(keys, block)
    assert together.shape == (lanes, *shape)
    for lane, key in zip(together, keys, strict=True):
        assert torch.equal(lane, law.draw(key, block))


@given(law=law_of.filter(lambda p: not isinstance(p, Rounded)), shape=shape_of,
       coefficients=st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=4),
       cut=st.integers(0, 40))  # fmt: skip
def test_the_combination_is_made_of_the_directions_that_were_probed(
    law: Perturbation, shape: tuple[int, ...], coefficients: list[float], cut: int
) -> None:
    block = float_block("w", *shape)
    keys = [Key(3, step=1, query=j) for j in range(len(coefficients))]
    drawn = [c * law.draw(k, block).double() for k, c in zip(keys, coefficients, strict=True)]
    truth = torch.stack(drawn).sum(0)
    cut = min(cut, block.rows)
    runs = [(0, cut), (cut, block.rows)] if shape else [(0, 1)]
    parts = [law.combine(keys, coefficients, block, a, b) for a, b in runs]
    total = torch.cat(parts) if shape else parts[0]
    assert total.shape == shape
    size = sum(abs(c) for c in coefficients) * 8
    assert torch.allclose(total.double(), truth, rtol=0, atol=1e-6 * size + 1e-12)


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_blocks_of_equal_shape_get_unequal_directions(law: Perturbation) -> None:
    a, b = (law.draw(Key(0), float_block(name, 60, 70)).flatten() for name in "ab")
    # A product of few factors varies more than independent elements do.
    spread = 5 / math.sqrt(4200) * (1 if not isinstance(law, LowRank) else 60 / law.rank)
    assert abs(float(a @ b / (a.norm() * b.norm()))) < spread
    assert not torch.equal(a, b)


@pytest.mark.parametrize("law", ISOTROPIC, ids=repr)
def test_the_covariance_is_the_identity(law: Perturbation) -> None:
    n, block = 6000, float_block("w", 4, 5)
    u = law.draw_lanes([Key(2, lane=i) for i in range(n)], block).double().view(n, -1)
    covariance = u.mT @ u / n
    # Each entry within five of its own standard errors.
    error = (u.unsqueeze(2) * u.unsqueeze(1)).std(0) / math.sqrt(n)
    assert bool(((covariance - torch.eye(20)).abs() <= 5 * error + 1e-9).all())
    assert bool((u.mean(0).abs() <= 5 * u.std(0) / math.sqrt(n)).all())


def test_sphere_lies_on_the_sphere_and_sparse_moves_its_share() -> None:
    block = float_block("w", 100, 50)
    assert float(Sphere().draw(Key(1), block).norm()) == pytest.approx(math.sqrt(5000), rel=1e-6)
    moved = (Sparse(0.2).draw(Key(1), block) != 0).float().mean()
    assert abs(float(moved) - 0.2) < 5 * math.sqrt(0.2 * 0.8 / 5000)


@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_directions_have_the_rank_and_vectors_stay_dense(rank: int) -> None:
    u = LowRank(rank).draw(Key(1), float_block("w", 30, 20))
    assert int(torch.linalg.matrix_rank(u)) == rank
    bias = float_block("b", 30)
    assert torch.equal(LowRank(rank).draw(Key(1), bias), Gaussian().draw(Key(1), bias))


@given(radius=st.integers(1, 9), density=st.sampled_from((1.0, 0.3)))
@settings(max_examples=12)
def test_grid_directions_are_uniform_on_whole_codes(radius: int, density: float) -> None:
    n = 40_000
    u = Grid(radius, density=density).draw(Key(radius), float_block("w", 200, 200)).flatten()
    assert torch.equal(u, u.round())
    counts = torch.bincount((u + radius).long(), minlength=2 * radius + 1).double() / n
    assert len(counts) == 2 * radius + 1
    expected = torch.full_like(counts, density / (2 * radius + 1))
    expected[radius] += 1 - density
    assert bool(((counts - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt()).all())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounded_directions_lie_on_their_grid_and_average_to_the_gaussian(bits: int) -> None:
    k, half = 2.0 ** (bits - 1) / 4, 2 ** (bits - 1)
    block = float_block("w", 300, 30)
    u = Rounded(bits).draw(Key(1), block)
    assert torch.equal(u * k, (u * k).round())
    assert float((u * k).min()) >= -half
    assert float((u * k).max()) <= half - 1
    inside = Gaussian().draw(Key(1), block)
    inside_range = (inside * k < half - 1) & (inside * k > -half)
    error = (u - inside)[inside_range]
    # One independent rounding per element: error within one grid step, mean zero.
    assert float(error.abs().max()) <= 1 / k * (1 + 1e-6)
    assert abs(float(error.mean())) < 5 * float(error.std()) / math.sqrt(len(error))


def test_impossible_laws_are_refused_with_what_is_wanted() -> None:
    for make in (
        lambda: Sparse(0.0), lambda: Sparse(1.5), lambda: LowRank(0), lambda: Grid(0.0),
        lambda: Grid(1.0, density=0.0), lambda: Rounded(1), lambda: Rounded(9),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=r"want|bits"):
            make()
    with pytest.raises(BadInput, match="no grid"):
        Grid(0.1, relative=False).draw(Key(0), float_block("w", 3, 3))
