"""Affine quantization: weight = (code - zero) * scale.

Codes are signed and centred integers in [-2^(b-1), 2^(b-1) - 1], or float numbers of few bits
(`zotune.quant.codebooks`). A symmetric scheme has no zero; an asymmetric one keeps its zero in the
same centred coordinates. Everything here is a pure function of tensors, written in float32, and
serves as the reference for every kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from zotune.errors import BadInput
from zotune.quant.scheme import Scheme

# The scale of an all-zero group: exact in float16, and harmless when codes move.
EMPTY_SCALE: Final = 2.0**-20


def quantize(
    weight: Tensor, scheme: Scheme, name: str = "weight"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round a weight to the nearest point of the grid that `fit` chooses for it.

    The grid covers every weight, so the error is at most scale / 2.

    Returns:
        codes int8 (out, in); scale and zero as from `fit`.

    Raises:
        BadInput: as `fit`.

    >>> codes, scale, zero = quantize(torch.tensor([[-8.0, 3.4]]), Scheme.parse("int4-channel"))
    >>> codes.tolist(), scale.item(), zero
    ([[-8, 3]], 1.0, None)
    """
    scale, zero = fit(weight, scheme, name)
    return nearest(weight, scale, zero, scheme), scale, zero


def fit(
    weight: Tensor, scheme: Scheme, name: str = "weight", stored: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor | None]:
    """The smallest grid that covers a weight.

    symmetric:  scale = max(max(w) / (2^(b-1) - 1), -min(w) / 2^(b-1))
    asymmetric: scale = (max(w, 0) - min(w, 0)) / (2^b - 1)
                zero  = round(-2^(b-1) - min(w, 0) / scale)

    Args:
        weight: (out, in), any float dtype.
        scheme: what to quantize to.
        name: the layer's name, for messages.
        stored: dtype that the scale is rounded to, so that codes fit the grid of the file.

    Returns:
        scale float32 and zero float32 or None, both shaped by `Scheme.scale_shape`.

    Raises:
        BadInput: if the weight is not a finite matrix or the group size does not divide it.
    """
    if weight.dim() != 2:
        raise BadInput(f"weight of {name!r} has shape {tuple(weight.shape)}; wanted (out, in)")
    if scheme.kind != "int":
        raise BadInput(f"scheme {scheme} is read from checkpoints only; quantize to integers")
    scheme.check_divides(weight.shape[1], name)
    shape = scheme.scale_shape(weight.shape[0], weight.shape[1])
    grouped = in_groups(weight.detach().float().contiguous(), shape[1], scheme.group_size)
    if not torch.isfinite(grouped).all():
        raise BadInput(
            f"weight of {name!r} holds NaN or infinity; repair the checkpoint or exclude it"
        )
    return grid(*extremes(grouped, shape), scheme, stored)


def nearest(weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """int8 codes (out, in) of the grid points nearest to a weight: round(w / scale + zero)."""
    # A transposed weight must not leave codes with transposed strides.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    grouped = in_groups(weight.detach().to(dtype).contiguous(), scale.shape[1], scheme.group_size)
    return rounded(grouped, scale, zero, scheme).to(torch.int8).reshape(weight.shape)


def grid(
    low: Tensor, high: Tensor, scheme: Scheme, stored: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero of the grid between two ends and 0, any shape; see `fit`."""
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if scheme.symmetric:
        scale = torch.maximum(high / scheme.highest, low / scheme.lowest)
        return _not_empty(_not_empty(scale).to(stored).float()), None
    scale = _not_empty((high - low) / (scheme.highest - scheme.lowest))
    scale = _not_empty(scale.to(stored).float())
    zero = scheme.lowest - low / scale
    return scale, straight(torch.round, zero).clamp(scheme.lowest, scheme.highest)


def rounded(grouped: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """Codes, still floats, of a weight (out, groups, columns of a group) on its grid."""
    codes = grouped / scale.unsqueeze(-1)
    if zero is not None:
        codes = codes + zero.unsqueeze(-1)
    return straight(torch.round, codes).clamp(scheme.lowest, scheme.highest)


def straight(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), whose gradient, where one is wanted, is that of x itself.

    >>> x = torch.tensor([1.4], requires_grad=True)
    >>> straight(torch.round, x).backward(); x.grad.item()
    1.0
    """
    return x + (function(x) - x).detach() if x.requires_grad else function(x)


def dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor | None = None, group_size: int | None = None
) -> Tensor:
    """The float32 weight (codes - zero) * scale.

    Args:
        codes: (out, in), integers or, for probed values, fractional floats.
        scale: (out, groups), (out, 1) or (1, 1).
        zero: like scale, or None for symmetric grids.
        group_size: columns in a group, the last of which may be shorter; None: all equally long.

    >>> dequantize(torch.tensor([[1, -2]], dtype=torch.int8), torch.tensor([[0.5]])).tolist()
    [[0.5, -1.0]]
    """
    grouped = in_groups(codes.float(), scale.shape[1], group_size)
    if zero is not None:
        grouped = grouped - zero.float().unsqueeze(-1)
    return (grouped * scale.float().unsqueeze(-1)).flatten(1)[:, : codes.shape[1]]


def per_weight(values: Tensor, columns: int, group_size: int | None) -> Tensor:
    """Values of groups (out, groups) once per column; (out, 1) and (1, 1) stay as they are.

    >>> per_weight(torch.tensor([[1.0, 2.0]]), columns=3, group_size=2).tolist()
    [[1.0, 1.0, 2.0]]
    """
    groups = values.shape[1]
    if groups == 1:
        return values
    return values.repeat_interleave(group_size or columns // groups, dim=1)[:, :columns]


def in_groups(matrix: Tensor, groups: int, group_size: int | None) -> Tensor:
    """View (..., out, in) as (..., out, groups, columns of a group); a short last one is padded."""
    columns = matrix.shape[-1]
    width = group_size or columns // groups
    if groups * width != columns:
        matrix = torch.nn.functional.pad(matrix, (0, groups * width - columns))
    return matrix.reshape(*matrix.shape[:-1], groups, width)


def extremes(grouped: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of every group, (..., *shape); zeros where there are none."""
    if grouped.numel() == 0:
        empty = grouped.new_zeros(*grouped.shape[:-3], *shape)
        return empty, empty.clone()
    if shape == (1, 1):
        one = grouped.flatten(-3)
        return one.amin(-1)[..., None, None], one.amax(-1)[..., None, None]
    return grouped.amin(-1), grouped.amax(-1)


def _not_empty(scale: Tensor) -> Tensor:
    """Replace scales too small to divide by (all-zero groups) by EMPTY_SCALE."""
    return torch.where(scale > torch.finfo(torch.float32).tiny, scale, EMPTY_SCALE)
