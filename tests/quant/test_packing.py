"""Packing of codes: exact, planar, of known size. Run: pytest tests/quant/test_packing.py"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zotune.errors import BadInput
from zotune.quant.packing import pack, packed_columns, unpack

BITS = st.sampled_from((2, 3, 4, 5, 6, 7, 8))


def random_codes(bits: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    limit = 1 << (bits - 1)
    return torch.randint(-limit, limit, shape, dtype=torch.int8, generator=generator)


@given(
    bits=BITS,
    shape=st.lists(st.integers(0, 4), max_size=2),
    columns=st.integers(0, 70),
    seed=st.integers(0, 2**31),
)
def test_unpacking_gives_back_every_code(
    bits: int, shape: list[int], columns: int, seed: int
) -> None:
    codes = random_codes(bits, (*shape, columns), seed)
    packed = pack(codes, bits)
    assert packed.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert packed.shape == (*shape, packed_columns(bits, columns))
    back = unpack(packed, bits, columns)
    assert back.dtype == torch.int8
    assert torch.equal(back, codes)


@pytest.mark.parametrize("bits", [2, 4])
def test_planes_hold_neighbouring_columns(bits: int) -> None:
    codes = random_codes(bits, (3, 16), 0)
    size = 16 * bits // 8
    for plane in range(8 // bits):
        stored = (pack(codes, bits) >> (plane * bits)) & ((1 << bits) - 1)
        expected = codes[:, plane * size : (plane + 1) * size] + (1 << (bits - 1))
        assert torch.equal(stored.to(torch.int8), expected)


def test_three_bits_are_a_plane_of_two_and_a_plane_of_one() -> None:
    codes = random_codes(3, (3, 16), 0)
    stored = (codes + 4).to(torch.uint8)
    low, high = pack(codes, 3).split([4, 2], dim=1)
    assert torch.equal(unpack(low, 2, 16) + 2, (stored & 3).to(torch.int8))
    ones = torch.cat([(high >> k) & 1 for k in range(8)], dim=1)
    assert torch.equal(ones, stored >> 2)


def test_padding_is_code_zero() -> None:
    packed = pack(torch.tensor([[1, -1, 3]], dtype=torch.int8), 4)
    assert unpack(packed, 4, 8).tolist() == [[1, -1, 3, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize(("bits", "code"), [(2, 2), (3, -5), (4, 8)])
def test_codes_outside_the_grid_are_refused(bits: int, code: int) -> None:
    with pytest.raises(BadInput, match=f"{bits} bits hold"):
        pack(torch.tensor([[code]], dtype=torch.int8), bits)


def test_wrong_dtypes_widths_and_sizes_are_refused() -> None:
    with pytest.raises(BadInput, match=r"pack wants torch\.int8"):
        pack(torch.zeros(1, 8), 4)
    with pytest.raises(BadInput, match="bits=9"):
        pack(torch.zeros(1, 8, dtype=torch.int8), 9)
    with pytest.raises(BadInput, match=r"need torch\.uint8 with 4"):
        unpack(torch.zeros(1, 5, dtype=torch.uint8), 4, 8)
