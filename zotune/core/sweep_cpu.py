# mypy: allow-untyped-defs
"""Updates on the CPU in one sweep: drawn, made a step, subtracted and rounded, number by number.

Each kernel does what `Block.move_` does to the steps of `Rule.elementwise`, in the same order and
to the same bits, without a tensor for g or for the step: a weight is read and written once.
bfloat16 travels as uint16 patterns.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from zotune.core import noise_cpu
from zotune.core.block import Block, FloatBlock
from zotune.core.estimator import Estimate
from zotune.core.floats_cpu import nearest, wide
from zotune.core.noise import philox_key_array
from zotune.core.perturbation import Perturbation
from zotune.core.rule import Elementwise
from zotune.quant.kernels.threads import parallel_ranges

GRAIN = 1 << 15  # numbers per thread below which a second thread does not pay
CHUNK = 2048  # numbers of g that are alive at once: a tile of signs, in the nearest cache
_compiled: Any = njit(nogil=True, cache=True)
_inlined: Any = njit(nogil=True, cache=True, forceinline=True)
_f, _u = np.float32, np.uint32


@_inlined
def _step(g, size, stride, sign):
    if sign:
        g = _f(1.0) if g > _f(0.0) else (_f(-1.0) if g < _f(0.0) else g)
    return (g * size) * stride


@_compiled
def move_floats(master, law, tile, first, streams, key, weights, size, stride, sign, low):
    """master[i] -= stride step(sum_k weights[k] u_k[first + i]), float32, no less than `low`."""
    g = np.empty(CHUNK, np.float32)
    for at in range(0, master.shape[0], CHUNK):
        here = master[at : at + CHUNK]
        count = here.shape[0]
        g[:] = _f(0.0)
        noise_cpu.combine(g[:count], law, tile, first + at, streams, key, weights)
        for j in range(count):
            v = here[j] - _step(g[j], size, stride, sign)
            here[j] = low if v < low else v


@_inlined
def _spread(value, chance):
    """`value` as one of the two bfloat16 beside it, by chance; see `block._round_to`."""
    close = nearest(value)
    error = value - wide(close)
    away = (error >= _f(0.0)) == (_u(close & _u(0x8000)) == _u(0))
    other = _u(close + _u(1)) if away else _u(close - _u(1))
    if _u(close & _u(0x7FFF)) == _u(0):  # beside zero lies the smallest number of either sign
        other = _u(1) if error >= _f(0.0) else _u(0x8001)
    gap = abs(wide(other) - wide(close))
    return other if chance * gap < abs(error) else close


@_compiled
def move_bfloat16(stored, law, tile, first, streams, key, weights, size, stride, sign, low,
                  stream, round_key):  # fmt: skip
    """The same for bfloat16 patterns, rounded stochastically by the uniforms of `round_key`."""
    g, chances = np.empty(CHUNK, np.float32), np.empty((1, CHUNK), np.float32)
    start = np.empty(1, np.int64)
    for at in range(0, stored.shape[0], CHUNK):
        here = stored[at : at + CHUNK]
        count = here.shape[0]
        g[:] = _f(0.0)
        noise_cpu.combine(g[:count], law, tile, first + at, streams, key, weights)
        start[0] = first + at
        noise_cpu.rows(chances[:, :count], 1, noise_cpu.WORDS, start, stream, round_key)
        for j in range(count):
            v = wide(here[j]) - _step(g[j], size, stride, sign)
            v = low if v < low else v
            here[j] = np.uint16(_spread(v, chances[0, j] * _f(0.5) + _f(0.5)))


def sweepable(block: Block, law: Perturbation) -> bool:
    """Whether this block lies as the kernels want it, and kernels draw its directions."""
    how = law.independent(block)
    if type(block) is not FloatBlock or how is None or how.law not in noise_cpu.LAWS:
        return False
    master, stored = block.master, block.tensor
    return (
        master.data_ptr() == stored.data_ptr()
        and stored.dtype in (torch.float32, torch.bfloat16)
        and stored.is_contiguous()
        and not isinstance(block.stride, Tensor)
        and block.numel > 0
    )


def sweep_(block: Block, law: Perturbation, past: Estimate, rule: Elementwise) -> None:
    """Move one block by one estimate."""
    how = law.independent(block)
    assert how is not None
    assert isinstance(block, FloatBlock)
    stored = block.tensor.detach().view(-1)
    number, tile = noise_cpu.LAWS[how.law]
    streams = np.array([key.stream for key in past.keys], np.uint32)
    weights = np.array([w * how.gain for w in past.weights(block)], np.float32)
    low = _f(-np.inf if block.minimum is None else block.minimum)
    key = philox_key_array(past.keys[0].seed, block.name)
    rest = (
        streams, key, weights, _f(rule.size), _f(block.stride), rule.sign, low,
    )  # fmt: skip
    if stored.dtype == torch.float32:
        data = stored.numpy()
        run = partial(_range, move_floats, data, number, tile, rest)
    else:
        data = stored.view(torch.uint16).numpy()
        stream = np.array([past.key.stream], np.uint32)
        rounding = (stream, philox_key_array(past.key.seed, f"{block.name}#round"))
        run = partial(_range, move_bfloat16, data, number, tile, (*rest, *rounding))
    parallel_ranges(run, len(data), GRAIN)
    torch.autograd.graph.increment_version(block.tensor)  # what caches by it must see the change


def _range(
    kernel: Any, data: NDArray[Any], law: int, tile: int, rest: tuple[Any, ...], lo: int, hi: int
) -> None:
    kernel(data[lo:hi], law, tile, lo, *rest)
