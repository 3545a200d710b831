"""Counter-based noise: a direction is a pure function of its key, its block's name and an index.

    seed, block name ──blake2b──► Philox key (64 bits)
    element index, lane, step, query ─► Philox counter (128 bits)
    Philox4x32-10(counter, key) ─► 4 words ─► a law (gaussian, uniform, rademacher)

Nothing is stored and no generator advances, so any block can be drawn alone, in chunks, in any
order, on any device, by any rank, any number of times. Integers, uniforms and signs agree bit for
bit everywhere; so do Gaussians wherever float32 +, *, sqrt are IEEE (1e-6 is what is promised).
Philox: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from zotune.core import noise_reference as reference
from zotune.quant.kernels import has_triton
from zotune.quant.kernels.threads import parallel_ranges

Law = Literal["gaussian", "uniform", "rademacher"]
VERSION = 1  # of the mapping from keys to numbers; a journal names the one it was written with
_GRAIN = 1 << 16  # numbers per thread below which a second thread does not pay


@dataclass(frozen=True, slots=True)
class Key:
    """Where a direction lies in the stream of all directions of a run.

    `seed` is what the user types; `step` counts updates, `query` the directions of one step,
    `lane` the examples of a batch when each has a direction of its own.

    >>> Key(7).at(step=3).fold(query=1)
    Key(seed=7, step=3, query=1, lane=0)
    """

    seed: int
    step: int = 0
    query: int = 0
    lane: int = 0

    def at(self, step: int) -> Key:
        return replace(self, step=step)

    def fold(self, *, query: int | None = None, lane: int | None = None) -> Key:
        return replace(
            self,
            query=self.query if query is None else query,
            lane=self.lane if lane is None else lane,
        )

    @property
    def stream(self) -> tuple[int, int, int]:
        return self.lane, self.step, self.query


@lru_cache(maxsize=65536)
def philox_key(seed: int, name: str) -> tuple[int, int]:
    """The 64-bit Philox key of a block: equal shapes with unequal names draw unequal numbers."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


@lru_cache(maxsize=65536)
def philox_key_array(seed: int, name: str) -> Any:
    """`philox_key` as compiled kernels take it."""
    return np.array(philox_key(seed, name), np.uint32)


def draw(
    law: Law, key: Key, name: str, start: int, stop: int, device: torch.device | str = "cpu"
) -> Tensor:
    """u[start:stop] as float32, shape (stop - start,).

    Laws have mean 0; gaussian and rademacher variance 1, uniform on [-1, 1) variance 1/3.

    >>> whole = draw("gaussian", Key(0), "layer.weight", 0, 100)
    >>> bool((draw("gaussian", Key(0), "layer.weight", 37, 90) == whole[37:90]).all())
    True
    """
    return draw_rows(law, [key], name, [start], stop - start, device)[0]


def draw_rows(
    law: Law,
    keys: Sequence[Key],
    name: str,
    starts: Sequence[int],
    n: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Row k holds u_k[starts[k] : starts[k] + n]; shape (len(keys), n), float32.

    All keys share one seed. Used for directions per example (many keys, one start) and for
    single rows of an embedding (one key, many starts).
    """
    device = torch.device(device)
    if has_triton(device.type):
        from zotune.core import noise_triton

        out = torch.empty(len(keys), n, device=device)
        return noise_triton.fill_(out, law, keys, [1.0] * len(keys), starts, name)
    if device.type != "cpu":
        seed_key = philox_key(keys[0].seed, name)
        rows = [
            reference.row(law, s, s + n, k.stream, seed_key, device)
            for k, s in zip(keys, starts, strict=True)
        ]
        return torch.stack(rows)
    from zotune.core import noise_cpu

    kernel, (number, size) = noise_cpu.rows, noise_cpu.LAWS[law]
    out = torch.empty(len(keys), n)
    view = out.numpy()
    streams = np.array([k.stream for k in keys], np.uint32)
    offsets = np.array(starts, np.int64)
    seed_array = philox_key_array(keys[0].seed, name)
    if len(keys) == 1:
        parallel_ranges(
            lambda lo, hi: kernel(view[:, lo:hi], number, size, offsets + lo, streams, seed_array),
            n,
            _GRAIN,
        )
    else:
        parallel_ranges(
            lambda lo, hi: kernel(
                view[lo:hi], number, size, offsets[lo:hi], streams[lo:hi], seed_array
            ),
            len(keys),
            max(1, _GRAIN // max(n, 1)),
        )
    return out


def draw_whole(
    most: int, key: Key, name: str, start: int, stop: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Whole numbers uniform on {-most, ..., most}, most <= 127, as int8 of shape (stop - start,).

    They are the uniforms of the same key and name, laid on the grid.

    >>> sorted(set(draw_whole(2, Key(0), "w", 0, 100).tolist()))
    [-2, -1, 0, 1, 2]
    """
    device = torch.device(device)
    if has_triton(device.type):
        from zotune.core import noise_triton

        out = torch.empty(1, stop - start, dtype=torch.int8, device=device)
        return noise_triton.fill_(out, "whole", [key], [1.0], [start], name, most=most)[0]
    if device.type != "cpu":
        u = draw("uniform", key, name, start, stop, device)
        return reference.whole(u, most).to(torch.int8)
    from zotune.core import noise_cpu

    out = torch.empty(stop - start, dtype=torch.int8)
    view, stream = out.numpy(), np.array(key.stream, np.uint32)
    seed_array = philox_key_array(key.seed, name)
    parallel_ranges(
        lambda lo, hi: noise_cpu.whole(view[lo:hi], most, start + lo, stream, seed_array),
        len(out),
        _GRAIN,
    )
    return out


def combine_(
    out: Tensor,
    law: Law,
    keys: Sequence[Key],
    coefficients: Sequence[float],
    name: str,
    start: int = 0,
) -> Tensor:
    """out += sum_k coefficients[k] * u_k[start : start + len(out)], in place, in the order of k.

    `out` is a contiguous 1-D float32 tensor. No direction is materialised on the CPU.

    >>> g = combine_(torch.zeros(5), "rademacher", [Key(0), Key(0, query=1)], [2.0, 1.0], "w")
    >>> set(g.abs().tolist()) <= {1.0, 3.0}
    True
    """
    if has_triton(out.device.type):
        from zotune.core import noise_triton

        starts = [start] * len(keys)
        rows = out.view(1, -1)
        return noise_triton.fill_(rows, law, keys, coefficients, starts, name, add=True)[0]
    if out.device.type != "cpu":
        seed_key = philox_key(keys[0].seed, name)
        for k, c in zip(keys, coefficients, strict=True):
            out += c * reference.row(law, start, start + len(out), k.stream, seed_key, out.device)
        return out
    from zotune.core import noise_cpu

    kernel, (number, size) = noise_cpu.combine, noise_cpu.LAWS[law]
    view = out.numpy()
    streams = np.array([k.stream for k in keys], np.uint32)
    weights = np.array(coefficients, np.float32)
    seed_array = philox_key_array(keys[0].seed, name)
    parallel_ranges(
        lambda lo, hi: kernel(view[lo:hi], number, size, start + lo, streams, seed_array, weights),
        len(out),
        max(1024, _GRAIN // len(keys)),
    )
    return out
