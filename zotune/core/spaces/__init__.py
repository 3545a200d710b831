"""One file per kind of space; `parse("adapter(rank=4)+head")` reads their short names."""

from __future__ import annotations

from typing import Any

from zotune.core.calls import nearest, split_calls
from zotune.core.space import SpaceSpec, SpaceSum
from zotune.core.spaces.adapter import Adapter
from zotune.core.spaces.clipping import Activations, Clipping
from zotune.core.spaces.head import Head
from zotune.core.spaces.latents import Latents
from zotune.core.spaces.lora import Lora
from zotune.core.spaces.norms import Norms
from zotune.core.spaces.parameters import Biases, Weights
from zotune.core.spaces.quantized import Codes, Scales, Zeros
from zotune.core.spaces.transforms import Transforms
from zotune.errors import BadInput

SPACES: dict[str, type[SpaceSpec]] = {
    kind.__name__.lower(): kind
    for kind in (
        Weights,
        Norms,
        Biases,
        Head,
        Scales,
        Zeros,
        Codes,
        Lora,
        Adapter,
        Latents,
        Clipping,
        Transforms,
        Activations,
    )
}


def get(name: str, **options: Any) -> SpaceSpec:
    """A space by its short name; unknown names and options offer the nearest."""
    if name not in SPACES:
        raise BadInput(f"unknown space {name!r}{nearest(name, SPACES)}")
    try:
        return SPACES[name](**options)
    except TypeError as error:
        fields = list(SPACES[name].__dataclass_fields__)
        raise BadInput(f"space {name!r}: {error}; its options are {', '.join(fields)}") from error


def parse(text: str) -> SpaceSpec:
    """Short names with options, joined by +.

    >>> parse("adapter(rank=4) + head(lr=0.01)")  # doctest: +ELLIPSIS
    SpaceSum(..., parts=(Adapter(eps=None, lr=None, rank=4, ...), Head(eps=None, lr=0.01, ...))
    """
    specs = [get(name, **options) for name, options in split_calls(text)]
    return specs[0] if len(specs) == 1 else SpaceSum(parts=tuple(specs))


__all__ = [
    "SPACES", "Activations", "Adapter", "Biases", "Clipping", "Codes", "Head", "Latents", "Lora",
    "Norms", "Scales", "Transforms", "Weights", "Zeros", "get", "parse",
]  # fmt: skip
