"""Compiled passes over codes against plain torch. Run: pytest tests/core/test_codes.py"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zotune.core import codes as codes_module
from zotune.core.codes import plain_shifted, plain_stepped, shifted, stepped

HARD = [0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 3e38, -3e38, math.inf, -math.inf, math.nan, 2.0**-130]
limits_of = st.sampled_from(((-2, 1), (-8, 7), (-128, 127)))
shape_of = st.tuples(st.integers(0, 9), st.integers(0, 70))
factor_of = st.sampled_from((0.0, 1.0, -1.0, 2.0, -3.0, 0.5, 0.3, -1e-3, 300.0, 2.0**24, 1e39))


def random(shape: tuple[int, int], seed: int, kind: str) -> torch.Tensor:
    """Numbers of one kind: int8, whole, any float32, or those that arithmetic stumbles over."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(shape, generator=generator) * 3
    if kind == "int8":
        return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    if kind == "hard":
        pick = torch.randint(0, len(HARD), shape, generator=generator)
        return torch.tensor(HARD)[pick]
    return u.round() if kind == "whole" else u


def codes_in(low: int, high: int, shape: tuple[int, int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    known = ~a.isnan()  # a NaN has many bit patterns
    return torch.equal(known, ~b.isnan()) and torch.equal(a[known], b[known])


@given(limits=limits_of, shape=shape_of, factor=factor_of, seed=st.integers(0, 99),
       kind=st.sampled_from(("int8", "whole", "float", "hard")))  # fmt: skip
def test_a_compiled_shift_equals_the_plain_one(
    limits: tuple[int, int], shape: tuple[int, int], factor: float, seed: int, kind: str
) -> None:
    codes, u = codes_in(*limits, shape, seed), random(shape, seed, kind)
    assert same_bits(shifted(codes, u, factor, *limits), plain_shifted(codes, u, factor, *limits))


@given(limits=limits_of, shape=shape_of, seed=st.integers(0, 99),
       kind=st.sampled_from(("int8", "whole", "float", "hard")))  # fmt: skip
def test_a_compiled_step_equals_the_plain_one(
    limits: tuple[int, int], shape: tuple[int, int], seed: int, kind: str
) -> None:
    codes, step = codes_in(*limits, shape, seed), random(shape, seed, kind)
    moved, whole = stepped(codes, step, *limits)
    truth, is_whole = plain_stepped(codes, step, *limits)
    assert whole == is_whole
    assert same_bits(moved, truth)


def test_shifts_of_many_codes_are_the_same_on_two_threads() -> None:
    shape = (1031, 1033)
    codes, u = codes_in(-8, 7, shape, 0), torch.zeros(shape)
    u[-1, -1] = 0.5  # the only fraction lies in the last thread's range
    codes[-1, -1] = 0
    torch.set_num_threads(2)
    try:
        moved, (_, whole) = shifted(codes, u, 1.0, -8, 7), stepped(codes, u, -8, 7)
    finally:
        torch.set_num_threads(1)
    assert same_bits(moved, plain_shifted(codes, u, 1.0, -8, 7))
    assert moved.dtype == torch.float32
    assert not whole


def test_the_compiled_passes_are_taken_where_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("plain")

    monkeypatch.setattr(codes_module, "plain_shifted", refuse)
    monkeypatch.setattr(codes_module, "plain_stepped", refuse)
    codes, u = codes_in(-8, 7, (3, 4), 0), random((3, 4), 0, "float")
    for tensor in (u, u.to(torch.int8)):
        shifted(codes, tensor, 0.5, -8, 7)
        stepped(codes, tensor, -8, 7)
    shifted(codes.t(), u.t(), 0.5, -8, 7)
    for other in (u.double(), u.expand(2, 3, 4)):
        with pytest.raises(AssertionError, match="plain"):
            shifted(codes, other, 0.5, -8, 7)
