"""Linear layers on activations that are rounded to int8, on CPUs.

Three ways lead to the same layer:

    vnni          codes, packed or not, meet the activations in integers, by group; outputs are
                  finished in the same pass (AVX-512 VNNI)
    onednn        one integer product of whole int8 codes and a pass that rescales it, for one scale
                  per output; oneDNN also knows AMX and older processors
    dequantized   the dequantized weight in a float product: fractional codes, odd sizes

The first two give the same bits, so where both can, the faster one is measured once for each size
of layer. `zotune.quant.kernels.force("cpu/onednn")` takes one way wherever it can be taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from zotune.quant import kernels
from zotune.quant.kernels import compiled, cpu, integer_matmul, panels, vnni
from zotune.quant.kernels.choice import fastest
from zotune.quant.kernels.threads import parallel_ranges
from zotune.quant.scheme import Scheme


class Point(NamedTuple):
    """A quantized layer's tensors as one part of the rows sees them; see `kernels.linear`."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None


class Rows(NamedTuple):
    """Rounded activations: codes int8 (rows, columns), scale float32 (rows, 1), and the codes' sums
    by group, int32 (rows, groups). Behind the last row lie `panels.ROWS` - 1 more, of zeros."""

    codes: Tensor
    scale: Tensor
    sums: Tensor

    def part(self, start: int, stop: int) -> Rows:
        """Rows start:stop; what lies behind them is another part's, or the zeros."""
        return Rows(*(t[start : stop + panels.ROWS - 1] for t in self))


