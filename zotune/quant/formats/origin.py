"""Where a model came from, what of it has changed since, and what storing it will round."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.quant.formats.layout import Layout, values_of
from zotune.quant.formats.shards import Entry, raw_bytes
from zotune.quant.formats.tensors import listing
from zotune.quant.layer import QuantLayer
from zotune.quant.linear import QuantLinear

log = logging.getLogger("zotune")
_ATTRIBUTE: Final = "zotune_source"
_COARSE: Final = 0.01  # of a scale; 16-bit floats round by 0.4 % at most
_BUFFERS: Final = ("codes", "scale", "zero", "order", "input_clip")


@dataclass(frozen=True)
class Source:
    """Where a model came from; each of its QuantLinear layers holds its own `Layout` as `storage`.

    dtypes: what float tensors are stored in, by the model's names. prefix: what the checkpoint's
    names have in front of the model's ("model." for the body alone).
    """

    format: str
    folder: Path
    dtypes: Mapping[str, torch.dtype]
    prefix: str = ""


def source_of(model: nn.Module) -> Source | None:
    """The source of a model that a `SourceFormat` read; None for all others."""
    found = getattr(model, _ATTRIBUTE, None)
    return found if isinstance(found, Source) else None


def set_source_(model: nn.Module, source: Source) -> None:
    """Note where a model came from, so that it is written in that format again."""
    setattr(model, _ATTRIBUTE, source)


def round_to_storage_(model: nn.Module) -> None:
    """Make a model what its file will hold, so that memory and file give the same numbers.

    Scales and zeros of quantized layers are rounded to their storage; in a model that has a source,
    float tensors to the dtype they have there.
    """
    coarsest = 0.0
    for _, layer in quantized(model):
        before = layer.scale.clone()
        layer.round_to_storage_()
        change = (layer.scale / before - 1).abs().nan_to_num(0.0, posinf=0.0)
        coarsest = max(coarsest, float(change.max()) if change.numel() else 0.0)
    if coarsest > _COARSE:
        log.warning(
            "the checkpoint's format stores scales coarsely: rounding moves them by up to %.0f %%; "
            "smaller steps of training are lost. Tune norms, biases or adapters instead",
            100 * coarsest,
        )
    source = source_of(model)
    dtypes = source.dtypes if source is not None else {}
    for name, tensor in float_tensors(model):
        if name in dtypes:
            tensor.copy_(tensor.to(dtypes[name]))


def changes(
    model: nn.Module, source: Source, found: Mapping[str, Entry]
) -> Iterator[tuple[str, Tensor]]:
    """Stored names and new tensors of what differs from the file."""
    for name, layer in quantized(model):
        layout, start = layer.storage, f"{source.prefix}{name}."
        assert isinstance(layout, Layout)
        assert isinstance(layer, QuantLinear)
        if not torch.equal(layout.rounded(layer.scale, layer.zero)[0], layer.scale):
            log.warning(
                "scales of %s are rounded; round_to_storage_ does so before measuring", name
            )
        stored = {n.removeprefix(start): e for n, e in found.items() if n.startswith(start)}
        kept = layout.encode(layout.decode({k: e.read() for k, e in stored.items()}))
        for part, tensor in layout.encode(values_of(layer)).items():
            if not torch.equal(raw_bytes(tensor), raw_bytes(kept[part])):
                yield start + part, tensor
    for name, tensor in float_tensors(model):
        entry = found.get(source.prefix + name)
        if entry is not None:
            tensor = tensor.detach().cpu().to(entry.dtype)
            if not torch.equal(raw_bytes(tensor), raw_bytes(entry.read())):
                yield source.prefix + name, tensor


def check_places(model: nn.Module, source: Source, found: Mapping[str, Entry]) -> None:
    """Refuse a model that has more than its source."""
    foreign = [n for n, layer in quantized(model) if not isinstance(layer.storage, Layout)]
    floats = dict(float_tensors(model))
    places = {t.data_ptr() for n, t in floats.items() if source.prefix + n in found}
    # A tied tensor is stored under one of its names.
    foreign += [
        n
        for n, t in floats.items()
        if source.prefix + n not in found and t.data_ptr() not in places
    ]
    if foreign:
        raise BadInput(
            f"[{listing(foreign)}] have no place in {source.folder}, from which the model was "
            "read; a model is given back with the layers it came with"
        )


def quantized(model: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """Names and modules of the quantized layers."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer):
            yield name, module


def float_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Everything a checkpoint holds but the insides of quantized layers."""
    inside = {f"{name}.{part}" for name, _ in quantized(model) for part in _BUFFERS}
    for name, tensor in model.state_dict().items():
        if name not in inside:
            yield name, tensor
