"""GPTQ folders for GPTQModel, AutoGPTQ's loaders, vLLM and transformers.

Version 1 stores zero - 1, so a zero point of 0 has no field of its own; symmetric schemes, the only
ones written so, never have one. `gptq_v2` stores zeros as they are. Layers that stay float are
named under `dynamic`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from zotune.errors import BadInput
from zotune.quant.export.safetensors import (
    left_float,
    linears,
    refuse_convolutions,
    write_layers_,
)
from zotune.quant.formats.gptq import SIDECAR, GptqLayout
from zotune.quant.linear import QuantLinear, matrix
from zotune.quant.scheme import COMMON_BITS, Scheme


@dataclass(frozen=True)
class GptqExporter:
    """One of the two conventions for zero points."""

    name: str
    version: int
    schemes: str

    def refusal(self, scheme: Scheme) -> str | None:
        """Bits of whole words, groups or channels, activations left alone."""
        if scheme.bits not in COMMON_BITS:
            return f"bits are 2, 3, 4 or 8; use int4-{_unit(scheme)} or format 'gguf'"
        if scheme.granularity == "tensor":
            return f"scales are per group or channel; use int{scheme.bits}-channel"
        if scheme.act_bits:
            return "activations stay float; use format 'compressed-tensors'"
        if self.version == 1 and not scheme.symmetric:
            return "GPTQModel reads zero points of version 1 from itself alone; use 'gptq_v2'"
        return None

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """bfloat16 in models of it, else float16."""
        return dtype if dtype == torch.bfloat16 else torch.float16

    def check(
        self, model: nn.Module, layers: Mapping[str, nn.Linear | nn.Conv2d], scheme: Scheme
    ) -> None:
        """Codes fill whole words along inputs, zero points along outputs."""
        refuse_convolutions(layers, self.name)
        for name, layer in layers.items():
            for what, count in zip(("outputs", "inputs"), matrix(layer).shape, strict=True):
                if count * scheme.bits % 32:
                    raise BadInput(
                        f"{name!r} has {count} {what}, whose {scheme.bits}-bit codes do not fill "
                        "whole words of 32 bits, as GPTQ wants; exclude it, or use format "
                        "'compressed-tensors'"
                    )

    def write_(self, model: nn.Module, folder: Path, tokenizer: Any) -> None:
        """qweight, qzeros, scales, g_idx; quantize_config.json says what config.json says."""
        layers = linears(model)
        layouts = {name: self._layout(layer) for name, layer in layers.items()}
        record = self._record(model, list(layers.values()))
        write_layers_(model, folder, layouts, record)
        (folder / SIDECAR).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def _layout(self, layer: QuantLinear) -> GptqLayout:
        rows, columns, scheme = layer.out_features, layer.in_features, layer.scheme
        dtype = self.scale_dtype(layer.scale_dtype)
        return GptqLayout(scheme, rows, columns, self.version, dtype)

    def _record(self, model: nn.Module, layers: list[QuantLinear]) -> dict[str, Any]:
        scheme = layers[0].scheme
        skipped = [name for name in left_float(model) if name != "lm_head"]
        return {
            "quant_method": "gptq",
            "checkpoint_format": self.name,
            "bits": scheme.bits,
            "group_size": scheme.group_size or -1,
            "sym": scheme.symmetric,
            "desc_act": any(layer.order is not None for layer in layers),
            "lm_head": False,
            "pack_dtype": "int32",
            "dynamic": {f"-:^{re.escape(name)}$": {} for name in skipped},
            "meta": {"quantizer": ["zotune"]},
        }


def _unit(scheme: Scheme) -> str:
    return f"g{scheme.group_size}" if scheme.group_size else "channel"


WIDTHS: Final = "int2, int3, int4, int8; -gN or -channel"
EXPORTS = (
    GptqExporter("gptq", 1, WIDTHS),
    GptqExporter("gptq_v2", 2, f"{WIDTHS}; -asym or not"),
)
