"""GPTQ: columns are rounded one by one, and the rest makes up for each error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
2022, arXiv 2210.17323. The error of a layer's outputs, tr(E H E^T) with H = 2 X X^T and E the error
of its weights, is kept small: column q is rounded, and all columns behind it move by

    delta = -(w_q - quant(w_q)) / [H^-1]_qq (H^-1)_q,:

where H^-1 loses row and column q afterwards. All these rows at once are those of U in
H^-1 = U^T U (upper Cholesky factor), up to a factor: (H^-1)_q,: / [H^-1]_qq = U_q,: / U_qq. Columns
are taken in blocks, so that most of the update is one product per block.

Changed: the grid of a group is fitted to weights with all updates so far, those inside its block
included. Inputs that were always zero keep their weights, rounded to nearest, instead of losing
them. With `act_order` groups are fitted beforehand, in their place (static groups), unless
`static_groups` is off; then columns of a group lie apart, and the checkpoint needs a g_idx.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from zotune.errors import BadInput
from zotune.quant.affine import nearest, per_weight
from zotune.quant.calibrate.method import AbstractRounder, Grid, Rounded


@dataclass(frozen=True)
class Gptq(AbstractRounder):
    """GPTQ with the paper's damping and block size.

    Args:
        damping: added to H's diagonal, as a share of its mean; ten times as much where H is still
            singular.
        block: columns between two full updates; rounded to whole groups.
        act_order: take the columns with the largest inputs first.
        static_groups: with act_order, fit groups of neighbours before any update.

    Raises:
        BadInput: for a damping or block that is not positive.

    >>> Gptq(act_order=True)
    Gptq(damping=0.01, block=128, act_order=True, static_groups=True)
    """

    name: ClassVar[str] = "gptq"
    gram: ClassVar[bool] = True
    damping: float = 0.01
    block: int = 128
    act_order: bool = False
    static_groups: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise BadInput(f"damping={self.damping}; want 0 < damping <= 1")
        if self.block < 1:
            raise BadInput(f"block={self.block}; want 1 or more columns")

    def round(self, weight: Tensor, grid: Grid, gram: Tensor | None, name: str) -> Rounded:
        """Codes in the weight's order of columns, or with the order they are in."""
        assert gram is not None
        weight = weight.detach().to(gram.dtype)
        columns, size = weight.shape[1], grid.scheme.group_size
        order = gram.diagonal().argsort(descending=True, stable=True) if self.act_order else None
        apart = order is not None and size is not None and not self.static_groups
        fixed = None if size is not None and (order is None or apart) else grid.fit(weight, name)
        if order is not None:
            weight, gram = weight[:, order], gram[order][:, order]
            if fixed is not None:
                fixed = _spread(fixed, order, columns, size)
        upper = inverse_factor(gram, self.damping, name)
        codes, scale, zero = _rounded(weight, upper, grid, fixed, self.block, name)
        if order is None:
            return Rounded(codes, scale, zero)
        if apart:
            return Rounded(codes, scale, zero, order.to(torch.int32))
        back = torch.argsort(order)
        scale, zero = _gathered((scale, zero), back, size)
        return Rounded(codes[:, back].contiguous(), scale, zero)


def inverse_factor(gram: Tensor, damping: float, name: str = "layer") -> Tensor:
    """U, upper triangular, with (H + damping mean(diag H) I)^-1 = U^T U.

    A scale of H changes nothing but U's, which cancels in every update.

    Raises:
        BadInput: if H is not finite.

    >>> inverse_factor(torch.eye(2) * 4, damping=1e-9).diagonal().tolist()
    [0.5, 0.5]
    """
    damped = gram.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1.0  # never seen: nothing to make up for, and nothing that could
    mean = float(diagonal.mean())
    share = damping
    while share <= 1e3:
        diagonal += share * mean
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed and bool(torch.isfinite(upper).all()):
                return upper
        share *= 10
    raise BadInput(f"the inputs of {name!r} have no finite second moments; check the calibration")


Affine = tuple[Tensor, Tensor | None]


def compensated(
    weight: Tensor, upper: Tensor, rounded: Callable[[int, Tensor], Tensor], block: int = 128
) -> Tensor:
    """Weights (out, in) as they are when their column's turn to be rounded comes: each has made up
    for the errors of the columns before it.

    Args:
        weight: (out, in).
        upper: U of `inverse_factor`, (in, in).
        rounded: of a column's number and it with all behind it in its block (columns, out), gives
            the column rounded, (out,).
        block: columns between two full updates.

    >>> upper = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    >>> compensated(torch.tensor([[0.5, 0.25]]), upper, lambda k, part: part[0].round()).tolist()
    [[0.5, -0.25]]
    """
    rest = weight.t().clone(memory_format=torch.contiguous_format)  # a column side by side
    columns = weight.shape[1]
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part, errors = rest[start:stop], torch.empty_like(rest[start:stop])
        for k in range(stop - start):
            row = upper[start + k, start + k : stop]
            torch.div(part[k] - rounded(start + k, part[k:]), row[0], out=errors[k])
            part[k + 1 :].addcmul_(row[1:, None], errors[k], value=-1)
        rest[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
    return rest.t()


def _rounded(
    weight: Tensor, upper: Tensor, grid: Grid, fixed: Affine | None, block: int, name: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scale and zero. fixed: one grid per column, or per row; None to fit group by group."""
    size = grid.scheme.group_size if fixed is None else None
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    fitted: list[Affine] = []
    inner = Grid(replace(grid.scheme, granularity="channel", group_size=None), grid.stored)

    def rounded(k: int, part: Tensor) -> Tensor:
        if size and k % size == 0:
            fitted.append(inner.fit(part[:size].t(), name))
        scale, zero = fitted[-1] if fixed is None else _column(fixed, k)
        code = nearest(part[0].unsqueeze(1), scale, zero, inner.scheme)
        value = code.to(part.dtype) if zero is None else code - zero.to(part.dtype)
        codes[:, k] = code[:, 0]
        return (value * scale).squeeze(1)

    compensated(weight, upper, rounded, -(-block // size) * size if size else block)
    if fixed is not None:
        return codes, *fixed
    zeros = [zero for _, zero in fitted if zero is not None]
    return codes, torch.cat([s for s, _ in fitted], 1), torch.cat(zeros, 1) if zeros else None


def _column(fixed: Affine, k: int) -> Affine:
    """The grid of one column out of one per column, per row or for all."""
    scale, zero = fixed
    if scale.shape[1] == 1:
        return fixed
    return scale[:, k : k + 1], None if zero is None else zero[:, k : k + 1]


def _spread(fixed: Affine, order: Tensor, columns: int, size: int | None) -> Affine:
    """Grids of groups as one per column, in another order of columns; others as they are."""
    if size is None:
        return fixed
    scale, zero = (None if t is None else per_column(t, columns, size)[:, order] for t in fixed)
    assert scale is not None
    return scale, zero


def per_column(values: Tensor, columns: int, size: int) -> Tensor:
    """(out, groups) -> (out, columns), also for a single group."""
    return per_weight(values, columns, size).expand(-1, columns)


def _gathered(spread: Affine, back: Tensor, size: int | None) -> Affine:
    """The inverse of `_spread`."""
    if size is None:
        return spread
    scale, zero = (None if t is None else t[:, back][:, ::size].contiguous() for t in spread)
    assert scale is not None
    return scale, zero


METHOD = Gptq
