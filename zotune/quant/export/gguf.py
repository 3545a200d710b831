"""GGUF files for llama.cpp: a Llama, Mistral, Qwen2 or Qwen3 with its config and tokenizer.

Quantized layers become Q8_0, Q4_0, Q4_1, Q5_0 or Q5_1, whose blocks of 32 weights are groups of 32;
other matrices F16, vectors F32. The gguf package writes the file and knows the names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.quant.export.gguf_metadata import (
    ARCHITECTURES,
    add_config,
    check_config,
    rope_factors,
)
from zotune.quant.export.gguf_tokenizer import add_tokenizer
from zotune.quant.export.safetensors import linears, refuse_convolutions
from zotune.quant.formats.gguf_blocks import BlockLayout, unordered
from zotune.quant.formats.gguf_config import HIDDEN_ROPE
from zotune.quant.formats.gguf_file import gguf_package
from zotune.quant.formats.layout import Values, values_of
from zotune.quant.formats.origin import float_tensors
from zotune.quant.linear import QuantLinear
from zotune.quant.scheme import Scheme

TYPES: Final = {
    "int8-g32": "Q8_0", "int4-g32": "Q4_0", "int4-g32-asym": "Q4_1", "int5-g32": "Q5_0",
    "int5-g32-asym": "Q5_1",
}  # fmt: skip
FILE: Final = "model.gguf"


class GgufExporter:
    """llama.cpp's block types that are affine grids."""

    name: Final = "gguf"
    schemes: Final = ", ".join(f"{scheme} ({type_})" for scheme, type_ in TYPES.items())

    def refusal(self, scheme: Scheme) -> str | None:
        """Groups of 32, the widths that have a type, activations left alone."""
        return None if str(scheme) in TYPES else f"use one of {', '.join(TYPES)}"

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float16."""
        return torch.float16

    def check(
        self, model: nn.Module, layers: Mapping[str, nn.Linear | nn.Conv2d], scheme: Scheme
    ) -> None:
        """A causal model of an architecture and with rotations that metadata are written for."""
        gguf_package()
        refuse_convolutions(layers, self.name)
        check_config(model)

    def write_(self, model: nn.Module, folder: Path, tokenizer: Any) -> None:
        """One file; matrices are encoded one at a time."""
        gguf = gguf_package()
        config: Any = model.config
        architecture = ARCHITECTURES[config.model_type]
        writer = gguf.GGUFWriter(folder / FILE, architecture)
        add_config(writer, config, _file_type(model))
        add_tokenizer(writer, tokenizer, config.vocab_size)
        parts = list(_parts(model, architecture))
        for part in parts:
            bytes_ = part.array()
            writer.add_tensor_info(
                part.name, bytes_.shape, bytes_.dtype, bytes_.nbytes,
                raw_dtype=gguf.GGMLQuantizationType[part.type],
            )  # fmt: skip
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for part in parts:
            writer.write_tensor_data(part.array())
        writer.close()


class _Part(NamedTuple):
    """A tensor of the file; its bytes are made when they are asked for."""

    name: str
    type: str
    value: Tensor | QuantLinear
    order: tuple[int, int] | None

    def array(self) -> Any:
        """uint8 (rows, bytes) of blocks, or float16 or float32."""
        if isinstance(self.value, QuantLinear):
            layout = BlockLayout.of(self.type, self.order)
            empty = torch.zeros(self.value.out_features, _row_bytes(self.type, self.value))
            return layout.merged(empty.to(torch.uint8), _values(self.value, layout)).numpy()
        dtype = {"F16": np.float16, "F32": np.float32}[self.type]
        rows = unordered(self.value.detach().cpu().float(), self.order)
        return np.ascontiguousarray(rows.numpy().astype(dtype))


def _parts(model: nn.Module, architecture: str) -> Iterator[_Part]:
    """Every tensor of the file; scales and matrices of the model are rounded to it on the way."""
    config: Any = model.config
    names = gguf_package().get_tensor_name_map(
        gguf_package().MODEL_ARCH[architecture.upper()], config.num_hidden_layers
    )
    factors = rope_factors(model)
    if factors is not None:
        yield _Part(HIDDEN_ROPE, "F32", factors, None)
    for name, layer in linears(model).items():
        _round_(layer)
        own = _own_name(names, f"{name}.weight")
        yield _Part(own, TYPES[str(layer.scheme)], layer, _order(own, config, architecture))
    tied = config.tie_word_embeddings
    for name, tensor in float_tensors(model):
        if (tied and name.startswith("lm_head.")) or not tensor.is_floating_point():
            continue
        own = _own_name(names, name)
        if tensor.dim() > 1:
            tensor.copy_(tensor.half())
        order = _order(own, config, architecture)
        yield _Part(own, "F16" if tensor.dim() > 1 else "F32", tensor, order)


def _round_(layer: QuantLinear) -> None:
    """Scales of float16, and zeros such that the lowest code is a weight of float16."""
    layer.scale.copy_(layer.scale.half())
    if layer.zero is not None:
        lowest = ((layer.scheme.lowest - layer.zero) * layer.scale).half().float()
        layer.zero.copy_(layer.scheme.lowest - lowest / layer.scale)


def _own_name(names: Any, name: str) -> str:
    found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise BadInput(f"tensor {name!r} has no place in a GGUF file")
    return found


def _order(name: str, config: Any, architecture: str) -> tuple[int, int] | None:
    """Heads and their width where llama.cpp interleaves rows: q and k of Llama."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    found = heads.get(name.split(".")[-2]) if architecture == "llama" else None
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return None if found is None else (found, width)


def _row_bytes(type_: str, layer: QuantLinear) -> int:
    weights, size = gguf_package().GGML_QUANT_SIZES[gguf_package().GGMLQuantizationType[type_]]
    return int(layer.in_features // weights * size)


def _values(layer: QuantLinear, layout: BlockLayout) -> Values:
    """Codes and d; offsets are the weights of the lowest code."""
    values = values_of(layer)
    if values.order is not None:
        raise BadInput("GGUF keeps columns in their order; use static_groups=True")
    if layout.type.offset is None:
        return values
    zero = torch.zeros_like(values.scale) if values.zero is None else values.zero
    return values._replace(zero=(layer.scheme.lowest - zero) * values.scale)


def _file_type(model: nn.Module) -> Any:
    types = {TYPES[str(layer.scheme)] for layer in linears(model).values()}
    return gguf_package().LlamaFileType[f"MOSTLY_{types.pop()}"]


EXPORTS = (GgufExporter(),)
