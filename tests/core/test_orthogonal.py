"""Orthonormal bases and orthogonalization. Run: pytest tests/core/test_orthogonal.py"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from toys import float_block

from zotune.core.noise import Key
from zotune.core.orthogonal import basis, newton_schulz, orthonormal, room


@given(size=st.integers(1, 60), rank=st.integers(1, 60), seed=st.integers(0, 99))
def test_columns_are_orthonormal(size: int, rank: int, seed: int) -> None:
    rank = min(rank, size)
    q = orthonormal(Key(seed), "w", size, rank).double()
    assert torch.allclose(q.mT @ q, torch.eye(rank).double(), atol=1e-6)


def test_frames_prefer_no_direction_and_no_sign() -> None:
    """Moments of a uniform frame within five standard errors: E q = 0, E q q^T = I / n."""
    n, draws = 5, 4000
    q = torch.stack([orthonormal(Key(1, step=t), "w", n, 2) for t in range(draws)]).double()
    first, second = q[:, :, 0], q[:, :, 1]
    for x in (q.flatten(1), first[:, :, None] * second[:, None, :]):
        assert bool((x.mean(0).abs() <= 5 * x.std(0) / draws**0.5).all())
    square = first[:, :, None] * first[:, None, :]
    wanted = torch.eye(n) / n
    assert bool(((square.mean(0) - wanted).abs() <= 5 * square.std(0) / draws**0.5).all())


def test_another_key_or_name_is_another_basis() -> None:
    q = orthonormal(Key(1), "w", 8, 3)
    assert torch.equal(q, orthonormal(Key(1), "w", 8, 3))
    for key, name in ((Key(2), "w"), (Key(1, step=1), "w"), (Key(1), "v")):
        assert not torch.equal(q, orthonormal(key, name, 8, 3))


def test_a_kept_basis_is_the_one_that_would_be_drawn() -> None:
    block, bare = float_block("w", 6, 4, 3), float_block("w", 6, 4, 3)
    block.memory.update(room(block, "left", 2) | room(block, "right", 3))
    assert sum(t.numel() * t.element_size() for t in block.memory.values()) == 4 * (12 + 36) + 32
    for key in (Key(1), Key(1), Key(1, step=4), Key(2**62), Key(1)):
        for side, shape in (("left", (6, 2)), ("right", (12, 3))):
            found = basis(key, block, side, shape[1])  # type: ignore[arg-type]
            assert found.shape == shape
            assert torch.equal(found, basis(key, bare, side, shape[1]))  # type: ignore[arg-type]
    assert not bare.memory


def matrix(values: list[float], rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix with these singular values, and its polar factor."""
    rank = len(values)
    u = orthonormal(Key(seed), "u", rows, rank).double()
    v = orthonormal(Key(seed), "v", columns, rank).double()
    return u @ torch.diag(torch.tensor(values).double()) @ v.mT, u @ v.mT


@given(rows=st.integers(2, 30), columns=st.integers(2, 30), low=st.floats(0.02, 1),
       scale=st.sampled_from([1e-12, 1.0, 1e12]))  # fmt: skip
def test_singular_values_come_near_one_and_the_vectors_stay(
    rows: int, columns: int, low: float, scale: float
) -> None:
    rank = min(rows, columns)
    values = torch.linspace(low, 1, rank).tolist()
    g, polar = matrix(values, rows, columns)
    x = newton_schulz((g * scale).float()).double()
    assert x.shape == g.shape
    found = torch.linalg.svdvals(x)
    assert 0.68 < float(found[-1]) <= float(found[0]) < 1.21
    assert float((x - polar).norm()) < 0.33 * rank**0.5  # no singular vector has moved


def test_it_is_muons_iteration_in_float64() -> None:
    g = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    x = g.double() / g.double().norm()
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    assert torch.allclose(newton_schulz(g).double(), x, atol=1e-5)
    assert torch.allclose(newton_schulz(g.mT), newton_schulz(g).mT, atol=1e-6)
    assert torch.equal(newton_schulz(g.view(7, 3, 4)), newton_schulz(g).view(7, 3, 4))


@pytest.mark.parametrize("shape", [(), (5,), (1, 5), (5, 1), (1, 1)])
def test_what_has_one_row_or_column_is_divided_by_its_norm(shape: tuple[int, ...]) -> None:
    g = torch.full(shape, 3.0)
    assert float(newton_schulz(g).norm()) == pytest.approx(1.0)
    assert not newton_schulz(torch.zeros(shape)).any()
    assert not newton_schulz(torch.zeros(4, 6)).any()
