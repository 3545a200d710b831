"""Fast probed forwards, one per layer type. Each equals `sites.generic`, and a test says so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.core.block import Block, FloatBlock
from zotune.core.sites import Part, Site, View, probed, rows_per_part
from zotune.models.adapter import LowRank
from zotune.quant import kernels
from zotune.quant.layer import QuantLayer
from zotune.quant.linear import QuantLinear
from zotune.quant.qat import FakeQuantLinear

_SMALL = 1 << 22  # elements of all parts' values at once, beyond which slices are cheaper


def values(view: View, block: Block) -> Tensor:
    """The block as each part sees it: (parts, *shape)."""
    if kernels.has_triton(block.device.type):
        from zotune.core import forwards_triton

        found = forwards_triton.points(view, block)
        if found is not None:
            return found
    pieces = []
    for number, probe in enumerate(view.probes):
        if probe.step == 0:
            pieces.append(block.value().expand(view.examples if view.lanes else 1, *block.shape))
        elif view.lanes:
            pieces.append(block.at(view.lane_directions(block, probe), probe.step))
        else:
            pieces.append(view.value(block, view.parts[number]).unsqueeze(0))
    return torch.cat(pieces)


def by_part(view: View, x: Tensor, each: int) -> Tensor:
    """(parts * each, ..., features) -> (parts, tokens of a part, features)."""
    return x.reshape(len(view.parts), -1, x.shape[-1])


def _at(site: Site, view: View, part: Part, attribute: str) -> Any:
    """What the rows of `part` see under a name of the module: a block's value, or its own."""
    block = site.blocks.get(attribute)
    return getattr(site.module, attribute) if block is None else view.value(block, part)


def _sliceable(site: Site, x: Tensor) -> bool:
    """Whether slices of one output can take the place of outputs put together."""
    tensors = (x, *site.module.parameters())
    return (
        not site.wrapped
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and x.device.type == "cpu"
        and x.dim() > 1
        and x.numel() > 0
        and x.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
    )


def too_large(view: View, site: Site) -> bool:
    """Whether all parts' values at once would cost more than slices do."""
    return len(view.parts) * max(b.numel for b in site.blocks.values()) > _SMALL


def _factors(view: View, block: Block | None) -> tuple[Tensor, Tensor, list[float]] | None:
    """Factors of each part's direction, (parts, rows, r) and (parts, r, columns), and its step;
    None where the parts' values are not theta + step left @ right."""
    if not isinstance(block, FloatBlock) or block.minimum is not None:
        return None
    if not isinstance(block.reach, float):
        return None
    probes = [view.probes[part.probe] for part in view.parts]
    keys = [
        probe.key if part.lane is None else view.lane_key(probe, part.lane)
        for probe, part in zip(probes, view.parts, strict=True)
    ]
    drawn = list(dict.fromkeys(keys))  # +eps and -eps share a direction
    found = view.perturbation.factors(drawn, block)
    if found is None:
        return None
    places = [drawn.index(key) for key in keys]
    return found[0][places], found[1][places], [probe.step * block.reach for probe in probes]


@probed(LowRank)
def low_rank(site: Site, view: View, x: Tensor) -> Any:
    """One product with a shared A, one batched product with the parts' own B."""
    module = site.module
    assert isinstance(module, LowRank)
    each = rows_per_part(site, view, len(x))
    if not each or too_large(view, site):
        return NotImplemented
    if "A" in site.blocks:
        hidden = by_part(view, x, each) @ values(view, site.blocks["A"]).to(x.dtype).mT
    else:
        hidden = by_part(view, F.linear(x, module.A.to(x.dtype)), each)
    if "B" in site.blocks:
        out = hidden @ (module.scaling * values(view, site.blocks["B"])).to(x.dtype).mT
    else:
        out = hidden @ (module.scaling * module.B).to(x.dtype).mT
    return out.view(*x.shape[:-1], -1)


