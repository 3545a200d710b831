"""Updates in one sweep: g is drawn, made a step and subtracted where the numbers lie.

A rule that turns each number of g into a step by itself says so (`Rule.elementwise`), a law that a
kernel can draw says how (`Perturbation.independent`). Where both do, and the device has kernels, a
block is moved in one launch, and g never exists. Everything else goes on as in `step.py`; both
leave the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from zotune.core.block import Block
from zotune.core.noise import Key
from zotune.core.perturbation import Perturbation
from zotune.core.rule import Rule
from zotune.quant.kernels import has_triton


def swept_(
    block: Block,
    rule: Rule,
    perturbation: Perturbation,
    keys: Sequence[Key],
    weights: Sequence[float],
    lr: float,
    key: Key,
) -> bool:
    """block -= stride * rule(sum_k weights_k u_k), all in one launch; False if that is not possible
    and nothing has moved.

    keys, weights: of g, as `Perturbation.combine` takes them. key: of the rounding noise.
    """
    how, law = rule.elementwise(lr), perturbation.independent(block)
    if block.exact or how is None or law is None or not has_triton(block.device.type):
        return False
    if isinstance(block.stride, Tensor) and block.grid is not None:
        return False
    from zotune.core import sweep_triton

    return sweep_triton.swept_(block, how, law, keys, weights, key)
