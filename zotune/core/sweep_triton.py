# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Updates on GPUs in one sweep: what `Block.move_` does to steps of drawn directions.

A program draws g for a run of numbers, makes steps of it and writes what `move_` would: float32,
16-bit floats by stochastic rounding, packed codes by stochastic rounding onto their grid.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zotune.core import noise_triton
from zotune.core.block import Block, CodeBlock, FloatBlock
from zotune.core.estimator import Estimate
from zotune.core.forwards_triton import spacing
from zotune.core.perturbation import Perturbation
from zotune.quant.kernels.floats import KINDS, bits_of, narrow, rounded, wide
from zotune.quant.kernels.philox import FIELDS, LAWS, four, weight_of

COUNTERS = 256  # per program: 1,024 numbers
WIDTHS = (2, 4, 8)  # bits of codes that a sweep reads as they lie
_jit: Any = triton.jit
_INTS = ["n", "over", "keys", "most", "k0", "k1", "r0", "r1"]
_free: Any = triton.jit(do_not_specialize=_INTS)


@_jit
def _gradients(counter, table, keys, k0, k1, most, law: tl.constexpr):
    """g = sum_k weight_k u_k of four planes, in the order of k."""
    x = tl.zeros(counter.shape, tl.float32)
    y, z, w = x, x, x
    for k in range(keys):
        row = table + k * 6  # FIELDS
        c = weight_of(row)
        a, b, d, e = four(counter, row, k0, k1, most, law)
        x, y, z, w = x + c * a, y + c * b, z + c * d, w + c * e
    return x, y, z, w


@_jit
def _step(g, size, stride, sign: tl.constexpr):
    if sign:
        g = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, g))
    return (g * size) * stride


