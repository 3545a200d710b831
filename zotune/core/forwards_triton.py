"""Probed forwards on GPUs that draw their directions inside their kernels.

They read keys and steps from one table per evaluation (`View.streams`), which a recorded forward
finds again at its next replay. What they cannot do is left to the forwards of `forwards.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zotune.core import dense_triton, noise_triton, points_triton
from zotune.core.block import Block, FloatBlock
from zotune.quant.kernels import triton
from zotune.quant.kernels.directions import Drawn
from zotune.quant.kernels.floats import KINDS
from zotune.quant.linear import QuantLinear

if TYPE_CHECKING:
    from zotune.core.sites import Part, Site, View

SCRATCH = 1 << 25  # weights of one part that lie perturbed in memory at once


def drawn(view: View, block: Block, part: Part | None = None) -> Drawn | None:
    """How a kernel draws this block's directions, of all parts or one; None where it cannot."""
    if not isinstance(block, FloatBlock) or type(block).at is not FloatBlock.at:
        return None
    law = view.perturbation.independent(block)
    held = block.master.dtype in KINDS and block.tensor.dtype in KINDS
    if law is None or not held or not block.master.is_contiguous():
        return None
    reach, over = block.reach, 1
    if isinstance(reach, Tensor):
        over = spacing(reach, block)
        if not over:
            return None
    streams = view.streams(block.device)
    if part is not None:
        index = view.index(part)
        streams = streams[index : index + 1]
    if len(streams) > triton.MOST:
        return None
    return Drawn(
        streams, noise_triton.words(view.probes[0].key.seed, block.name), law.law, law.gain,
        law.most, reach if isinstance(reach, Tensor) else None,
        1.0 if isinstance(reach, Tensor) else reach, over, block.minimum,
        part is None and view.paired, view.examples if view.lanes else 1,
    )  # fmt: skip


def spacing(values: Tensor, block: Block) -> int:
    """For how many numbers of a block in a row each of these stands: all, a row's, one; else 0."""
    if not values.is_contiguous() or values.dtype != torch.float32:
        return 0
    if values.numel() == block.numel:
        return 1
    by_row = values.dim() == len(block.shape) and values.numel() == block.rows == len(values)
    return block.numel // block.rows if by_row else block.numel * (values.numel() == 1)


def points(
    view: View, block: Block, part: Part | None = None, start: int = 0, stop: int | None = None
) -> Tensor | None:
    """Rows of a block as each part sees them, (parts, *shape), or as one does: (1, *shape)."""
    how = drawn(view, block, part)
    if how is None:
        return None
    assert isinstance(block, FloatBlock)
    theta = block.master[start:stop] if block.shape else block.master
    width = block.numel // max(1, block.rows)
    return points_triton.points(theta, how, block.tensor.dtype, start * width, theta.shape)


def linear(site: Site, view: View, parts: Tensor) -> Tensor | None:
    """parts (parts, tokens, in) by a float layer: drawn in the product where there are few rows,
    since each tile of rows draws anew; else from a scratch that one launch fills for all parts."""
    module, block = site.module, site.blocks.get("weight")
    assert isinstance(module, nn.Linear)
    if block is None or torch.is_autocast_enabled(parts.device.type):
        return None
    how = drawn(view, block)
    if how is None or parts.dtype != module.weight.dtype or _wanted(module, parts):
        return None
    assert isinstance(block, FloatBlock)
    bias: Tensor | None = None if module.bias is None else module.bias.unsqueeze(0)
    if "bias" in site.blocks:
        bias = points(view, site.blocks["bias"])
        if bias is None:
            return None
    _, tokens, columns = parts.shape
    if dense_triton.few(tokens, columns, parts.dtype):
        return dense_triton.linear(parts, block.master, bias, how)
    return _by_scratch(view, block, parts, bias)


def _by_scratch(view: View, block: FloatBlock, parts: Tensor, bias: Tensor | None) -> Tensor:
    out = parts.new_empty(*parts.shape[:2], block.rows)
    run = max(1, SCRATCH // max(1, block.shape[1]))
    for start in range(0, block.rows, run):
        here = slice(start, min(start + run, block.rows))
        weight = points(view, block, None, here.start, here.stop)
        assert weight is not None
        if bias is None:
            out[..., here] = parts @ weight.mT
        else:
            out[..., here] = torch.baddbmm(bias[:, None, here], parts, weight.mT)
    return out


def _wanted(module: nn.Module, x: Tensor) -> bool:
    """Whether somebody wants a gradient through this product."""
    tensors: Sequence[Tensor] = (x, *module.parameters())
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def scale_directions(site: Site, view: View, module: QuantLinear) -> Drawn | None:
    """How the product draws the directions of a layer's scales; None where it is given values.

    Scales that lie in float32 as the module holds them, and groups that tiles do not straddle.
    """
    block = site.blocks.get("scale")
    groups = module.scale.shape[1]
    if block is None or len(module.scale) != module.rows:
        return None
    if not triton.uniform(module.scheme, module.columns, groups):
        return None
    how = drawn(view, block)
    own = isinstance(block, FloatBlock) and block.master.data_ptr() == module.scale.data_ptr()
    return how if own else None


def embedding(view: View, block: FloatBlock, ids: Tensor) -> Tensor | None:
    """Rows of an embedding as the part of each token sees them."""
    how = drawn(view, block)
    if how is None or ids.numel() % len(view.parts):
        return None
    return points_triton.rows(block.master, ids, how, block.tensor.dtype)
