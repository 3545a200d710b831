"""Quantized weights: grids, packing, layers, their kernels and checkpoint formats."""

from __future__ import annotations

from zotune.quant.affine import dequantize, quantize
from zotune.quant.conv import QuantConv2d
from zotune.quant.layer import QuantLayer
from zotune.quant.linear import QuantLinear
from zotune.quant.model import quantize_model_
from zotune.quant.packing import pack, unpack
from zotune.quant.scheme import Scheme

__all__ = [
    "QuantConv2d", "QuantLayer", "QuantLinear", "Scheme", "dequantize", "pack", "quantize",
    "quantize_model_", "unpack",
]  # fmt: skip