@_free
def _floats(
    master, stored, stride, table, n, over, keys, k0, k1, r0, r1, most, stride_value,
    minimum, law: tl.constexpr, sign: tl.constexpr, spread: tl.constexpr, bounded: tl.constexpr,
    kind: tl.constexpr, copied: tl.constexpr, counters: tl.constexpr,
):  # fmt: skip
    """master -= stride step; `stored`, in a 16-bit float, is its copy or is all there is."""
    k0, k1 = k0.to(tl.uint32, bitcast=True), k1.to(tl.uint32, bitcast=True)
    r0, r1 = r0.to(tl.uint32, bitcast=True), r1.to(tl.uint32, bitcast=True)
    counter = tl.program_id(0).to(tl.int64) * counters + tl.arange(0, counters)
    numbers = _gradients(counter, table, keys, k0, k1, most, law)
    size = weight_of(table + keys * 6)
    if kind != 0 and not copied:
        chances = four(counter, table + keys * 6, r0, r1, most, 1)
    for k in tl.static_range(4):
        at = counter // 16 * 64 + counter % 16 + 16 * k
        inside = at < n
        far = stride_value
        if spread:
            far = tl.load(stride + at // over, inside, other=0.0)
        step = _step(numbers[k], size, far, sign)
        if kind == 0 or copied:
            value = tl.load(master + at, inside, other=0.0) - step
        else:
            value = wide(tl.load(stored + at, inside, other=0), kind) - step
        if bounded:
            value = tl.where(value < minimum, minimum, value)
        if kind == 0 or copied:
            tl.store(master + at, value, inside)
            if copied:
                tl.store(stored + at, narrow(value, kind), inside)
        else:
            tl.store(stored + at, rounded(value, chances[k] * 0.5 + 0.5, kind), inside)


@_jit
def _coded(q, step, chance, half: tl.constexpr):
    """clamp(q - SR(step)): down to the whole number below or up to the one above."""
    down = tl.floor(step)
    down += tl.where(chance * 0.5 + 0.5 < step - down, 1.0, 0.0)
    value = q.to(tl.float32) - down
    value = tl.where(value < -half, -half, tl.where(value > half - 1, half - 1, value))
    return tl.where(value == value, value, 0.0).to(tl.int32)


@_free
def _codes(
    codes, moved, table, n, columns, width, keys, k0, k1, r0, r1, most, stride_value,
    law: tl.constexpr, sign: tl.constexpr, bits: tl.constexpr, counters: tl.constexpr,
):  # fmt: skip
    """codes -= SR(stride step); n bytes, rows of `width`, where plane p of a row holds columns from
    p * width on. Widths are whole tiles of 64, but for 8 bits, where rows do not matter."""
    k0, k1 = k0.to(tl.uint32, bitcast=True), k1.to(tl.uint32, bitcast=True)
    r0, r1 = r0.to(tl.uint32, bitcast=True), r1.to(tl.uint32, bitcast=True)
    local = tl.program_id(0).to(tl.int64) * counters + tl.arange(0, counters)
    byte, lane = local // 16 * 64, local % 16
    size = weight_of(table + keys * 6)
    half: tl.constexpr = 1 << (bits - 1)
    mask: tl.constexpr = (1 << bits) - 1
    q0 = tl.load(codes + byte + lane, byte + lane < n, other=0).to(tl.int32)
    q1 = tl.load(codes + byte + lane + 16, byte + lane + 16 < n, other=0).to(tl.int32)
    q2 = tl.load(codes + byte + lane + 32, byte + lane + 32 < n, other=0).to(tl.int32)
    q3 = tl.load(codes + byte + lane + 48, byte + lane + 48 < n, other=0).to(tl.int32)
    old = (q0, q1, q2, q3)
    zero = q0 * 0
    p0, p1, p2, p3, count = zero, zero, zero, zero, zero
    for plane in tl.static_range(8 // bits):
        first = byte
        if bits < 8:
            first = byte // width * columns + plane * width + byte % width
        counter = first // 4 + lane
        g = _gradients(counter, table, keys, k0, k1, most, law)
        c = four(counter, table + keys * 6, r0, r1, most, 1)
        found = (p0, p1, p2, p3)
        for k in tl.static_range(4):
            q = old[k]
            if bits < 8:
                q = ((q >> (plane * bits)) & mask) - half
            now = _coded(q, _step(g[k], size, stride_value, sign), c[k], half)
            count += tl.where((byte + lane + 16 * k < n) & (now != q), 1, 0)
            if bits < 8:
                now = found[k] | ((now + half) << (plane * bits))
            if k == 0:
                p0 = now
            elif k == 1:
                p1 = now
            elif k == 2:
                p2 = now
            else:
                p3 = now
    kind = codes.dtype.element_ty
    tl.store(codes + byte + lane, p0.to(kind), byte + lane < n)
    tl.store(codes + byte + lane + 16, p1.to(kind), byte + lane + 16 < n)
    tl.store(codes + byte + lane + 32, p2.to(kind), byte + lane + 32 < n)
    tl.store(codes + byte + lane + 48, p3.to(kind), byte + lane + 48 < n)
    tl.atomic_add(moved, tl.sum(count).to(tl.int64))


def sweepable(block: Block, law: Perturbation) -> bool:
    """Whether this block lies as the kernels want it, and kernels draw its directions."""
    if law.independent(block) is None:
        return False
    if type(block) is FloatBlock:
        master, stored, stride = block.master, block.tensor, block.stride
        same = master.data_ptr() == stored.data_ptr()
        return (
            stored.dtype in KINDS
            and (same or master.dtype == torch.float32)
            and master.is_contiguous()
            and stored.is_contiguous()
            and (not isinstance(stride, Tensor) or spacing(stride, block) > 0)
        )
    if type(block) is not CodeBlock or isinstance(block.stride, Tensor):
        return False
    codes, bits = block.module.codes, block.module.scheme.bits
    width, columns = codes.shape[-1], block.shape[1]
    whole = bits == 8 or (width % 64 == 0 and width * (8 // bits) == columns)
    return bits in WIDTHS and whole and codes.is_contiguous()


def places(block: Block) -> tuple[Hashable, ...]:
    """What a recorded launch has fixed of this block."""
    stride = block.stride.data_ptr() if isinstance(block.stride, Tensor) else block.stride
    if isinstance(block, FloatBlock):
        return block.name, block.master.data_ptr(), block.tensor.data_ptr(), stride
    assert isinstance(block, CodeBlock)
    return block.name, block.module.codes.data_ptr(), stride


def table(blocks: Sequence[Block], law: Perturbation, past: Estimate, size: float) -> Tensor:
    """(blocks, keys + 1, 6) on their device: streams and weights of g, then the stream of the
    rounding noise, whose weight is the step's size."""
    keys = [*past.keys, past.key]
    rows, weights = len(keys) * len(blocks), []
    for block in blocks:
        how = law.independent(block)
        assert how is not None
        weights += [w * how.gain for w in past.weights(block)] + [size]
    flat = noise_triton.table(keys * len(blocks), weights, [0] * rows, blocks[0].device)
    return flat.view(len(blocks), len(keys), FIELDS)


def sweep_(
    blocks: Sequence[Block], law: Perturbation, past: Estimate, sign: bool, table: Tensor
) -> None:
    """Launch the update of every block."""
    for block, rows in zip(blocks, table, strict=True):
        how = law.independent(block)
        assert how is not None
        words = (*noise_triton.words(past.keys[0].seed, block.name),
                 *noise_triton.words(past.key.seed, f"{block.name}#round"), how.most)  # fmt: skip
        constants = {"law": LAWS[how.law], "sign": sign, "counters": COUNTERS,
                     "enable_fp_fusion": False}  # fmt: skip
        if not block.numel:
            continue
        if isinstance(block, FloatBlock):
            _float_block_(block, rows, words, constants)
        else:
            assert isinstance(block, CodeBlock)
            _code_block_(block, rows, words, constants)


def _float_block_(
    block: FloatBlock, rows: Tensor, words: tuple[int, ...], constants: dict[str, Any]
) -> None:
    master, stored, stride = block.master, block.tensor.detach(), block.stride
    spread = isinstance(stride, Tensor)
    over = spacing(stride, block) if isinstance(stride, Tensor) else 1
    _floats[(triton.cdiv(-(-block.numel // 64) * 16, COUNTERS),)](
        bits_of(master), bits_of(stored), stride if spread else rows, rows, block.numel, over,
        len(rows) - 1, *words, 1.0 if spread else stride, block.minimum or 0.0,
        spread=spread, bounded=block.minimum is not None, kind=KINDS[stored.dtype],
        copied=master.data_ptr() != stored.data_ptr(), **constants,
    )  # fmt: skip


def _code_block_(
    block: CodeBlock, rows: Tensor, words: tuple[int, ...], constants: dict[str, Any]
) -> None:
    codes, bits = block.module.codes, block.module.scheme.bits
    if not isinstance(block.moved, Tensor):  # counted where the codes are: no step waits for it
        block.moved = torch.full((), block.moved, dtype=torch.int64, device=block.device)
    _codes[(triton.cdiv(-(-codes.numel() // 64) * 16, COUNTERS),)](
        codes, block.moved, rows, codes.numel(), block.shape[1], codes.shape[-1], len(rows) - 1,
        *words, block.stride, bits=bits, **constants,
    )  # fmt: skip
