"""Format "gptq": integer codes of 2, 3, 4 or 8 bits, with or without act-order.

Layout (AutoGPTQ, GPTQModel; the method is GPTQ, 2022, arXiv 2210.17323). A layer of n inputs and m
outputs in groups of s inputs, each number a stream of bits in int32 words (`zotune.quant.words`):

    qweight int32 (n b / 32, m)        codes 0 .. 2^b - 1, packed along the inputs
    qzeros  int32 (n / s, m b / 32)    zero points, packed along the outputs
    scales  float (n / s, m)           w = (code - zero) * scale
    g_idx   int32 (n,)                 each input's group; i // s unless act-order moved it

`checkpoint_format` "gptq" (v1, the default) stores zero - 1, "gptq_v2" zero itself. As in GPTQModel
v1 subtracts 1 from every field by one subtraction per word, whose borrow crosses fields where a
zero point is 0; with 3 bits it does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from zotune.errors import FormatError
from zotune.quant.formats.layout import (
    FLOATS,
    Layout,
    Values,
    check_tensors,
    column_order,
    group_index,
    whole_zeros,
)
from zotune.quant.formats.shards import Entry
from zotune.quant.formats.source import SourceFormat
from zotune.quant.formats.tensors import QUANTIZERS, quantization, read_json
from zotune.quant.scheme import COMMON_BITS, Scheme
from zotune.quant.words import from_words, to_words

SIDECAR: Final = QUANTIZERS[0]
VERSIONS: Final = {"gptq": 1, "gptq_v2": 2}


class GptqFormat(SourceFormat):
    """GPTQ of AutoGPTQ and GPTQModel: v1 and v2, act-order, 2, 3, 4 and 8 bits."""

    name: ClassVar[str] = "gptq"
    tunable: ClassVar[tuple[str, ...]] = ("scales", "zeros", "codes", "norms", "biases", "weights")
    marks: ClassVar[tuple[str, ...]] = ("qweight",)

    def detect(self, folder: Path) -> bool:
        """Whether config.json names GPTQ, or says nothing beside a quantize_config.json."""
        method = quantization(folder).get("quant_method")
        return method == "gptq" or (method is None and (folder / SIDECAR).exists())

    def record(self, folder: Path) -> dict[str, Any]:
        """The quantization's settings, out of config.json or quantize_config.json."""
        record = quantization(folder) or read_json(folder / SIDECAR)
        version = record.get("checkpoint_format") or record.get("format") or "gptq"
        if version not in VERSIONS:
            raise FormatError(
                f"{folder} has checkpoint_format={version!r}; GPTQ is read as {sorted(VERSIONS)}: "
                "convert it with the program that made it"
            )
        bits, group_size = record.get("bits"), record.get("group_size")
        if bits not in COMMON_BITS:
            raise FormatError(f"{folder} has bits={bits!r}; GPTQ is read with {COMMON_BITS}")
        if type(group_size) is not int or group_size == 0 or group_size < -1:
            raise FormatError(f"{folder} has group_size={group_size!r}; want -1 or a number > 0")
        return {**record, "version": VERSIONS[version]}

    def layout(
        self, record: dict[str, Any], name: str, stored: Mapping[str, Entry], shape: tuple[int, int]
    ) -> GptqLayout:
        """Bits and group size of a layer, which `dynamic` may have changed, from its shapes."""
        rows, columns = shape
        if record.get("desc_act") and "g_idx" not in stored and record["group_size"] != -1:
            raise FormatError(
                f"{name!r} has no g_idx, but the config says desc_act: the groups of its columns "
                "are unknown; fetch the checkpoint again"
            )
        bits, groups = _bits(record, name, stored, columns), 1
        if "scales" in stored and stored["scales"].shape:
            groups = stored["scales"].shape[0]
        size = _group_size(record, name, columns, groups)
        check_tensors(
            name,
            stored,
            {
                "qweight": ((columns * bits // 32, rows), (torch.int32,)),
                "qzeros": ((groups, -(-rows * bits // 32)), (torch.int32,)),
                "scales": ((groups, rows), FLOATS),
                "g_idx": ((columns,), (torch.int32,)),
            },
            optional=("g_idx",),
        )
        scheme = Scheme(bits, False, size, "group" if size else "channel")
        return GptqLayout(scheme, rows, columns, record["version"], stored["scales"].dtype)


@dataclass(frozen=True)
class GptqLayout(Layout):
    """One layer as above."""

    scheme: Scheme
    rows: int
    columns: int
    version: int
    dtype: torch.dtype

    def decode(self, stored: Mapping[str, Tensor]) -> Values:
        """Codes and zeros centred, columns sorted by group."""
        bits, half = self.scheme.bits, 1 << (self.scheme.bits - 1)
        codes = from_words(stored["qweight"].t().contiguous(), bits, self.columns)
        order = column_order(stored.get("g_idx"), self.scheme.group_size)
        if order is not None:
            codes = codes[:, order]
        zero = self._zeros(stored["qzeros"]).t().float() - half
        return Values(
            codes.sub_(half).view(torch.int8),
            stored["scales"].t().float(),
            zero if bool(zero.any()) else None,
            order,
        )

    def encode(self, values: Values) -> dict[str, Tensor]:
        """Codes, scales and, unless every zero is 0, zeros; g_idx never changes."""
        bits, half = self.scheme.bits, 1 << (self.scheme.bits - 1)
        codes = values.codes.view(torch.uint8) + half
        if values.order is not None:
            codes = torch.empty_like(codes).index_copy_(1, values.order.long(), codes)
        scale, zero = values.scale.t(), values.zero
        stored = {
            "qweight": to_words(codes, bits).t().contiguous(),
            "scales": scale.to(self.dtype).contiguous(),
        }
        if zero is not None:
            stored["qzeros"] = self._zero_words(
                (whole_zeros(zero, bits).t() + half).to(torch.uint8)
            )
        return stored

    def whole(self, values: Values) -> dict[str, Tensor]:
        """The above with zeros, also where all are 0, and g_idx."""
        zero = torch.zeros_like(values.scale) if values.zero is None else values.zero
        index = group_index(values.order, self.columns, self.scheme.group_size)
        return self.encode(values._replace(zero=zero)) | {"g_idx": index}

    def rounded(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scales of the stored dtype, whole zeros within the codes' range."""
        bits = self.scheme.bits
        return scale.to(self.dtype).float(), None if zero is None else whole_zeros(zero, bits)

    def _zeros(self, words: Tensor) -> Tensor:
        """Zero points uint8 (groups, rows)."""
        bits = self.scheme.bits
        if self.version == 1 and bits != 3:
            words = words + self._ones()
        zeros = from_words(words, bits, self.rows)
        return (zeros + 1) & 7 if self.version == 1 and bits == 3 else zeros

    def _zero_words(self, zeros: Tensor) -> Tensor:
        bits = self.scheme.bits
        if self.version == 2:
            return to_words(zeros, bits)
        return to_words((zeros - 1) & 7, 3) if bits == 3 else to_words(zeros, bits) - self._ones()

    def _ones(self) -> Tensor:
        """Words whose every field in use is 1."""
        return to_words(torch.ones(1, self.rows, dtype=torch.uint8), self.scheme.bits)


def _bits(record: dict[str, Any], name: str, stored: Mapping[str, Entry], columns: int) -> int:
    """The config's bits, or what the words come to where the config has exceptions (`dynamic`)."""
    bits = int(record["bits"])
    shape = stored["qweight"].shape
    if record.get("dynamic") and len(shape) == 2 and columns and shape[0] * 32 % columns == 0:
        bits = shape[0] * 32 // columns
    if bits not in COMMON_BITS:
        raise FormatError(f"layer {name!r} has {bits} bits; GPTQ is read with {COMMON_BITS}")
    if columns * bits % 32:
        raise FormatError(
            f"layer {name!r} has {columns} inputs, whose codes do not fill whole words"
        )
    return bits


def _group_size(record: dict[str, Any], name: str, columns: int, groups: int) -> int | None:
    """Columns in a group; None where all of them share one scale."""
    size = int(record["group_size"])
    if groups == 1 and (size == -1 or size >= columns):
        return None
    if size > 0 and -(-columns // size) == groups:
        return size
    if record.get("dynamic") and groups and columns % groups == 0:
        return columns // groups if groups > 1 else None
    raise FormatError(
        f"layer {name!r} of {columns} inputs has {groups} groups; group_size={size} does not make "
        "so many"
    )


FORMAT = GptqFormat()
