"""Format "hqq": integer codes with zero points that are fractions.

Layout (HQQ 0.2, as transformers 4.44 to 4.57 saved it; Half-Quadratic Quantization, Badri and Shaji
2023, github.com/mobiusml/hqq) of a layer of n inputs and m outputs, whose weights, row after row,
are cut into g = m n / s groups of s:

    W_q          codes 0 .. 2^b - 1 as a matrix (g, s), cut into f equal parts of rows, which share
                 words, the first part in the highest bits: f = 1, 2, 4 of uint8 for 8, 4, 2 bits;
                 f = 10 of int32 for 3 bits, the matrix filled up with zeros
    scale, zero  float (g, 1); w = (code - zero) * scale
    nbits, group_size, axis, shape, packing, ...    the settings, as tensors

With view_as_float W_q has the bytes above as floats. Scales and zeros that are quantized themselves
are not saved by HQQ as safetensors. Groups across rows (axis 0), whose scales belong to no one row,
and 1, 1.58, 5 and 6 bits are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from zotune.errors import FormatError
from zotune.quant.formats.layout import FLOATS, Layout, Values, check_tensors
from zotune.quant.formats.shards import Entry
from zotune.quant.formats.source import SourceFormat
from zotune.quant.formats.tensors import quantization
from zotune.quant.scheme import COMMON_BITS, Scheme

PARTS: Final = {8: 1, 4: 2, 3: 10, 2: 4}
SETTINGS: Final = (
    "nbits", "group_size", "axis", "shape", "packing", "view_as_float", "unpack_view_dtype",
    "quant_scale", "quant_zero", "compute_dtype", "channel_wise", "optimize", "round_zero",
    "offload_meta", "encoded_state_dict", "stores_quant_config",
)  # fmt: skip
_LONGEST: Final = 64  # numbers or letters of a setting


class HqqFormat(SourceFormat):
    """HQQ as transformers saved it: 8, 4, 3 and 2 bits, groups along the inputs."""

    name: ClassVar[str] = "hqq"
    tunable: ClassVar[tuple[str, ...]] = ("scales", "zeros", "codes", "norms", "biases", "weights")
    marks: ClassVar[tuple[str, ...]] = ("W_q",)

    def detect(self, folder: Path) -> bool:
        """Whether config.json names HQQ."""
        return quantization(folder).get("quant_method") == "hqq"

    def record(self, folder: Path) -> dict[str, Any]:
        """Nothing: each layer's tensors tell all."""
        return {}

    def layout(
        self, record: dict[str, Any], name: str, stored: Mapping[str, Entry], shape: tuple[int, int]
    ) -> HqqLayout:
        """By the layer's own settings."""
        parts = ("nbits", "group_size", "axis", "shape", "quant_scale", "quant_zero")
        bits, size, axis, given, *nested = (_setting(name, stored, part) for part in parts)
        if axis != [1] or nested != [[0], [0]] or len(bits) != 1 or bits[0] not in COMMON_BITS:
            raise FormatError(
                f"layer {name!r} has nbits={bits}, axis={axis}, quant_scale and quant_zero={nested}"
                f"; HQQ is read with bits of {COMMON_BITS}, axis=1 and plain scales: quantize again"
            )
        (rows, columns), group = shape, size[0] if len(size) == 1 else 0
        if given != list(shape) or group < 1 or columns % group:
            raise FormatError(
                f"layer {name!r} has shape={given} and group_size={size}; wanted {list(shape)} and "
                f"a divisor of its {columns} inputs"
            )
        groups, unit = rows * columns // group, torch.int32 if bits == [3] else torch.uint8
        dtype = stored["W_q"].dtype
        check_tensors(
            name,
            stored,
            {
                "W_q": (
                    (-(-groups // PARTS[bits[0]]), group * unit.itemsize // dtype.itemsize),
                    (unit, *FLOATS),
                ),
                "scale": ((groups, 1), FLOATS),
                "zero": ((groups, 1), FLOATS),
                **{k: (e.shape, (e.dtype,)) for k, e in stored.items() if k in SETTINGS},
            },
        )
        if bits[0] in (4, 2) and groups % PARTS[bits[0]]:
            raise FormatError(f"layer {name!r} has {groups} groups, which do not fill whole bytes")
        dtypes = stored["scale"].dtype, stored["zero"].dtype
        return HqqLayout(Scheme(bits[0], False, group), rows, columns, dtype, *dtypes)


@dataclass(frozen=True)
class HqqLayout(Layout):
    """One layer as above."""

    scheme: Scheme
    rows: int
    columns: int
    dtype: torch.dtype
    scale_dtype: torch.dtype
    zero_dtype: torch.dtype

    def decode(self, stored: Mapping[str, Tensor]) -> Values:
        """Codes and zeros centred; zeros are always there."""
        bits, grid = self.scheme.bits, (self.rows, -1)
        packed = stored["W_q"].contiguous().view(torch.int32 if bits == 3 else torch.uint8)
        fields = [(packed >> shift) & ((1 << bits) - 1) for shift in self._shifts()]
        codes = torch.cat(fields).to(torch.uint8).flatten()[: self.rows * self.columns]
        return Values(
            codes.sub_(self._half).view(torch.int8).reshape(self.rows, self.columns),
            stored["scale"].float().reshape(grid),
            stored["zero"].float().reshape(grid) - self._half,
        )

    def encode(self, values: Values) -> dict[str, Tensor]:
        """Codes, scales and zeros."""
        assert values.zero is not None
        shifts, group = self._shifts(), values.codes.numel() // values.scale.numel()
        unit = torch.int32 if self.scheme.bits == 3 else torch.uint8
        codes = (values.codes.view(torch.uint8) + self._half).to(unit).reshape(-1, group)
        codes = F.pad(codes, (0, 0, 0, -len(codes) % len(shifts)))
        packed = torch.zeros(len(codes) // len(shifts), group, dtype=unit)
        for shift, part in zip(shifts, codes.chunk(len(shifts)), strict=True):
            packed |= part << shift
        return {
            "W_q": packed.view(self.dtype),
            "scale": values.scale.to(self.scale_dtype).reshape(-1, 1),
            "zero": (values.zero + self._half).to(self.zero_dtype).reshape(-1, 1),
        }

    def rounded(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Both as they are stored, the zero before it is centred."""
        assert zero is not None
        return (
            scale.to(self.scale_dtype).float(),
            (zero + self._half).to(self.zero_dtype).float() - self._half,
        )

    @property
    def _half(self) -> int:
        return 1 << (self.scheme.bits - 1)

    def _shifts(self) -> list[int]:
        """Where in a word the parts lie, the first in the highest bits."""
        bits = self.scheme.bits
        return [bits * k for k in reversed(range(PARTS[bits]))]


def _setting(name: str, stored: Mapping[str, Entry], part: str) -> list[int]:
    """A setting's whole numbers."""
    entry = stored.get(part)
    if entry is None:
        raise FormatError(
            f"tensor '{name}.{part}' is missing; HQQ is read as transformers 4.44 to 4.57 saved it"
        )
    whole = not (entry.dtype.is_floating_point or entry.dtype.is_complex)
    if not whole or torch.Size(entry.shape).numel() > _LONGEST:
        raise FormatError(f"tensor '{name}.{part}' is {entry.dtype} {entry.shape}; wanted integers")
    return [int(number) for number in entry.read().flatten().tolist()]


FORMAT = HqqFormat()
