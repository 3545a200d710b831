"""compressed-tensors folders for vLLM, llm-compressor and transformers.

Weights alone are pack-quantized (W4A16 and other widths); with activations of 8 bits per token they
are int-quantized (W8A8). Layers that stay float are named under `ignore`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from zotune.quant.export.safetensors import (
    left_float,
    linears,
    refuse_convolutions,
    write_layers_,
)
from zotune.quant.formats.compressed_tensors import CompressedLayout
from zotune.quant.formats.scales import FloatScales
from zotune.quant.linear import QuantLinear
from zotune.quant.scheme import COMMON_BITS, Scheme

# The library whose config.json this is, as far as readers look at its version.
LIBRARY: Final = "0.20.0"


class CompressedTensorsExporter:
    """pack-quantized without, int-quantized with quantized activations, which engines run in 8 bits
    and the format's own library in fewer."""

    name: Final = "compressed-tensors"
    schemes: Final = (
        "int2, int3, int4, int8 -gN or -channel, -asym or not; int8-channel-a8[asym], "
        "int4-channel-a4[asym]"
    )

    def refusal(self, scheme: Scheme) -> str | None:
        """Packed widths, and W8A8 or W4A4 per channel."""
        if scheme.bits not in COMMON_BITS:
            return "bits are 2, 3, 4 or 8; use int4 or int8, or format 'gguf'"
        if scheme.granularity == "tensor":
            return f"scales are per group or channel; use int{scheme.bits}-channel"
        if scheme.act_bits and (scheme.bits != scheme.act_bits or scheme.granularity != "channel"):
            return "activations have the bits of weights per channel; use int8-channel-a8"
        if scheme.act_bits and not scheme.symmetric:
            return "engines multiply symmetric weights; use int8-channel-a8"
        return None

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The model's."""
        return dtype

    def check(
        self, model: nn.Module, layers: Mapping[str, nn.Linear | nn.Conv2d], scheme: Scheme
    ) -> None:
        """Linear layers of any size."""
        refuse_convolutions(layers, self.name)

    def write_(self, model: nn.Module, folder: Path, tokenizer: Any) -> None:
        """weight_packed or weight, weight_scale, and what goes with them."""
        layers = linears(model)
        layouts = {name: _layout(layer) for name, layer in layers.items()}
        write_layers_(model, folder, layouts, _record(model, list(layers.values())))


def _layout(layer: QuantLinear) -> CompressedLayout:
    rows, columns, scheme = layer.out_features, layer.in_features, layer.scheme
    scales = FloatScales(scheme.scale_shape(rows, columns), layer.scale_dtype)
    return CompressedLayout(scheme, rows, columns, not scheme.act_bits, scales)


def _activations(scheme: Scheme) -> dict[str, Any] | None:
    if scheme.act_bits is None:
        return None
    return {
        "num_bits": scheme.act_bits,
        "type": "int",
        "symmetric": scheme.act_symmetric,
        "strategy": "token",
        "dynamic": True,
    }


def _record(model: nn.Module, layers: list[QuantLinear]) -> dict[str, Any]:
    scheme = layers[0].scheme
    kind = "int-quantized" if scheme.act_bits else "pack-quantized"
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": scheme.granularity,
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    if any(layer.order is not None for layer in layers):
        weights["actorder"] = "group"
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": _activations(scheme),
        "output_activations": None,
        "format": kind,
    }
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": kind,
        "config_groups": {"group_0": group},
        "ignore": left_float(model),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": LIBRARY,
    }


EXPORTS = (CompressedTensorsExporter(),)
