"""Format "bitsandbytes": NF4 and FP4 in blocks, plain or nested, and LLM.int8.

Layout (bitsandbytes 0.50, as transformers saves it; QLoRA, 2023, arXiv 2305.14314, and LLM.int8,
2022, arXiv 2208.07339) of a layer of n inputs and m outputs, whose weights, row after row, are cut
into blocks of s:

    weight                     (m n / 2, 1) bytes, as uint8 or as numbers of another dtype with
                               those bytes: two codes each, the first in the high four bits
    weight.absmax              float32 (blocks,); w = quant_map[code] * absmax
    weight.quant_map           float32 (16,), the table of NF4 or FP4
    weight.quant_state.bitsandbytes__nf4 or __fp4    JSON: quant_type, blocksize, dtype, shape

    nested: weight.absmax is uint8, and absmax = nested_quant_map[.] * nested_absmax + nested_offset
    weight.nested_absmax       float32, one for 256 blocks
    weight.nested_quant_map    float32 (256,)

    LLM.int8: weight int8 (m, n); SCB float32 (m,); w = code * SCB / 127

Tuned scales are absmax or SCB / 127. Nested ones are rounded to what their 256 numbers can say, see
`zotune.quant.formats.nested`. A weight's block has to lie within one row. LLM.int8 itself rounds
activations to int8 too, columns with outliers excepted; here they stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from zotune.errors import FormatError
from zotune.quant.codebooks import TABLES
from zotune.quant.formats.layout import Layout, Values, check_tensors
from zotune.quant.formats.nested import NestedScales
from zotune.quant.formats.shards import Entry
from zotune.quant.formats.source import SourceFormat
from zotune.quant.formats.tensors import quantization
from zotune.quant.scheme import Scheme

STATE: Final = "weight.quant_state.bitsandbytes__"
KINDS: Final = {"nf4": "nf", "fp4": "fpb"}
STORAGE: Final = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
_LONGEST: Final = 4096  # bytes of JSON
_LARGE: Final = 1e30


class BitsandbytesFormat(SourceFormat):
    """bitsandbytes: NF4, FP4, both with or without nested quantization, and LLM.int8."""

    name: ClassVar[str] = "bitsandbytes"
    tunable: ClassVar[tuple[str, ...]] = ("scales", "codes", "norms", "biases", "weights")
    marks: ClassVar[tuple[str, ...]] = ("weight.absmax", "SCB")

    def detect(self, folder: Path) -> bool:
        """Whether config.json names bitsandbytes, or is of the time before it did so."""
        record = quantization(folder)
        old = "quant_method" not in record
        asked = record.get("load_in_4bit") or record.get("load_in_8bit")
        return record.get("quant_method") == "bitsandbytes" or bool(old and asked)

    def record(self, folder: Path) -> dict[str, Any]:
        """Nothing: each layer's tensors tell all."""
        return {}

    def layout(
        self, record: dict[str, Any], name: str, stored: Mapping[str, Entry], shape: tuple[int, int]
    ) -> Layout:
        """By rows where there is SCB, else in blocks."""
        if "SCB" in stored:
            wanted = {
                "weight": (shape, (torch.int8,)),
                "SCB": ((shape[0],), (torch.float32,)),
                "weight_format": ((), (torch.uint8,)),
            }
            check_tensors(name, stored, wanted, optional=("weight_format",))
            return RowLayout(Scheme(8, True, None, "channel"))
        state, part = _state(name, stored)
        kind, size = KINDS.get(str(state.get("quant_type"))), state.get("blocksize")
        (rows, columns), given = shape, state.get("shape")
        if kind is None or type(size) is not int or size < 1 or given != list(shape):
            raise FormatError(
                f"quant_state of {name!r} has quant_type={state.get('quant_type')!r}, "
                f"blocksize={size!r}, shape={given!r}; want one of {sorted(KINDS)}, a number and "
                f"{list(shape)}"
            )
        if columns % size or columns % 2:
            raise FormatError(
                f"layer {name!r} has {columns} inputs in blocks of {size}, which run over the ends "
                "of rows; quantize it again with a blocksize that divides them"
            )
        blocks = rows * columns // size
        dtype = stored["weight"].dtype if "weight" in stored else torch.uint8
        nested = "weight.nested_absmax" in stored
        check_tensors(
            name,
            stored,
            {
                part: (stored[part].shape, (torch.uint8,)),
                "weight": ((rows * columns // 2 // dtype.itemsize, 1), STORAGE),
                "weight.quant_map": ((16,), (torch.float32,)),
                "weight.absmax": ((blocks,), (torch.uint8 if nested else torch.float32,)),
                **(_nested(name, state, blocks) if nested else {}),
            },
        )
        scales = _scales(name, state, stored) if nested else None
        scheme = Scheme(4, True, size, "group", kind=kind)
        return BlockLayout(scheme, rows, columns, dtype, scales)


@dataclass(frozen=True)
class RowLayout(Layout):
    """LLM.int8."""

    scheme: Scheme

    def decode(self, stored: Mapping[str, Tensor]) -> Values:
        """One scale for a row."""
        order = stored.get("weight_format", torch.tensor(0)).item()
        if order != 0:
            raise FormatError(
                f"an LLM.int8 weight has weight_format={order}, an order of some GPU; want 0, "
                "row by row: save it again with a bitsandbytes of 2024 or later"
            )
        return Values(stored["weight"], _over(stored["SCB"]).unsqueeze(1))

    def encode(self, values: Values) -> dict[str, Tensor]:
        """Codes and SCB."""
        return {"weight": values.codes, "SCB": (values.scale * 127).squeeze(1).contiguous()}

    def rounded(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """float32, through SCB: an ulp may be lost once, never twice."""
        return _over(scale * 127), None


@dataclass(frozen=True, eq=False)
class BlockLayout(Layout):
    """NF4 or FP4; `scales` where they are nested."""

    scheme: Scheme
    rows: int
    columns: int
    dtype: torch.dtype
    scales: NestedScales | None

    def decode(self, stored: Mapping[str, Tensor]) -> Values:
        """Codes are the table's indices minus 8."""
        table = torch.tensor(TABLES[self.scheme.kind, self.scheme.bits])
        if not torch.allclose(stored["weight.quant_map"], table, rtol=0.0, atol=1e-6):
            raise FormatError(
                f"a quant_map is not that of {self.scheme.kind}4: "
                f"{stored['weight.quant_map'].tolist()}; such a layer is not read"
            )
        packed = stored["weight"].contiguous().flatten().view(torch.uint8)
        codes = torch.stack([packed >> 4, packed & 15], dim=-1).reshape(self.rows, self.columns)
        scale = stored["weight.absmax"]
        if self.scales is not None:
            scale = self.scales.load(scale, stored["weight.nested_absmax"])
        return Values(codes.sub_(8).view(torch.int8), scale.reshape(self.rows, -1))

    def encode(self, values: Values) -> dict[str, Tensor]:
        """Absmax, and nested_absmax where there is one; codes of floats do not change."""
        scale = values.scale.flatten()
        if self.scales is None:
            return {"weight.absmax": scale}
        codes, absmax = self.scales.store(scale)
        return {"weight.absmax": codes, "weight.nested_absmax": absmax}

    def rounded(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """float32 itself, or the nearest that nested quantization can say."""
        if self.scales is None:
            return scale, None
        nearest = self.scales.load(*self.scales.store(scale.cpu().flatten()))
        return nearest.reshape(scale.shape).to(scale.device), None


def _over(scb: Tensor) -> Tensor:
    # By a tensor: GPUs turn a division by a plain number into a product, and round otherwise.
    return scb / torch.full_like(scb, 127.0)


def _state(name: str, stored: Mapping[str, Entry]) -> tuple[dict[str, Any], str]:
    """The JSON that a layer has as a tensor, and that tensor's name."""
    parts = [part for part in stored if part.startswith(STATE)]
    if len(parts) != 1:
        raise FormatError(
            f"{name!r} has {len(parts)} tensors {STATE}*; want one: save it again with "
            "bitsandbytes 0.41 or later"
        )
    entry = stored[parts[0]]
    if entry.dtype != torch.uint8 or len(entry.shape) != 1 or entry.shape[0] > _LONGEST:
        raise FormatError(f"'{name}.{parts[0]}' is {entry.dtype} {entry.shape}; want JSON in bytes")
    try:
        state = json.loads(bytes(entry.read().tolist()))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise FormatError(f"'{name}.{parts[0]}' is no JSON ({error})") from error
    if not isinstance(state, dict):
        raise FormatError(f"'{name}.{parts[0]}' holds {state!r}; want a JSON object")
    return state, parts[0]


def _nested(name: str, state: dict[str, Any], blocks: int) -> dict[str, Any]:
    """What a nested layer's tensors must be."""
    size, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(size) is not int or size < 1 or type(offset) is not float or not abs(offset) < _LARGE:
        raise FormatError(
            f"quant_state of {name!r} has nested_blocksize={size!r} and nested_offset={offset!r}; "
            "want numbers"
        )
    return {
        "weight.nested_absmax": ((-(-blocks // size),), (torch.float32,)),
        "weight.nested_quant_map": ((256,), (torch.float32,)),
    }


def _scales(name: str, state: dict[str, Any], stored: Mapping[str, Entry]) -> NestedScales:
    absmax = stored["weight.nested_absmax"].read()
    numbers = stored["weight.nested_quant_map"].read()
    if not ((absmax >= 0) & (absmax < _LARGE)).all():
        raise FormatError(f"'{name}.weight.nested_absmax' holds other than numbers >= 0")
    if not ((numbers.diff() >= 0).all() and (numbers.abs() <= 1).all()):
        raise FormatError(f"'{name}.weight.nested_quant_map' does not ascend from -1 to 1")
    return NestedScales(
        numbers, absmax, float(state["nested_offset"]), int(state["nested_blocksize"])
    )


FORMAT = BitsandbytesFormat()
