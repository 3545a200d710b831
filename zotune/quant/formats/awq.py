"""Format "awq": 4-bit codes with zero points in AWQ's GEMM packing.

Layout (AutoAWQ, version "gemm"; the method is AWQ, 2023, arXiv 2306.00978). A layer of n inputs and
m outputs in groups of s inputs; eight outputs share an int32 word, and the k-th lowest four bits
hold the output 0, 2, 4, 6, 1, 3, 5, 7 of the eight:

    qweight int32 (n, m / 8)        codes 0 .. 15
    qzeros  int32 (n / s, m / 8)    zero points
    scales  float (n / s, m)        w = (code - zero) * scale
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from zotune.errors import FormatError
from zotune.quant.formats.layout import FLOATS, Layout, Values, check_tensors, whole_zeros
from zotune.quant.formats.shards import Entry
from zotune.quant.formats.source import SourceFormat
from zotune.quant.formats.tensors import QUANTIZERS, quantization, read_json
from zotune.quant.scheme import Scheme
from zotune.quant.words import from_words, to_words

SIDECAR: Final = QUANTIZERS[1]
ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)


class AwqFormat(SourceFormat):
    """AWQ of AutoAWQ and GPTQModel: GEMM packing, 4 bits, zero points."""

    name: ClassVar[str] = "awq"
    tunable: ClassVar[tuple[str, ...]] = ("scales", "zeros", "codes", "norms", "biases", "weights")
    marks: ClassVar[tuple[str, ...]] = ("qweight",)

    def detect(self, folder: Path) -> bool:
        """Whether config.json names AWQ, or says nothing beside a quant_config.json."""
        method = quantization(folder).get("quant_method")
        return method == "awq" or (method is None and (folder / SIDECAR).exists())

    def record(self, folder: Path) -> dict[str, Any]:
        """The quantization's settings, out of config.json or quant_config.json."""
        record = quantization(folder) or read_json(folder / SIDECAR)
        version = record.get("checkpoint_format") or record.get("version") or "gemm"
        bits = record.get("bits", record.get("w_bit"))
        size = record.get("group_size", record.get("q_group_size"))
        if str(version).lower() != "gemm" or bits != 4:
            raise FormatError(
                f"{folder} is AWQ of version={version!r} with bits={bits!r}; it is read as 'gemm' "
                "with 4 bits: convert it with the program that made it"
            )
        if type(size) is not int or size == 0 or size < -1:
            raise FormatError(f"{folder} has group_size={size!r}; want -1 or a number > 0")
        return {"group_size": size}

    def layout(
        self, record: dict[str, Any], name: str, stored: Mapping[str, Entry], shape: tuple[int, int]
    ) -> AwqLayout:
        """Check the layer's tensors."""
        (rows, columns), size = shape, int(record["group_size"])
        if rows % 8:
            raise FormatError(f"layer {name!r} has {rows} outputs; AWQ packs eight at a time")
        group = size if 0 < size < columns else None
        groups = -(-columns // size) if group else 1
        words = rows // 8
        check_tensors(
            name,
            stored,
            {
                "qweight": ((columns, words), (torch.int32,)),
                "qzeros": ((groups, words), (torch.int32,)),
                "scales": ((groups, rows), FLOATS),
            },
        )
        scheme = Scheme(4, False, group, "group" if group else "channel")
        return AwqLayout(scheme, stored["scales"].dtype)


@dataclass(frozen=True)
class AwqLayout(Layout):
    """One layer as above."""

    scheme: Scheme
    dtype: torch.dtype

    def decode(self, stored: Mapping[str, Tensor]) -> Values:
        """Codes and zeros centred."""
        codes = _outputs(stored["qweight"]).t().contiguous().sub_(8).view(torch.int8)
        zero = _outputs(stored["qzeros"]).t().float() - 8
        scale = stored["scales"].t().float()
        return Values(codes, scale, zero if bool(zero.any()) else None)

    def encode(self, values: Values) -> dict[str, Tensor]:
        """Codes, scales and, unless every zero is 0, zeros."""
        stored = {
            "qweight": _words((values.codes.view(torch.uint8) + 8).t()),
            "scales": values.scale.t().to(self.dtype).contiguous(),
        }
        if values.zero is not None:
            stored["qzeros"] = _words((whole_zeros(values.zero, 4).t() + 8).to(torch.uint8))
        return stored

    def rounded(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scales of the stored dtype, whole zeros within the codes' range."""
        return scale.to(self.dtype).float(), None if zero is None else whole_zeros(zero, 4)


def _outputs(words: Tensor) -> Tensor:
    """uint8 (inputs or groups, outputs) of packed words."""
    fields = from_words(words, 4, words.shape[1] * 8).reshape(*words.shape, 8)
    inverse = [ORDER.index(k) for k in range(8)]
    return fields[..., inverse].flatten(-2)


def _words(outputs: Tensor) -> Tensor:
    """The inverse of `_outputs`."""
    eights = outputs.reshape(outputs.shape[0], -1, 8)
    return to_words(eights[..., list(ORDER)].flatten(-2), 4)


FORMAT = AwqFormat()