@probed(nn.Linear)
def linear(site: Site, view: View, x: Tensor) -> Any:
    """Low-rank directions beside one product with the weight, which is never perturbed. Others:
    per example on a small layer (a head) one batched product, else part by part."""
    module = site.module
    assert isinstance(module, nn.Linear)
    each = rows_per_part(site, view, len(x))
    if not each:
        return NotImplemented
    parts = by_part(view, x, each)
    factors = _factors(view, site.blocks.get("weight"))
    if factors is None and kernels.has_triton(x.device.type):
        from zotune.core import forwards_triton

        found = forwards_triton.linear(site, view, parts)
        if found is not None:
            return found.view(*x.shape[:-1], module.out_features)
    if factors is None and (not view.lanes or too_large(view, site)):
        return _linear_parts(site, view, x, each)
    if factors is not None:
        left, right, steps = factors
        left = left * torch.tensor(steps, device=x.device).view(-1, 1, 1)
        hidden = parts @ right.to(x.dtype).mT
        out = F.linear(parts, module.weight).baddbmm_(hidden, left.to(x.dtype).mT)
    elif "weight" in site.blocks:
        out = parts @ values(view, site.blocks["weight"]).mT
    else:
        out = F.linear(parts, module.weight)
    if "bias" in site.blocks:
        out = out + values(view, site.blocks["bias"]).unsqueeze(1)
    elif module.bias is not None:
        out = out + module.bias
    return out.view(*x.shape[:-1], module.out_features)


def _linear_parts(site: Site, view: View, x: Tensor, each: int) -> Any:
    from zotune.quant.kernels import parts

    module = site.module
    assert isinstance(module, nn.Linear)
    if len(view.parts) == 1 or not _sliceable(site, x):
        return NotImplemented
    out = x.new_empty(*x.shape[:-1], module.out_features)
    rows = zip(view.parts, by_part(view, x, each), by_part(view, out, each), strict=True)
    for part, source, target in rows:
        weight, bias = _at(site, view, part, "weight"), _at(site, view, part, "bias")
        parts.product_(target, source, weight, bias)
    return out


@probed(nn.LayerNorm)
def layer_norm(site: Site, view: View, x: Tensor) -> Any:
    """One normalisation for all parts, then each part's gain and bias."""
    module = site.module
    assert isinstance(module, nn.LayerNorm)
    each = rows_per_part(site, view, len(x))
    if not each or len(module.normalized_shape) != 1:
        return NotImplemented
    out = by_part(view, F.layer_norm(x, module.normalized_shape, eps=module.eps), each)
    for attribute, apply in (("weight", torch.mul), ("bias", torch.add)):
        own = getattr(module, attribute)
        if attribute in site.blocks:
            out = apply(out, values(view, site.blocks[attribute]).unsqueeze(1))
        elif own is not None:
            out = apply(out, own)
    return out.view(x.shape).to(x.dtype)


@probed(nn.Embedding)
def embedding(site: Site, view: View, ids: Tensor) -> Any:
    """Only the rows that the batch looks up are drawn."""
    module, block = site.module, site.blocks["weight"]
    assert isinstance(module, nn.Embedding)
    assert isinstance(block, FloatBlock)
    each = rows_per_part(site, view, len(ids))
    if not each or module.max_norm is not None or not isinstance(block.reach, float):
        return NotImplemented
    if kernels.has_triton(ids.device.type):
        from zotune.core import forwards_triton

        found = forwards_triton.embedding(view, block, ids)
        if found is not None:
            return found
    if view.lanes:
        return _embedded_lanes(view, block, ids)
    rows, place = torch.unique(ids, return_inverse=True)
    drawn: dict[Any, Tensor] = {}
    tables = []
    for probe in view.probes:
        if probe.key not in drawn and probe.step:
            drawn[probe.key] = view.perturbation.draw_rows(probe.key, block, rows.tolist())
        tables.append(block.at_rows(rows, drawn.get(probe.key), probe.step))
    offsets = torch.arange(len(view.probes), device=ids.device) * len(rows)
    place = place.view(len(view.probes), -1) + offsets.unsqueeze(1)
    return F.embedding(place.view(ids.shape), torch.cat(tables))


