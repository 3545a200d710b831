"""Shift registers, bit for bit. Run: pytest tests/core/test_registers.py"""

from __future__ import annotations

import pytest
import torch

from zotune.core.registers import TAPS, cycle, words
from zotune.errors import BadInput


def ticked(word: int, bits: int) -> int:
    """One tick of a register whose newest bit is the lowest."""
    parity = sum(word >> (tap - 1) & 1 for tap in TAPS[bits]) % 2
    return (word << 1 | parity) & (2**bits - 1)


@pytest.mark.parametrize("bits", [b for b in TAPS if b <= 12])
def test_words_are_those_of_a_register_ticked_by_hand(bits: int) -> None:
    found, word = [], 1
    for _ in range(2**bits - 1):
        found.append(word)
        word = ticked(word, bits)
    assert word == 1
    assert words(bits).tolist() == found


@pytest.mark.parametrize("bits", TAPS)
def test_the_period_is_exactly_two_to_the_bits_less_one(bits: int) -> None:
    """Every word but 0 once, each followed by what its taps say, the last by the first."""
    w = words(bits)
    assert torch.equal(w.sort().values, torch.arange(1, 2**bits))
    parity = torch.zeros_like(w)
    for tap in TAPS[bits]:
        parity ^= w >> (tap - 1) & 1
    assert torch.equal(w.roll(-1), (w << 1 | parity) & (2**bits - 1))


def test_a_tap_elsewhere_shortens_the_period(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TAPS, 8, (8, 4))
    assert len(words(8).unique()) < 255


def test_numbers_are_centred_uniforms_whose_neighbours_correlate_by_a_half() -> None:
    x, sums = cycle(12)
    assert abs(float(x.double().mean())) < 1e-7
    assert float(x.abs().max()) <= 1
    assert float(x.double().square().mean()) == pytest.approx(1 / 3, rel=1e-3)
    assert float((x * x.roll(1)).mean() / x.square().mean()) == pytest.approx(0.5, abs=1e-3)
    assert float(sums[7000] - sums[5]) == pytest.approx(float(x.repeat(2)[5:7000].square().sum()))


@pytest.mark.parametrize("bits", [2, 21])
def test_widths_without_taps_are_refused(bits: int) -> None:
    with pytest.raises(BadInput, match="3 to 20 bits"):
        words(bits)
