"""Secret randomness: what protects data may never be drawn again, so it has no key and no seed.

Directions are public and come from `noise.py`; privacy noise and the choice of a private batch
come from here, from the operating system's entropy, and are stored nowhere. Noise is drawn in
whole numbers by whole-number arithmetic, so no rounding of floating point betrays what it hides
(Mironov, "On significance of the least significant bits for differential privacy", CCS 2012).
"""

from __future__ import annotations

import secrets
from typing import Literal

Law = Literal["gaussian", "laplace"]


def entropy(count: int) -> bytes:
    """`count` bytes that nobody can foretell or repeat."""
    return secrets.token_bytes(count)


def noise(law: Law, scale: int) -> int:
    """One whole number x: P(x) ~ exp(-x^2 / (2 scale^2)) or exp(-|x| / scale); 0 for scale 0.

    >>> noise("gaussian", 0)
    0
    >>> abs(noise("laplace", 10)) < 10_000
    True
    """
    if not scale:
        return 0
    return _gaussian(scale) if law == "gaussian" else _laplace(scale)


def _gaussian(scale: int) -> int:
    """Algorithm 3 of Canonne, Kamath & Steinke, "The discrete Gaussian for differential privacy"
    (2020, arXiv 2004.00010): a Laplace draw, accepted with the ratio of the two laws."""
    while True:
        x = _laplace(scale)
        if _chance((abs(x) - scale) ** 2, 2 * scale * scale):
            return x


def _laplace(scale: int) -> int:
    """Their algorithm 2: a remainder below `scale`, a geometric quotient, a sign; one zero."""
    while True:
        rest = _below(scale)
        if not _chance(rest, scale):
            continue
        size = rest
        while _chance(1, 1):
            size += scale
        negative = _below(2)
        if size or not negative:
            return -size if negative else size


def _chance(a: int, b: int) -> bool:
    """True with probability exp(-a / b), exactly (their algorithm 1)."""
    while a > b:
        if not _chance(b, b):
            return False
        a -= b
    k = 1
    while _below(b * k) < a:
        k += 1
    return k % 2 == 1


def _below(limit: int) -> int:
    """Uniform on 0, ..., limit - 1."""
    bits = (limit - 1).bit_length()
    size = (bits + 7) // 8
    while True:
        value = int.from_bytes(entropy(size)) >> (8 * size - bits)
        if value < limit:
            return value
