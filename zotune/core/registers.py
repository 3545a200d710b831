"""Linear feedback shift registers, bit for bit: random words as small hardware makes them.

A register of b bits shifts left by one at each tick; the bit that enters is the parity of the
bits at its taps. With the taps below it visits every word but 0 and returns after 2^b - 1 ticks.
Neighbouring words share all but one bit: read as numbers they correlate by a half.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from zotune.errors import BadInput

TAPS: dict[int, tuple[int, ...]] = {
    3: (3, 2), 4: (4, 3), 5: (5, 3), 6: (6, 5), 7: (7, 6), 8: (8, 6, 5, 4), 9: (9, 5), 10: (10, 7),
    11: (11, 9), 12: (12, 6, 4, 1), 13: (13, 4, 3, 1), 14: (14, 5, 3, 1), 15: (15, 14),
    16: (16, 15, 13, 4), 17: (17, 14), 18: (18, 11), 19: (19, 6, 2, 1), 20: (20, 17),
}  # fmt: skip
"""By width, the bits whose parity enters, counted from 1 for the newest: primitive polynomials."""


def check_width(bits: int) -> None:
    """A width that has no taps is an error."""
    if bits not in TAPS:
        raise BadInput(f"bits={bits}; a register has {min(TAPS)} to {max(TAPS)} bits")


def words(bits: int) -> Tensor:
    """The words of a register from 1 on, through its whole period: (2^bits - 1,), int64.

    The bits that enter obey a_t = xor_k a_(t-k) over the taps k, and squaring that polynomial
    gives a_t = xor_k a_(t-2k), and so on: stretches of doubling length are computed at once.

    >>> words(3).tolist()
    [1, 2, 5, 3, 7, 6, 4]
    """
    check_width(bits)
    taps = TAPS[bits]
    entered = torch.zeros(2**bits - 2 + bits, dtype=torch.int64)
    entered[bits - 1] = 1
    known, stride = bits, 1
    while known < len(entered):
        if known >= 2 * stride * bits:
            stride *= 2
        stop = min(known + min(taps) * stride, len(entered))
        for k in taps:
            entered[known:stop] ^= entered[known - k * stride : stop - k * stride]
        known = stop
    out = torch.zeros(2**bits - 1, dtype=torch.int64)
    for place in range(bits):
        out += entered[place : place + len(out)] << (bits - 1 - place)
    return out


@lru_cache(maxsize=4)
def cycle(bits: int) -> tuple[Tensor, Tensor]:
    """Words w read as x = 2 (w - 2^(bits-1)) / (2^bits - 1) in [-1, 1], of mean 0: float32, the
    whole period; and the sums of the first squares over two periods, from none on: float64.

    >>> cycle(3)[0].mean().item(), len(cycle(3)[1])
    (0.0, 15)
    """
    x = 2 * (words(bits).double() - 2 ** (bits - 1)) / (2**bits - 1)
    return x.float(), torch.cat([x[:1] * 0, x, x]).square().cumsum(0)
