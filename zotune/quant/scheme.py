"""How a weight is quantized, as a record that is its text: `Scheme.parse("int4-g64")`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import torch

from zotune.errors import BadInput

COMMON_BITS: Final = (2, 3, 4, 8)  # widths of integers that most formats know
BITS: Final = {"int": (2, 3, 4, 5, 6, 7, 8), "fp": (4, 8), "nf": (4,), "fpb": (4,), "aq": (8, 16)}
GRANULARITIES: Final = ("group", "channel", "tensor")
_SCHEME = re.compile(
    r"(?P<kind>int|fpb|fp|nf|aq)(?P<bits>\d+)-(?P<unit>g\d+|channel|tensor)"
    r"(?P<asym>-asym)?(-a(?P<act>\d+)(?P<uneven>asym)?)?"
)


@dataclass(frozen=True)
class Scheme:
    """How one weight is quantized; `str(scheme)` and `Scheme.parse` are inverses.

    Args:
        bits: width of a code: 2 to 8; 4 or 8 for floats.
        symmetric: True for no zero point, False for one zero per scale.
        group_size: input columns in a row that share a scale; None unless granularity is "group".
        granularity: "group", "channel" (one scale per output row) or "tensor" (a single scale).
        act_bits: 4 to 8 quantizes activations to integers of so many bits per token at run time
            (8 for floats, to E4M3); None leaves them alone.
        act_symmetric: True for a grid of activations around zero, False for one from a token's
            smallest to its largest, with a zero point of its own.
        kind: "int", or "fp" for codes that are floats of few bits: E4M3 (8 bits), E2M1 (4 bits);
            "nf" for NF4, "fpb" for bitsandbytes' FP4; "aq" for places in codebooks of vectors.

    Raises:
        BadInput: for a combination that does not exist.

    >>> Scheme.parse("int4-g64-asym")
    Scheme(bits=4, symmetric=False, group_size=64, granularity='group', act_bits=None, kind='int', \
act_symmetric=True)
    >>> str(Scheme(bits=8, group_size=None, granularity="channel", act_bits=8))
    'int8-channel-a8'
    """

    bits: int = 4
    symmetric: bool = True
    group_size: int | None = 64
    granularity: str = "group"
    act_bits: int | None = None
    kind: str = "int"
    act_symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS.get(self.kind, ()):
            raise BadInput(
                f"bits={self.bits!r} of kind={self.kind!r} is not supported; use one of {BITS}"
            )
        if self.kind != "int" and not self.symmetric:
            raise BadInput(f"kind={self.kind!r} has no zero points; use symmetric=True")
        if self.granularity not in GRANULARITIES:
            raise BadInput(
                f"granularity={self.granularity!r} is unknown; use one of {GRANULARITIES}"
            )
        if self.granularity == "group" and (self.group_size is None or self.group_size < 1):
            raise BadInput(
                f"granularity='group' needs a group_size >= 1, got {self.group_size!r}; "
                "give one or use granularity='channel'"
            )
        if self.granularity != "group" and self.group_size is not None:
            raise BadInput(
                f"granularity={self.granularity!r} takes no group_size, got {self.group_size!r}; "
                "use group_size=None"
            )
        possible = (4, 5, 6, 7, 8) if self.kind == "int" else (8,)
        if self.act_bits not in (None, *possible):
            raise BadInput(f"act_bits={self.act_bits!r} is not supported; use {possible} or None")
        if not self.act_symmetric and (self.act_bits is None or self.kind != "int"):
            raise BadInput(
                "act_symmetric=False is for activations rounded to integers, got "
                f"act_bits={self.act_bits!r} of kind={self.kind!r}; give 4 to 8 bits of kind 'int'"
            )

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read a scheme written as `int|fp<bits>-g<size>|channel|tensor[-asym][-a<bits>[asym]]`.

        Raises:
            BadInput: if the text does not have that form.

        >>> Scheme.parse("int8-tensor").granularity
        'tensor'
        """
        match = _SCHEME.fullmatch(text.strip().lower())
        if match is None:
            raise BadInput(
                f"scheme {text!r} is not understood; write int<bits>-g<size>, int<bits>-channel or "
                "int<bits>-tensor, then optionally -asym and -a<bits> or -a<bits>asym, for example "
                "'int4-g64'"
            )
        unit, act = match["unit"], match["act"]
        grouped = unit.startswith("g")
        return cls(
            bits=int(match["bits"]),
            symmetric=match["asym"] is None,
            group_size=int(unit[1:]) if grouped else None,
            granularity="group" if grouped else unit,
            act_bits=int(act) if act else None,
            act_symmetric=match["uneven"] is None,
            kind=match["kind"],
        )

    def __str__(self) -> str:
        unit = f"g{self.group_size}" if self.granularity == "group" else self.granularity
        asym = "" if self.symmetric else "-asym"
        act = f"-a{self.act_bits}" if self.act_bits else ""
        act += "" if self.act_symmetric else "asym"
        return f"{self.kind}{self.bits}-{unit}{asym}{act}"

    @property
    def lowest(self) -> int:
        """The smallest code, -2^(b-1)."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest code, 2^(b-1) - 1."""
        return (1 << (self.bits - 1)) - 1

    @property
    def stored(self) -> torch.dtype:
        """Dtype of the codes as a layer holds them: uint8 where several share a byte."""
        if self.bits < 8:
            return torch.uint8
        return torch.int8 if self.kind == "int" else torch.float8_e4m3fn

    @property
    def integer_inputs(self) -> bool:
        """Whether kernels round activations to int8 and multiply integers."""
        return self.act_bits == 8 and self.act_symmetric and self.kind == "int"

    @property
    def float_inputs(self) -> bool:
        """Whether the layer rounds activations to E4M3 before a kernel sees them."""
        return self.act_bits is not None and self.kind == "fp"

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the scale of a (rows, columns) weight; the last group may be shorter.

        >>> Scheme.parse("int4-g64").scale_shape(10, 130)
        (10, 3)
        """
        if self.granularity == "tensor":
            return (1, 1)
        return (rows, -(-columns // self.group_size) if self.group_size else 1)

    def check_divides(self, columns: int, name: str = "weight") -> None:
        """Refuse to quantize a weight whose last group would be shorter than the others.

        Raises:
            BadInput: if group_size does not divide columns; the message names sizes that do.
        """
        if self.group_size and columns % self.group_size:
            raise BadInput(
                f"group_size={self.group_size} does not divide in_features={columns} of {name!r}; "
                f"use {nearest_divisors(columns, self.group_size)} or exclude it"
            )


def nearest_divisors(columns: int, wanted: int) -> str:
    """The divisors of `columns` just below and above `wanted`, as words for an error message.

    >>> nearest_divisors(1000, 48)
    '40 or 50'
    """
    divisors = [d for d in range(1, columns + 1) if columns % d == 0]
    below = [d for d in divisors if d < wanted][-1:]
    above = [d for d in divisors if d > wanted][:1]
    return " or ".join(str(d) for d in (below + above))
