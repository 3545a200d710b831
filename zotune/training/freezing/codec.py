"""How features lie on the disk: as they are, or within a bound by ZFP.

ZFP (Lindstrom 2014, doi:10.1109/TVCG.2014.2346458) through `zfpy`, in its fixed-accuracy mode.
The bound is checked as it is written: where ZFP cannot keep it (a range beyond float32's
digits), the features are stored by ZFP's reversible mode instead.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zotune.core.calls import nearest, split_calls
from zotune.errors import BadInput, FormatError, ZotuneError

_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Codec(ABC):
    """Tensors to bytes and back; `bound` is the largest error of a number, 0 for none."""

    bound: float

    @abstractmethod
    def encode(self, features: Tensor) -> bytes:
        """The bytes of a float tensor of one dimension or more."""

    @abstractmethod
    def decode(self, data: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What `encode` got, within the bound (and the rounding of a 16-bit dtype)."""

    @abstractmethod
    def fitted(self, rms: float, stage: int) -> Codec:
        """For features of this rms at the `stage`-th freeze point, counted from 0."""


@dataclass(frozen=True)
class Lossless(Codec):
    """The bytes themselves: the last bits of features are noise that no codec makes smaller.

    >>> x = torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)
    >>> Lossless().decode(Lossless().encode(x), (1, 2), torch.bfloat16).tolist()
    [[1.5, -2.0]]
    """

    bound: float = 0.0

    def encode(self, features: Tensor) -> bytes:
        whole = features.detach().cpu().contiguous().view(_WHOLE[features.element_size()])
        return whole.numpy().tobytes()

    def decode(self, data: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        if len(data) != count * dtype.itemsize:
            raise FormatError(f"{len(data)} bytes for {count} numbers of {dtype}")
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)

    def fitted(self, rms: float, stage: int) -> Lossless:
        return self


@dataclass(frozen=True)
class Zfp(Codec):
    """|decoded - x| <= bound, bound = tolerance rms growth^stage.

    `tolerance` counts in rms of the features at the freeze point; each further freeze point
    multiplies it by `growth`: compression gets stronger as more layers freeze, because fewer
    layers are left that could do harm with the error (our reading of arXiv 2508.15033, whose
    bounds are not published). ZFP takes the next smaller power of two.

    >>> codec = Zfp(tolerance=0.1).fitted(rms=2.0, stage=1)
    >>> codec.bound
    0.4
    >>> x = torch.linspace(-3, 3, 600).view(10, 60)
    >>> data = codec.encode(x)
    >>> len(data) < 4 * x.numel() / 4
    True
    >>> bool((codec.decode(data, (10, 60), x.dtype) - x).abs().max() <= codec.bound)
    True
    """

    tolerance: float = 0.1
    growth: float = 2.0
    bound: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < math.inf:
            raise BadInput(f"tolerance={self.tolerance}; want more than 0, in rms of the features")
        if not 1 <= self.growth < math.inf:
            raise BadInput(f"growth={self.growth}; want at least 1, the factor per freeze point")

    def encode(self, features: Tensor) -> bytes:
        if not features.numel():
            return b""
        zfpy = _zfpy()
        wide = torch.float64 if features.dtype == torch.float64 else torch.float32
        values = _planes(features.detach().cpu().to(wide).numpy())
        if not np.isfinite(values).all():
            raise ZotuneError(
                "features hold NaN or infinities, which ZFP cannot store; look at the model and "
                "the data, or use cache_codec='lossless'"
            )
        data: bytes = zfpy.compress_numpy(values, tolerance=self.bound, write_header=True)
        error = zfpy.decompress_numpy(data).astype(np.float64) - values
        if np.abs(error).max() > self.bound:
            data = zfpy.compress_numpy(values, write_header=True)
        return data

    def decode(self, data: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)
        values = _zfpy().decompress_numpy(data)
        if values.size != math.prod(shape):
            raise FormatError(f"{values.size} numbers for a shape of {shape}")
        return torch.from_numpy(values).view(shape).to(dtype)

    def fitted(self, rms: float, stage: int) -> Zfp:
        return replace(self, bound=self.tolerance * self.growth**stage * (rms or 1.0))


def _planes(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """ZFP knows 1 to 4 dimensions; further ones in front become one."""
    values = np.ascontiguousarray(values)
    return values.reshape(-1, *values.shape[-3:]) if values.ndim > 4 else values


def _zfpy() -> Any:
    try:
        import zfpy
    except ImportError as error:
        raise BadInput("cache_codec='zfp' needs zfpy: pip install 'zotune[cache]'") from error
    return zfpy


CODECS: dict[str, type[Codec]] = {"lossless": Lossless, "zfp": Zfp}


def parse_codec(text: str) -> Codec:
    """A codec from its short name.

    >>> parse_codec("zfp(tolerance=0.5)")
    Zfp(tolerance=0.5, growth=2.0, bound=0.0)
    """
    calls = split_calls(text)
    name, options = calls[0]
    if len(calls) > 1 or name not in CODECS:
        raise BadInput(f"unknown codec {text!r}{nearest(name, CODECS)}")
    if unknown := set(options) - ({"tolerance", "growth"} if name == "zfp" else set()):
        raise BadInput(f"codec {name!r} has no option {', '.join(sorted(unknown))}")
    codec = CODECS[name](**options)
    if isinstance(codec, Zfp):
        _zfpy()
    return codec
