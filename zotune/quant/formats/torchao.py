"""Format "torchao": integer weights as transformers saves torchao's tensors in safetensors.

Layout (torchao 0.18) of a layer of n inputs and m outputs in groups of s inputs; the file's
metadata holds, as JSON under the weight's name, the tensor's class and settings:

    Int8Tensor                int8, of Int8WeightOnlyConfig
    IntxUnpackedToInt8Tensor  2, 3, 4 or 8 bits (`target_dtype`), of IntxWeightOnlyConfig
      _weight_qdata           int8 (m, n), one code a byte
      _weight_scale           float (m, n / s); w = (code - zero) * scale
      _weight_zero_point      int8 (m, n / s)

Other classes are refused by name: Int4Tensor and its relatives are packed for the kernels of one
kind of GPU, and only made there. So are quantized activations. Checkpoints of older versions of
transformers hold torchao's tensors as pickles, which are never opened.
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
from zotune.quant.formats.layout import FLOATS, Layout, Values, check_tensors, whole_zeros
from zotune.quant.formats.shards import Entry
from zotune.quant.formats.source import SourceFormat
from zotune.quant.formats.tensors import open_file, quantization, weight_files
from zotune.quant.scheme import COMMON_BITS, Scheme

CLASSES: Final = ("Int8Tensor", "IntxUnpackedToInt8Tensor")
DTYPES: Final = {f"int{bits}": bits for bits in COMMON_BITS}


class TorchaoFormat(SourceFormat):
    """torchao through transformers: int8 and intx weights, one code a byte."""

    name: ClassVar[str] = "torchao"
    tunable: ClassVar[tuple[str, ...]] = ("scales", "zeros", "codes", "norms", "biases", "weights")
    marks: ClassVar[tuple[str, ...]] = ("_weight_qdata",)

    def detect(self, folder: Path) -> bool:
        """Whether config.json names torchao."""
        return quantization(folder).get("quant_method") == "torchao"

    def record(self, folder: Path) -> dict[str, Any]:
        """What the files' metadata say, by the weights' names."""
        found: dict[str, Any] = {}
        for path in weight_files(folder):
            with open_file(path) as file:
                found.update(file.metadata() or {})
        return found

    def layout(
        self, record: dict[str, Any], name: str, stored: Mapping[str, Entry], shape: tuple[int, int]
    ) -> TorchaoLayout:
        """By the metadata of the layer's weight."""
        kind, settings = _metadata(record, name)
        if kind not in CLASSES:
            raise FormatError(
                f"layer {name!r} is a {kind} of torchao; of its tensors {' and '.join(CLASSES)} "
                "are read: quantize with IntxWeightOnlyConfig or Int8WeightOnlyConfig"
            )
        rounded = [k for k in ("act_quant_kwargs", "activation_quantization") if settings.get(k)]
        if rounded:
            raise FormatError(
                f"layer {name!r} rounds its activations ({rounded[0]}={settings[rounded[0]]}), "
                "which is not read; quantize weights only"
            )
        (rows, columns), block = shape, settings.get("block_size")
        bits = 8 if kind == "Int8Tensor" else DTYPES.get(str(_data(settings.get("target_dtype"))))
        size = block[1] if isinstance(block, list) and block[:1] == [1] and len(block) == 2 else 0
        if bits is None or type(size) is not int or size < 1 or columns % size:
            raise FormatError(
                f"layer {name!r} has block_size={block!r} and target_dtype="
                f"{settings.get('target_dtype')!r}; wanted [1, a divisor of {columns}] and one of "
                f"{sorted(DTYPES)}"
            )
        groups = columns // size
        wanted = {
            "_weight_qdata": (shape, (torch.int8,)),
            "_weight_scale": ((rows, groups), FLOATS),
            "_weight_zero_point": ((rows, groups), (torch.int8,)),
        }
        check_tensors(name, stored, wanted, optional=("_weight_zero_point",))
        grouped = groups > 1
        scheme = Scheme(bits, False, size if grouped else None, "group" if grouped else "channel")
        return TorchaoLayout(scheme, stored["_weight_scale"].dtype)


@dataclass(frozen=True)
class TorchaoLayout(Layout):
    """One layer as above."""

    scheme: Scheme
    dtype: torch.dtype

    def decode(self, stored: Mapping[str, Tensor]) -> Values:
        """As they are stored, once they are within their bits."""
        codes, scale = stored["_weight_qdata"], stored["_weight_scale"].float()
        zero = stored.get("_weight_zero_point", torch.zeros(1)).float()
        for found in (codes, zero):
            if found.numel() and not self._within(found):
                raise FormatError(
                    f"codes or zeros reach from {int(found.min())} to {int(found.max())} in a "
                    f"layer of {self.scheme.bits} bits; fetch the checkpoint again"
                )
        return Values(codes, scale, zero if bool(zero.any()) else None)

    def encode(self, values: Values) -> dict[str, Tensor]:
        """Codes, scales and, unless every zero is 0, zeros."""
        stored = {"_weight_qdata": values.codes, "_weight_scale": values.scale.to(self.dtype)}
        if values.zero is not None:
            zero = whole_zeros(values.zero, self.scheme.bits)
            stored["_weight_zero_point"] = zero.to(torch.int8)
        return stored

    def rounded(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scales of the stored dtype, whole zeros within the codes' range."""
        whole = None if zero is None else whole_zeros(zero, self.scheme.bits)
        return scale.to(self.dtype).float(), whole

    def _within(self, found: Tensor) -> bool:
        return bool((found >= self.scheme.lowest).all() and (found <= self.scheme.highest).all())


def _metadata(record: dict[str, Any], name: str) -> tuple[str, dict[str, Any]]:
    """Class and settings of a layer's weight; the file may call it longer than the model does."""
    key = f"{name}.weight"
    texts = [v for k, v in record.items() if k == key or k.endswith(f".{key}")]
    try:
        found = json.loads(texts[0]) if len(texts) == 1 else None
    except (ValueError, RecursionError):
        found = None
    settings = found.get("_data") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(settings, dict):
        raise FormatError(
            f"the files' metadata do not tell what kind of tensor {key!r} is; save it again with "
            "torchao 0.18 and transformers 5"
        )
    return str(found.get("_type")), settings


def _data(value: Any) -> Any:
    return value.get("_data") if isinstance(value, dict) else value


FORMAT = TorchaoFormat()
