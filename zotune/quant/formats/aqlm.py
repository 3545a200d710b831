"""Format "aqlm": additive codebooks of vectors, one scale per row.

Layout (aqlm 1.1; AQLM, 2024, arXiv 2401.06118) of a layer of n inputs and m outputs, with K
codebooks of 2^b vectors of length s ("K x b": 1x16, 2x8):

    codebooks  float (K, 2^b, 1, s)
    codes      int8 or int16 (m, n / s, K), modulo 2^b
    scales     float (m, 1, 1, 1);  row of w = scale * [sum of K vectors, n / s times in a row]

Scales are tuned as any other format's; codebooks are float tensors as norms are, and belong to
"weights". Codes are places in a table and do not move. While a layer computes, its sums of vectors
are spelled out in float32. Vectors that reach over several rows (out_group_size) are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from zotune.errors import FormatError
from zotune.quant import kernels
from zotune.quant.formats.layout import FLOATS, Layout, Values, check_tensors
from zotune.quant.formats.shards import Entry
from zotune.quant.formats.source import SourceFormat
from zotune.quant.formats.tensors import quantization
from zotune.quant.linear import QuantLinear
from zotune.quant.scheme import BITS, Scheme

INTEGERS: Final = {8: torch.int8, 16: torch.int16}
SETTINGS: Final = ("num_codebooks", "nbits_per_codebook", "in_group_size", "out_group_size")


class AqlmFormat(SourceFormat):
    """AQLM: additive codebooks of 8 or 16 bits, vectors along the inputs."""

    name: ClassVar[str] = "aqlm"
    tunable: ClassVar[tuple[str, ...]] = ("scales", "norms", "biases", "weights")
    marks: ClassVar[tuple[str, ...]] = ("codebooks",)

    def detect(self, folder: Path) -> bool:
        """Whether config.json names AQLM."""
        return quantization(folder).get("quant_method") == "aqlm"

    def record(self, folder: Path) -> dict[str, Any]:
        """The codebooks' sizes, out of config.json."""
        record = {key: quantization(folder).get(key) for key in SETTINGS}
        books, bits, size, rows = record.values()
        if (
            bits not in BITS["aq"]
            or rows != 1
            or not all(type(number) is int and number > 0 for number in (books, size))
        ):
            raise FormatError(
                f"{folder} has {record}; AQLM is read with bits of {BITS['aq']}, out_group_size=1 "
                "and the other two above 0"
            )
        return record

    def layout(
        self, record: dict[str, Any], name: str, stored: Mapping[str, Entry], shape: tuple[int, int]
    ) -> AqlmLayout:
        """Check the layer's tensors."""
        books, bits, size, _ = (int(record[key]) for key in SETTINGS)
        rows, columns = shape
        if columns % size:
            raise FormatError(f"layer {name!r} has {columns} inputs in vectors of {size}")
        check_tensors(
            name,
            stored,
            {
                "codebooks": ((books, 1 << bits, 1, size), FLOATS),
                "codes": ((rows, columns // size, books), (INTEGERS[bits],)),
                "scales": ((rows, 1, 1, 1), FLOATS),
            },
        )
        scheme = Scheme(bits, True, None, "channel", kind="aq")
        return AqlmLayout(scheme, books, size, stored["scales"].dtype)


@dataclass(frozen=True)
class AqlmLayout(Layout):
    """One layer as above. Its codebooks are float tensors of the model, not values of the layer."""

    scheme: Scheme
    books: int
    size: int
    dtype: torch.dtype

    def decode(self, stored: Mapping[str, Tensor]) -> Values:
        """Codes (out, in / s, K) as they are stored."""
        return Values(stored["codes"], stored["scales"].float().reshape(-1, 1))

    def encode(self, values: Values) -> dict[str, Tensor]:
        """Scales; codes do not change."""
        return {"scales": values.scale.to(self.dtype).reshape(-1, 1, 1, 1)}

    def rounded(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scales of the stored dtype."""
        return scale.to(self.dtype).float(), None

    def layer(self, name: str, values: Values, bias: bool) -> QuantLinear:
        """A layer whose bias and codebooks are on the meta device."""
        layer = AdditiveLinear(values.codes.shape[1] * self.size, self, values, bias=bias)
        layer.scale = values.scale
        return layer


class AdditiveLinear(QuantLinear):
    """y = x @ (scale * sum of codebooks' vectors).T + bias.

    Parameter `codebooks` (K, 2^b, 1, s), which no gradient reaches; buffers `codes`
    (out, in / s, K), `scale` (out, 1).
    """

    codebooks: nn.Parameter

    def __init__(self, columns: int, layout: AqlmLayout, values: Values, *, bias: bool) -> None:
        rows = values.codes.shape[0]
        super().__init__(columns, rows, layout.scheme, bias=bias, device="meta")
        self.codes = values.codes
        vectors = (layout.books, 1 << layout.scheme.bits, 1, layout.size)
        self.codebooks = nn.Parameter(torch.zeros(vectors, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in x's dtype."""
        codes = self.unpacked()
        return kernels.linear(
            x, codes, self.scale, None, self.bias, self.scheme, self.compute_dtype
        )

    def unpacked(self) -> Tensor:
        """The sums of vectors, float32 (out, in)."""
        places = self.codes.long() % self.codebooks.shape[1]
        sums = torch.zeros((), device=self.codes.device)
        for k, book in enumerate(self.codebooks):
            sums = sums + book.detach().squeeze(1).float()[places[..., k]]
        return sums.flatten(1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)


FORMAT = AqlmFormat()
