"""Fast probed forwards of layers over images (batch, channels, height, width)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zotune.core.block import Block
from zotune.core.forwards import scaled_outputs, too_large, values
from zotune.core.sites import Site, View, probed, rows_per_part
from zotune.models.shift import Shift
from zotune.quant.conv import QuantConv2d, geometry_of


def _per_channel(view: View, values: Tensor, like: Tensor) -> Tensor:
    """(parts, channels or 1) -> what broadcasts with images: (rows, channels or 1, 1, 1)."""
    each = len(like) // len(view.parts)
    return values.repeat_interleave(each, 0)[..., None, None].to(like.dtype)


@probed(QuantConv2d)
def quant_conv2d(site: Site, view: View, x: Tensor) -> Any:
    """Scales per output channel: one product with the codes serves all parts. Else part by part."""
    module = site.module
    assert isinstance(module, QuantConv2d)
    if not rows_per_part(site, view, len(x)) or not scaled_outputs(site, module):
        return NotImplemented
    scale = values(view, site.blocks["scale"]).squeeze(-1)
    out = module.unscaled(x)
    out = out * _per_channel(view, scale, out)
    if module.bias is not None:
        out = out + module.bias[:, None, None]
    return out.to(x.dtype)


@probed(nn.Conv2d)
def conv2d(site: Site, view: View, x: Tensor) -> Any:
    """Biases: one product serves all parts. Weights per example: one convolution in groups."""
    module = site.module
    assert isinstance(module, nn.Conv2d)
    each, bias = rows_per_part(site, view, len(x)), site.blocks.get("bias")
    if not each or x.dim() != 4:
        return NotImplemented
    if "weight" not in site.blocks:
        out = module._conv_forward(x, module.weight, None)
    elif each == 1 and view.lanes and module.groups == 1 and not too_large(view, site):
        out = _in_groups(module, x, values(view, site.blocks["weight"]))
    else:
        return NotImplemented
    if bias is not None:
        return out + _per_channel(view, values(view, bias), out)
    return out if module.bias is None else out + module.bias[:, None, None]


def _in_groups(module: nn.Conv2d, x: Tensor, weights: Tensor) -> Tensor:
    """Each image (rows, in, height, width) with its own weight (rows, out, in, kh, kw)."""
    geometry = geometry_of(module, groups=len(x))
    out = geometry.convolve(x.reshape(1, -1, *x.shape[2:]), weights.flatten(0, 1))
    return out.view(len(x), -1, *out.shape[2:])


@probed(nn.BatchNorm2d)
def batch_norm(site: Site, view: View, x: Tensor) -> Any:
    """gain (x - mean) / std + bias with fixed statistics: one factor and one term per channel."""
    module = site.module
    assert isinstance(module, nn.BatchNorm2d)
    mean, variance = module.running_mean, module.running_var
    if not rows_per_part(site, view, len(x)) or mean is None or variance is None:
        return NotImplemented

    def seen(block: Block | None, own: Tensor) -> Tensor:
        return own if block is None else values(view, block).float()

    factor = seen(site.blocks.get("weight"), module.weight) * (variance + module.eps).rsqrt()
    term = seen(site.blocks.get("bias"), module.bias) - factor * mean
    size = (len(view.parts), -1)
    factor, term = (_per_channel(view, t.expand(*size), x) for t in (factor, term))
    return x.mul(factor).add_(term)


@probed(Shift)
def shift(site: Site, view: View, y: Tensor) -> Any:
    """One factor and one term per channel and part."""
    module = site.module
    assert isinstance(module, Shift)
    if y.dim() != 4 or not rows_per_part(site, view, len(y)):
        return NotImplemented
    factor, term = (
        _per_channel(view, t, y) for t in module.affine(values(view, site.blocks["share"]))
    )
    return y.mul(factor).add_(term)
