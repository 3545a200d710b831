"""Format "compressed-tensors" of llm-compressor and vLLM: packed integers, int8, FP8, FP4.

Layout of a layer of n inputs and m outputs (library compressed-tensors 0.20); which one it is, its
tensors tell, and `config_groups` in config.json tells bits, groups and activations:

    pack-quantized     weight_packed int32 (m, n b / 32): codes + 2^(b-1) as a stream of bits
                       (`zotune.quant.words`); weight_shape = [m, n]; weight_zero_point, packed
                       along the outputs, if asymmetric; weight_g_idx (n,) in files with act-order
    int-quantized      weight int8 (m, n); weight_zero_point int8 if asymmetric
    float-quantized    weight float8 E4M3 (m, n)
    (nv|mx)fp4-pack-   weight_packed uint8 (m, n / 2): two E2M1 numbers a byte, the first in the low
    quantized          bits

    weight_scale       float (m, groups), (m, 1) or (1,); w = (code - zero) * scale
        nvfp4          E4M3 (m, n / 16), over one float32 number: scale / weight_global_scale
        mxfp4          uint8 (m, n / 32): 2^(e - 127)

Dynamic activations per token are rounded as vLLM does for 8 bits, max|x| / 127 to a step, and as
the library does for 4, max|x| / 7.5, and for those that are not symmetric, (max - min) / 15 or 255.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from zotune.errors import BadInput, FormatError
from zotune.quant.formats.layout import (
    FLOATS,
    Layout,
    Values,
    check_tensors,
    column_order,
    group_index,
    whole_zeros,
)
from zotune.quant.formats.scales import DividedScales, FloatScales, PowerScales, Scales
from zotune.quant.formats.shards import Entry
from zotune.quant.formats.source import SourceFormat
from zotune.quant.formats.tensors import quantization
from zotune.quant.scheme import COMMON_BITS, Scheme
from zotune.quant.words import from_words, to_words, words_for

# Settings that change what the layers compute; a value here says that they do not.
PLAIN: Final[dict[str, tuple[Any, ...]]] = {
    "quantization_status": ("compressed", None),
    "kv_cache_scheme": (None,),
    "transform_config": (None, {}),
}


class CompressedTensorsFormat(SourceFormat):
    """compressed-tensors of llm-compressor: W4A16, W8A16, W8A8, FP8, NVFP4A16, MXFP4A16."""

    name: ClassVar[str] = "compressed-tensors"
    tunable: ClassVar[tuple[str, ...]] = ("scales", "zeros", "codes", "norms", "biases", "weights")
    marks: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale")

    def detect(self, folder: Path) -> bool:
        """Whether config.json names compressed-tensors."""
        return quantization(folder).get("quant_method") == "compressed-tensors"

    def record(self, folder: Path) -> dict[str, Any]:
        """The config's groups, after a look at what is not read."""
        record = quantization(folder)
        for key, plain in PLAIN.items():
            if record.get(key) not in plain:
                raise FormatError(f"{folder} has {key}={record[key]!r}, which is not read")
        sparsity = record.get("sparsity_config") or {}
        if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
            raise FormatError(f"{folder} stores sparse weights ({sparsity}), which are not read")
        groups = record.get("config_groups")
        whole = isinstance(groups, dict) and all(
            isinstance(group, dict)
            and isinstance(group.get("targets", []), list)
            and all(isinstance(target, str) for target in group.get("targets", []))
            and isinstance(group.get("input_activations"), dict | None)
            for group in groups.values()
        )
        if not whole or not isinstance(groups, dict):
            raise FormatError(
                f"{folder} has no config_groups to go by; fetch its config.json again"
            )
        return groups

    def layout(
        self, record: dict[str, Any], name: str, stored: Mapping[str, Entry], shape: tuple[int, int]
    ) -> Layout:
        """The layout that the layer's tensors show, with the settings of its group."""
        weights, activations = _settings(record, name)
        scheme, (rows, columns) = _scheme(name, weights, activations), shape
        grid = scheme.scale_shape(rows, columns)
        scales, wanted = _scales(scheme, stored, grid)
        if scheme.bits == 4 and scheme.kind == "fp":
            if columns % 2:
                raise FormatError(f"layer {name!r} has {columns} inputs; FP4 is packed in pairs")
            wanted["weight_packed"] = ((rows, columns // 2), (torch.uint8,))
        elif "weight_packed" in stored and scheme.kind == "int":
            words = words_for(columns, scheme.bits)
            wanted["weight_packed"] = ((rows, words), (torch.int32,))
            wanted["weight_shape"] = ((2,), (torch.int64, torch.int32))
            wanted["weight_g_idx"] = ((columns,), (torch.int32,))
        else:
            number = torch.int8 if scheme.kind == "int" else torch.float8_e4m3fn
            wanted["weight"] = (shape, (number,))
        packed = "weight" not in wanted
        if not scheme.symmetric:
            zeros = (words_for(rows, scheme.bits), grid[1]) if packed else scales.shape
            wanted["weight_zero_point"] = (zeros, (torch.int32 if packed else torch.int8,))
        if weights.get("actorder") == "group" and "weight_g_idx" not in stored:
            raise FormatError(f"{name!r} has no weight_g_idx, but the config says actorder: group")
        check_tensors(name, stored, wanted, optional=("weight_g_idx",))
        if isinstance(scales, DividedScales):
            divisor = stored["weight_global_scale"].read().item()
            if not 0 < divisor < math.inf:
                raise FormatError(
                    f"weight_global_scale of {name!r} is {divisor}; want a number > 0"
                )
            scales = DividedScales(scales.shape, divisor)
        return CompressedLayout(scheme, rows, columns, packed, scales)


@dataclass(frozen=True)
class CompressedLayout(Layout):
    """One layer as above."""

    scheme: Scheme
    rows: int
    columns: int
    packed: bool
    scales: Scales

    def decode(self, stored: Mapping[str, Tensor]) -> Values:
        """Codes centred, columns sorted by group."""
        grid = self.scheme.scale_shape(self.rows, self.columns)
        scale = self.scales.load(stored["weight_scale"]).reshape(grid)
        zero = self._zero(stored).reshape(grid) if "weight_zero_point" in stored else None
        if not self.packed:
            return Values(stored["weight"], scale, zero)
        if self.scheme.kind == "fp":
            return Values(_halves(stored["weight_packed"]), scale)
        if stored["weight_shape"].tolist() != [self.rows, self.columns]:
            raise FormatError(
                f"weight_shape is {stored['weight_shape'].tolist()} in a layer of "
                f"{[self.rows, self.columns]}; fetch the checkpoint again"
            )
        bits, half = self.scheme.bits, 1 << (self.scheme.bits - 1)
        codes = from_words(stored["weight_packed"], bits, self.columns)
        order = column_order(stored.get("weight_g_idx"), self.scheme.group_size)
        if order is not None:
            codes = codes[:, order]
        return Values(codes.sub_(half).view(torch.int8), scale, zero, order)

    def encode(self, values: Values) -> dict[str, Tensor]:
        """Codes, scales and, if there are any, zeros."""
        stored = {"weight_scale": self.scales.store(values.scale).reshape(self.scales.shape)}
        bits, half = self.scheme.bits, 1 << (self.scheme.bits - 1)
        if not self.packed:
            stored["weight"] = values.codes
        elif self.scheme.kind == "fp":
            codes = values.codes.view(torch.uint8) + 8
            stored["weight_packed"] = codes[:, 0::2] | codes[:, 1::2] << 4
        else:
            codes = values.codes.view(torch.uint8) + half
            if values.order is not None:
                codes = torch.empty_like(codes).index_copy_(1, values.order.long(), codes)
            stored["weight_packed"] = to_words(codes, bits)
        if values.zero is not None:
            zero = whole_zeros(values.zero, bits)
            packed = (zero + half).to(torch.uint8).t()
            stored["weight_zero_point"] = (
                to_words(packed, bits).t() if self.packed else zero.to(torch.int8)
            )
        return {k: v.contiguous() for k, v in stored.items()}

    def whole(self, values: Values) -> dict[str, Tensor]:
        """The above with the shape and, where columns were moved, the groups of packed codes."""
        stored = self.encode(values)
        if self.packed:
            stored["weight_shape"] = torch.tensor([self.rows, self.columns])
        if values.order is not None:
            size = self.scheme.group_size
            stored["weight_g_idx"] = group_index(values.order, self.columns, size)
        return stored

    def rounded(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scales as they are stored, whole zeros within the codes' range."""
        whole = None if zero is None else whole_zeros(zero, self.scheme.bits)
        return self.scales.load(self.scales.store(scale)), whole

    def _zero(self, stored: Mapping[str, Tensor]) -> Tensor:
        zero = stored["weight_zero_point"]
        if not self.packed:
            return zero.float()
        bits = self.scheme.bits
        return from_words(zero.t().contiguous(), bits, self.rows).t().float() - (1 << (bits - 1))


def _halves(packed: Tensor) -> Tensor:
    """int8 codes, the bit pattern minus 8, of two E2M1 numbers a byte."""
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return codes.sub_(8).view(torch.int8)


def _settings(groups: dict[str, Any], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a layer's weights and activations: by its name, a pattern, or its class."""
    ranked = [
        (rank, group)
        for group in groups.values()
        for target in group.get("targets") or ()
        for rank, matches in enumerate((target == name, _fits(target, name), target == "Linear"))
        if matches
    ]
    group = min(ranked, key=lambda found: found[0])[1] if ranked else {}
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise FormatError(f"no group of config_groups says how the weight of {name!r} is stored")
    if group.get("output_activations"):
        raise FormatError(f"layer {name!r} quantizes its outputs, which is not done here")
    return weights, group.get("input_activations") or {}


def _fits(target: str, name: str) -> bool:
    """Whether a target is a pattern, "re:...", that the name begins with."""
    try:
        return target.startswith("re:") and re.match(target[3:], name) is not None
    except re.error as error:
        raise FormatError(f"config_groups has the target {target!r}: {error}") from error


def _scheme(name: str, weights: dict[str, Any], activations: dict[str, Any]) -> Scheme:
    """What the settings ask for; FormatError for what no layer of ours computes."""
    kind = {"int": "int", "float": "fp"}.get(str(weights.get("type", "int")), "")
    strategy, bits = weights.get("strategy"), weights.get("num_bits", 8)
    act_bits = activations.get("num_bits", 8) if activations else None
    same = {"type": weights.get("type"), "strategy": "token", "dynamic": True}
    dynamic = {key: activations.get(key) for key in same} == same
    uneven = bool(activations) and not activations.get("symmetric", True)
    if activations and not (dynamic and bits in (4, 8) and not (uneven and kind == "fp")):
        raise FormatError(
            f"activations of layer {name!r} are {activations}; read are none, and those of the "
            "weights' type, dynamic per token"
        )
    granularity = {"group": "group", "tensor_group": "group"}.get(str(strategy), str(strategy))
    size = weights.get("group_size") if granularity == "group" else None
    try:
        if kind == "int" and bits not in COMMON_BITS:
            raise BadInput(f"bits={bits} of kind='int' is not read; {COMMON_BITS} are")
        symmetric = bool(weights.get("symmetric", True))
        return Scheme(bits, symmetric, size, granularity, act_bits, kind, not uneven)
    except (BadInput, TypeError) as error:
        raise FormatError(
            f"the weight of layer {name!r} is stored with strategy={strategy!r}, "
            f"type={weights.get('type')!r}, num_bits={bits!r}: {error}"
        ) from error


def _scales(
    scheme: Scheme, stored: Mapping[str, Entry], grid: tuple[int, int]
) -> tuple[Scales, dict[str, Any]]:
    """How the scales are stored, and the tensors that this takes."""
    if "weight_global_scale" in stored:
        wanted = {"weight_global_scale": ((1,), (torch.float32,))}
        return DividedScales(grid), {**wanted, "weight_scale": (grid, (torch.float8_e4m3fn,))}
    held = stored.get("weight_scale")
    if held is not None and held.dtype == torch.uint8:
        return PowerScales(grid), {"weight_scale": (grid, (torch.uint8,))}
    shape = held.shape if held is not None and grid == (1, 1) and held.shape in ((), (1,)) else grid
    dtype = held.dtype if held is not None else torch.float32
    return FloatScales(shape, dtype), {"weight_scale": (shape, FLOATS)}


FORMAT = CompressedTensorsFormat()