def _embedded_lanes(view: View, block: FloatBlock, ids: Tensor) -> Any:
    """Low-rank directions per example: of each only the rows that its example looks up."""
    factors = _factors(view, block)
    if factors is None:
        return NotImplemented
    left, right, _ = factors
    pieces = []
    for p, rows in enumerate(ids.reshape(len(view.parts), -1)):
        step = view.probes[view.parts[p].probe].step
        pieces.append(block.at_rows(rows, left[p, rows] @ right[p] if step else None, step))
    return torch.cat(pieces).view(*ids.shape, -1)


@probed(QuantLinear)
def quant_linear(site: Site, view: View, x: Tensor) -> Any:
    """Scales per output channel: one product with the codes serves all parts. Else part by part."""
    module = site.module
    assert isinstance(module, QuantLinear)
    each = rows_per_part(site, view, len(x))
    if not each:
        return NotImplemented
    if _kernel(x, module) == "triton" and "codes" not in site.blocks:
        return _stacked(site, view, x)
    if module.scheme.integer_inputs or not scaled_outputs(site, module):
        found = _quant_parts(site, view, x, each)
        if found is not NotImplemented or not scaled_outputs(site, module):
            return found
    scale = values(view, site.blocks["scale"]).mT  # (parts, 1, out or 1)
    out = by_part(view, module.unscaled(x), each) * scale
    if module.bias is not None:
        out = out + module.bias
    return out.view(*x.shape[:-1], -1).to(x.dtype)


def _kernel(x: Tensor, module: QuantLinear) -> str:
    return kernels.chosen(x, module.scale, module.zero, module.bias)


def _stacked(site: Site, view: View, x: Tensor) -> Tensor:
    """All parts in one launch, which unpacks the codes once for two of them, and draws the
    directions of scales by itself where it can."""
    from zotune.core import forwards_triton
    from zotune.quant.kernels import triton

    module = site.module
    assert isinstance(module, QuantLinear)
    drawn = forwards_triton.scale_directions(site, view, module)

    def points(name: str, own: Tensor | None) -> Tensor | None:
        if name in site.blocks and not (drawn and name == "scale"):
            return values(view, site.blocks[name])
        return None if own is None else own[None]

    scale, zero, bias = (points(name, getattr(module, name)) for name in ("scale", "zero", "bias"))
    assert scale is not None
    parts = module.inputs(x).reshape(len(view.parts), -1, x.shape[-1])
    out = triton.stacked(
        parts, module.codes, scale, zero, bias, module.scheme, module.compute_dtype, drawn
    )
    return out.view(*x.shape[:-1], -1)


def scaled_outputs(site: Site, module: QuantLayer) -> bool:
    """Whether parts differ in nothing but factors of the layer's outputs."""
    return set(site.blocks) == {"scale"} and module.zero is None and module.scale.shape[1] == 1


def _quant_parts(site: Site, view: View, x: Tensor, each: int) -> Any:
    from zotune.quant.kernels import parts
    from zotune.quant.kernels.rounded import Point

    module = site.module
    assert isinstance(module, QuantLinear)
    if len(view.parts) == 1 or not _sliceable(site, x):
        return NotImplemented
    if _kernel(x, module) != "cpu":
        return NotImplemented
    # Codes that are numbers of a table are looked up once for all parts.
    own = module.codes if module.scheme.kind == "int" else module.unpacked()
    points = (
        Point(
            _at(site, view, part, "codes") if "codes" in site.blocks else own,
            *(_at(site, view, part, name) for name in ("scale", "zero", "bias")),
        )
        for part in view.parts
    )
    out = parts.linear(
        by_part(view, module.inputs(x), each), points, module.out_features, module.scheme,
        module.compute_dtype, same_codes="codes" not in site.blocks,
    )  # fmt: skip
    return out.view(*x.shape[:-1], -1)


@probed(FakeQuantLinear)
def fake_quant_linear(site: Site, view: View, x: Tensor) -> Any:
    """All parts' weights rounded at once, where they are small; one batched product."""
    module = site.module
    assert isinstance(module, FakeQuantLinear)
    each = rows_per_part(site, view, len(x))
    if not each or too_large(view, site):
        return NotImplemented
    found = {attribute: values(view, block) for attribute, block in site.blocks.items()}
    return module.at(by_part(view, x, each), **found).view(*x.shape[:-1], -1)
