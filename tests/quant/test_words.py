"""Streams of bits in 32-bit words. Run: pytest tests/quant/test_words.py"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant.restated import words

from zotune.errors import BadInput
from zotune.quant.words import from_words, to_words, words_for


@given(
    bits=st.integers(1, 8), rows=st.integers(0, 4), columns=st.integers(0, 70),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_words_are_the_stream_of_bits_and_back(
    bits: int, rows: int, columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator).to(torch.uint8)
    packed = to_words(codes, bits)
    assert packed.shape == (rows, words_for(columns, bits))
    assert packed.tolist() == [words(row, bits) for row in codes.tolist()]
    assert torch.equal(from_words(packed, bits, columns), codes)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_words_of_another_length_or_dtype_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(BadInput, match="10 codes of 4 bits need int32 with 2 words a row"):
        from_words(torch.zeros(1, 3 if dtype == torch.int32 else 2, dtype=dtype), 4, 10)
