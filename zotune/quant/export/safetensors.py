"""Folders of safetensors whose quantized layers lie as a `Layout` says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.quant.formats.build import write_config
from zotune.quant.formats.layout import Layout, values_of
from zotune.quant.formats.origin import float_tensors, quantized
from zotune.quant.linear import QuantLinear


def write_layers_(
    model: nn.Module, folder: Path, layouts: Mapping[str, Layout], record: Mapping[str, Any]
) -> None:
    """Config with `record` as its quantization_config, and the tensors in shards of 5 GB.

    Every layer keeps its layout and is rounded to it.

    Raises:
        BadInput: if the model has no config.
    """
    from huggingface_hub import save_torch_state_dict

    write_config(model, folder, record)
    tensors = _stored_once(float_tensors(model))
    for name, layer in linears(model).items():
        layer.storage = layouts[name]
        layer.round_to_storage_()
        for part, tensor in layouts[name].whole(values_of(layer)).items():
            tensors[f"{name}.{part}"] = tensor
    save_torch_state_dict(tensors, folder)


def _stored_once(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """A tied tensor under its first name alone."""
    found: dict[tuple[Any, ...], tuple[str, Tensor]] = {}
    for name, tensor in named:
        found.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), (name, tensor))
    return dict(found.values())


def linears(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantized layers by name, once `refuse_convolutions` has passed them."""
    return {name: layer for name, layer in quantized(model) if isinstance(layer, QuantLinear)}


def refuse_convolutions(layers: Mapping[str, nn.Module], name: str) -> None:
    """Raises BadInput if there is a convolution among the layers to be quantized."""
    found = [path for path, layer in layers.items() if isinstance(layer, nn.Conv2d)]
    if found:
        raise BadInput(
            f"format {name!r} holds linear layers; {found[0]!r} is a convolution: exclude it, or "
            "use format 'zotune'"
        )


def left_float(model: nn.Module) -> list[str]:
    """Names of linear layers that are not quantized."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, QuantLinear)
    ]
