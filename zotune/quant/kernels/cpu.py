"""Fast forward on CPUs, and the scratch that a layer is dequantized into where need be.

`parts.py` has the layer at one point or several; `bf16.py`, `vnni.py` and `rounded.py` the products
that need no scratch. Else codes are unpacked, scaled and rounded to the product's dtype in one pass
over memory, into a scratch the size of one layer, and torch's product does the rest.
"""

from __future__ import annotations

import threading
from functools import partial

import torch
from torch import Tensor

from zotune.quant.kernels import compiled, refuse_gradient
from zotune.quant.kernels.threads import parallel_ranges
from zotune.quant.packing import unpack
from zotune.quant.scheme import Scheme

# Elements a thread should have at least: waking one costs more than a smaller share takes.
GRAIN = 1 << 17
# Scratch above this size is given back after each use.
SCRATCH_BYTES = 1 << 26
# Widths that are unpacked and scaled in one pass; others are unpacked before.
PACKED = (2, 3, 4)
_local = threading.local()


def linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    scheme: Scheme,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """y = x @ ((codes - zero) * scale).T + bias; arguments as in `zotune.quant.kernels.linear`.

    Raises:
        BadInput: if a gradient is wanted; this kernel has none.
    """
    refuse_gradient("cpu", x, scale, zero, bias)
    from zotune.quant.kernels import parts
    from zotune.quant.kernels.rounded import Point

    rows = x.reshape(1, x.shape[:-1].numel(), x.shape[-1])
    point = Point(codes, scale, zero, bias)
    out = parts.linear(rows, [point], len(codes), scheme, compute_dtype, same_codes=True)
    return out.view(*x.shape[:-1], len(codes))


def weight_scratch(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    columns: int,
    dtype: torch.dtype,
    group_size: int | None = None,
) -> Tensor:
    """The dequantized weight (out, in) in this thread's scratch; the next call overwrites it."""
    if dtype not in (torch.float32, torch.bfloat16):
        wide = weight_scratch(codes, scale, zero, bits, columns, torch.float32, group_size)
        return wide.to(dtype)
    out = scratch("weight", codes.shape[0], columns, dtype)
    zeros = torch.zeros(1, scale.shape[1]) if zero is None else zero
    if codes.dtype == torch.uint8 and bits not in PACKED:
        codes = unpack(codes, bits, columns)
    if codes.dtype not in (torch.uint8, torch.int8):
        codes = codes.float()
    _fill(out, codes, scale, zeros, bits, group_size)
    return out


def codes_scratch(codes: Tensor, bits: int, columns: int) -> Tensor:
    """int8 codes (out, in); packed ones are unpacked into this thread's scratch."""
    if codes.dtype != torch.uint8:
        return codes.to(torch.int8)
    if bits not in PACKED:
        return unpack(codes, bits, columns)
    out = scratch("codes", codes.shape[0], columns, torch.int8)
    _fill(out, codes, torch.ones(1, 1), torch.zeros(1, 1), bits)
    return out


def _fill(
    out: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group_size: int | None = None,
) -> None:
    """out = (codes - zero) * scale, rounded to out's dtype, rows shared between threads."""
    if out.numel() == 0:
        return
    target = (out.view(torch.uint16) if out.dtype == torch.bfloat16 else out).numpy()
    data, scales, zeros = (
        t.detach().contiguous().numpy() for t in (codes, scale.float(), zero.float())
    )
    grain = max(1, GRAIN // out.shape[1])
    group = group_size or out.shape[1] // scale.shape[1]
    if codes.dtype == torch.uint8:
        work = partial(compiled.scale_packed_rows, data, scales, zeros, target, bits, group)
    else:
        work = partial(compiled.scale_rows, data, scales, zeros, target, group)
    parallel_ranges(work, out.shape[0], grain)


def scratch(name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A matrix of this thread that the next call of the same name overwrites.

    Small ones are kept and grow with the largest layer; one above SCRATCH_BYTES is fresh.
    """
    elements = rows * columns
    if elements * dtype.itemsize > SCRATCH_BYTES:
        return torch.empty(rows, columns, dtype=dtype)
    held: dict[tuple[str, torch.dtype], Tensor] = _local.__dict__.setdefault("held", {})
    found = held.get((name, dtype))
    if found is None or found.numel() < elements:
        found = held[name, dtype] = torch.empty(elements, dtype=dtype)
    return found[:elements].view(rows, columns)
