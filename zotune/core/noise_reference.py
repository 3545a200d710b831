"""Plain torch noise, for any device: the slow truth that `noise_cpu.py` equals bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011) on int64 tensors that hold 32-bit words.

    >>> zero = torch.zeros(1, dtype=torch.int64)
    >>> [hex(int(w)) for w in philox((zero,) * 4, (0, 0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # int64 wraps: the low 64 bits are exact
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def words(
    start: int,
    stop: int,
    size: int,
    stream: tuple[int, int, int],
    key: tuple[int, int],
    device: torch.device,
) -> tuple[Tensor, int]:
    """The words (tiles, 64) of all tiles of `size` numbers that touch [start, stop), and where
    the first tile begins."""
    first, last = start // size, -(-stop // size)
    lane, step, query = stream
    counter = torch.arange(first * 16, last * 16, device=device, dtype=torch.int64)
    high = ((counter >> 32) & 0xFFFF) | (lane << 16)
    c2, c3 = torch.full_like(counter, step), torch.full_like(counter, query)
    planes = philox((counter & _MASK, high, c2, c3), key)
    return torch.stack([p.view(-1, 16) for p in planes], dim=1).view(-1, 64), first * size


def uniform(word: Tensor) -> Tensor:
    """(tiles, 64) words to uniforms on [-1, 1)."""
    return (word >> 8).float() * 2.0**-23 - 1.0


def whole(u: Tensor, most: Tensor | float) -> Tensor:
    """Uniforms on [-1, 1) to whole numbers uniform on {-most, ..., most}, float32, in place."""
    return u.mul_(0.5).add_(0.5).mul_(2 * most + 1).floor_().sub_(most)


def rademacher(word: Tensor) -> Tensor:
    """(tiles, 64) words to (tiles, 2048) signs: bit k of word j is number 64 k + j."""
    shifts = torch.arange(32, device=word.device).view(1, 32, 1)
    return (1.0 - 2.0 * ((word.unsqueeze(1) >> shifts) & 1).float()).flatten(1)


def gaussian(word: Tensor) -> Tensor:
    """(tiles, 64) words to standard normals by Box-Muller, in the operations of `noise_cpu`."""
    planes = word.view(-1, 4, 16)
    even, odd = _gaussian_pair(planes[:, 0::2], planes[:, 1::2])
    return torch.stack([even, odd], dim=2).reshape(-1, 64)


_LOG: tuple[float, ...] = (-1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1)
_LOG += (-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)


def _log(u: Tensor) -> Tensor:
    bits = u.view(torch.int32)
    exponent = ((bits >> 23) - 126).float()
    m = ((bits & 0x007FFFFF) | 0x3F000000).view(torch.float32)
    small = m < torch.tensor(0.70710678118654752440, dtype=torch.float32, device=u.device)
    exponent = exponent - small.float()
    x = m + torch.where(small, m, torch.zeros_like(m)) - 1.0
    z = x * x
    y = torch.full_like(x, 7.0376836292e-2)
    for c in _LOG:
        y = y * x + c
    y = y * x * z
    y = y + exponent * -2.12194440e-4
    y = y - 0.5 * z
    return (x + y) + exponent * 0.693359375


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded by way of float64: MKL's float32 sqrt misses by an ulp in one of six."""
    return x.sqrt() if x.device.type == "mps" else x.double().sqrt().float()


def _gaussian_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    radius = _sqrt((-2.0 * _log(((a >> 8) + 1).float() * 2.0**-24)).clamp_min(0.0))
    quadrant = ((b + 0x20000000) & _MASK) >> 30
    rest = b - (quadrant << 30)
    rest = torch.where(rest >= 0x80000000, rest - 0x100000000, rest)
    x = rest.float() * 1.4629180792671596e-09
    z = x * x
    s = z * -1.9515295891e-4 + 8.3321608736e-3
    s = s * z + -1.6666654611e-1
    s = s * z * x + x
    c = z * 2.443315711809948e-5 + -1.388731625493765e-3
    c = c * z + 4.166664568298827e-2
    c = c * z * z - 0.5 * z + 1.0
    odd = (quadrant & 1) == 1
    cosine, sine = torch.where(odd, s, c), torch.where(odd, c, s)
    cosine = torch.where(((quadrant + 1) & 2) == 2, -cosine, cosine)
    sine = torch.where((quadrant & 2) == 2, -sine, sine)
    return radius * cosine, radius * sine


LAWS = {"gaussian": gaussian, "uniform": uniform, "rademacher": rademacher}
SIZES = {"gaussian": 64, "uniform": 64, "rademacher": 2048}


def row(
    law: str,
    start: int,
    stop: int,
    stream: tuple[int, int, int],
    key: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """u[start:stop] of one stream as a float32 tensor on `device`."""
    if stop <= start:
        return torch.empty(0, device=device)
    word, first = words(start, stop, SIZES[law], stream, key, device)
    return LAWS[law](word).flatten()[start - first : stop - first]