def linear_(
    out: Tensor,
    x: Tensor,
    batches: Iterable[Sequence[Point]],
    scheme: Scheme,
    dtype: torch.dtype,
) -> Tensor:
    """out[p] = x[p] by the layer at the p-th point; x (parts, tokens, in), out (parts, tokens,
    outputs). Points of a batch share their codes."""
    if out.numel() == 0:
        return out
    tokens, columns = x.shape[1:]
    size = scheme.group_size
    rows = round_rows(x.flatten(0, 1), columns // size if size and columns % size == 0 else 1)
    y = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    first = 0
    for batch in batches:
        last = first + len(batch)
        _meet_(y[first:last], rows.part(first * tokens, last * tokens), batch, scheme, dtype)
        first = last
    return out if y is out else out.copy_(y)


def _meet_(
    out: Tensor, rows: Rows, points: Sequence[Point], scheme: Scheme, dtype: torch.dtype
) -> None:
    """By the way that is forced, or fastest of those that can."""
    codes, columns = points[0].codes, rows.codes.shape[-1]
    ways = {}
    if vnni.fits(codes, scheme, columns):
        ways["vnni"] = lambda: vnni.product_(out, *rows, codes, *stacked(points), scheme.bits)
    if scheme.group_size is None and not codes.is_floating_point():
        ways["onednn"] = lambda: _onednn_(out, rows, points, scheme.bits)
    if not ways or kernels.forced_way() == "dequantized":
        ways = {"dequantized": lambda: _dequantized_(out, rows, points, scheme, dtype)}
    size = (1 << len(rows.codes).bit_length(), len(out), out.shape[-1], columns, scheme.bits)
    ways[fastest(size, ways, kernels.forced_way())]()


def stacked(points: Sequence[Point]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Scale and zero of all points (points, outputs, groups), bias (points, outputs, 1)."""
    scale, zero, bias = (
        _stack([getattr(p, name) for p in points]) for name in ("scale", "zero", "bias")
    )
    assert scale is not None
    return scale, zero, bias


def _stack(values: Sequence[Tensor | None]) -> Tensor | None:
    each = [v.detach().float() for v in values if v is not None]
    each = [v.reshape(-1, 1) if v.dim() == 1 else v for v in each]
    return torch.stack(each) if len(each) > 1 else each[0].unsqueeze(0) if each else None


def _onednn_(out: Tensor, rows: Rows, points: Sequence[Point], bits: int) -> None:
    count = out.shape[0] * out.shape[1]
    codes = cpu.codes_scratch(points[0].codes, bits, rows.codes.shape[-1])
    # Sums are four times the activations: fresh pages for them cost more than their rescaling.
    sums = cpu.scratch("sums", count, out.shape[-1], torch.int32)
    sums = integer_matmul(rows.codes[:count], codes, out=sums).view(out.shape)
    for p, point in enumerate(points):
        mine = slice(p * out.shape[1], (p + 1) * out.shape[1])
        rescale_(
            out[p], sums[p], rows.sums[mine], rows.scale[mine], point.scale, point.zero, point.bias
        )


def _dequantized_(
    out: Tensor, rows: Rows, points: Sequence[Point], scheme: Scheme, dtype: torch.dtype
) -> None:
    """int8 codes are exact in every float dtype, so they enter the product unscaled."""
    tokens, columns = out.shape[1], rows.codes.shape[-1]
    for p, (codes, scale, zero, bias) in enumerate(points):
        weight = cpu.weight_scratch(
            codes, scale, zero, scheme.bits, columns, dtype, scheme.group_size
        )
        mine = slice(p * tokens, (p + 1) * tokens)
        y = F.linear(rows.codes[mine].to(dtype), weight).float()
        torch.mul(y, rows.scale[mine], out=out[p])
        if bias is not None:
            out[p] += bias


def round_rows(x: Tensor, groups: int = 1) -> Rows:
    """x (rows, columns) on int8, a scale per row: the numbers of `reference.quantize_rows`."""
    x = x.detach().float().contiguous()
    count, columns = x.shape
    held = count + panels.ROWS - 1
    codes = torch.empty(held, columns, dtype=torch.int8)
    scale, sums = torch.zeros(held, 1), torch.zeros(held, groups, dtype=torch.int32)
    codes[count:] = 0
    if x.numel():
        values, bits = x.numpy(), x.view(torch.int32).numpy()
        data, scales, totals = codes.numpy(), scale.view(-1).numpy(), sums.numpy()

        def work(start: int, stop: int) -> None:
            compiled.quantize_rows(values, bits, data, scales, start, stop)
            compiled.sum_rows(data, totals, start, stop)

        parallel_ranges(work, count, max(1, cpu.GRAIN // columns))
    return Rows(codes, scale, sums)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Same codes and scales, bit for bit, as `zotune.quant.kernels.reference.quantize_rows`."""
    codes, scale, _ = round_rows(x)
    return codes[: len(x)], scale[: len(x)]


def rescale_(
    out: Tensor,
    sums: Tensor,
    x_sums: Tensor,
    x_scale: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """out = (sums - x_sums zero) scale x_scale + bias: an integer product as float32 outputs.

    Args:
        out: contiguous float32 (tokens, out).
        sums: int32 (tokens, out), what `integer_matmul(x_codes, codes)` gave.
        x_sums: int32 (tokens, 1), the sums of the activations' codes, read where there is a zero.
        x_scale: float32 (tokens, 1).
        scale: (out, 1) or (1, 1).
        zero: like scale, or None.
        bias: (out,) or None.
    """
    tokens, outputs = out.shape
    if out.numel() == 0:
        return out
    scales, zeros, biases = (_row(values, outputs) for values in (scale, zero, bias))
    taken, totals, factors = (
        t.contiguous().numpy() for t in (sums, x_sums.view(-1), x_scale.reshape(-1))
    )
    target = out.numpy()
    parallel_ranges(
        lambda a, b: compiled.rescale_rows(
            taken, totals, factors, scales, zeros, biases, target, a, b
        ),
        tokens,
        max(1, cpu.GRAIN // outputs),
    )
    return out


def _row(values: Tensor | None, size: int) -> NDArray[Any]:
    """A float32 numpy vector of `size` values, one value repeated if need be, zeros for None."""
    if values is None:
        return torch.zeros(size).numpy()
    return values.detach().float().reshape(-1).expand(size).contiguous().numpy()
