"""A linear layer that computes as its quantized self while its weight stays float."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.errors import BadInput
from zotune.quant import affine, kernels
from zotune.quant.calibrate.folding import Fold
from zotune.quant.kernels import reference
from zotune.quant.linear import Conv1DLike, QuantLinear, matrix
from zotune.quant.scheme import Scheme

LEAST, MOST = math.log(1 / 16), math.log(2.0)
"""Bounds of the logarithms of clipping thresholds, as shares of a group's own extremes."""
_KEPT: Final = ("upper", "lower", "input_clip", "log_scale", "shift")


class Point(NamedTuple):
    """The tensors that a layer's numbers come from; see `FakeQuantLinear`."""

    weight: Tensor
    bias: Tensor | None
    upper: Tensor
    lower: Tensor
    input_clip: Tensor | None
    log_scale: Tensor | None
    shift: Tensor | None


class FakeQuantLinear(nn.Module):
    """y = A((x - shift) / s) Q(W s).T + bias + W shift, with a float W that training may move.

    Q rounds to the grid between beta min(w) and alpha max(w) of each group (`affine.quantize` with
    clipped extremes), A rounds each token's activations; both compute what the quantized layer
    will. alpha = exp(upper), beta = exp(lower), within [1/16, 2], after OmniQuant (2023, arXiv
    2308.13137) and ZeroQAT (2025, arXiv 2509.00031); as logarithms they start at rounding to
    nearest exactly, and a change of 0.01 is 1 % everywhere. s = exp(log_scale) and shift belong to
    the channels of the layer's input and are shared by all layers that read it (`attach_`).

    Buffers, float32: `upper`, `lower` shaped like the scheme's scale; `input_clip` (1,), the
    logarithm of the share of a token's largest activation beyond which it is clipped, where the
    scheme rounds activations; `log_scale` and `shift` (channels,) or None; `fold` says which input
    column is whose channel, and what takes the transform up in the end.

    `rounding` = False leaves the transforms and takes Q and A away.

    Args:
        weight: (out, in), any float dtype.
        bias: (out,) or None.
        scheme: an integer scheme.
        name: the layer's name, for messages.

    Raises:
        BadInput: for a weight that is not finite, or a group size that does not divide it.

    >>> layer = FakeQuantLinear(torch.randn(4, 16), None, Scheme.parse("int2-g8-asym"))
    >>> layer.quantized().dequantize().equal(layer.weight_seen()[0])
    True
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    upper: Tensor
    lower: Tensor
    input_clip: Tensor | None
    log_scale: Tensor | None
    shift: Tensor | None
    fold: Fold | None
    places: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None, scheme: Scheme, name: str = "weight"
    ) -> None:
        super().__init__()
        affine.quantize(weight, scheme, name)  # raises what there is to raise
        self.out_features, self.in_features = weight.shape
        self.scheme, self.rounding = scheme, True
        self.scale_dtype: torch.dtype = torch.float32  # what the quantized layer's is stored in
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        shape = scheme.scale_shape(*weight.shape)
        for side in ("upper", "lower"):
            self.register_buffer(side, torch.zeros(shape, device=weight.device))
        clip = torch.zeros(1, device=weight.device) if scheme.act_bits else None
        self.register_buffer("input_clip", clip)
        self.register_buffer("log_scale", None)
        self.register_buffer("shift", None)
        self.fold, self.places = None, None

    @classmethod
    def from_linear(
        cls, module: nn.Linear | Conv1DLike, scheme: Scheme, name: str = ""
    ) -> FakeQuantLinear:
        """An nn.Linear or a transformers Conv1D, whose tensors it shares where it can."""
        weight = matrix(module).contiguous()
        return cls(weight, module.bias, scheme, name or type(module).__name__).eval()

    def attach_(self, fold: Fold | None, log_scale: Tensor | None, shift: Tensor | None) -> None:
        """Transform the input's channels from now on; the same tensors at every reader."""
        self.fold, self.log_scale, self.shift = fold, log_scale, shift
        self.places = None
        if fold is not None:
            self.places = fold.expand(torch.arange(fold.channels, device=self.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in x's dtype."""
        return self.at(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    def at(self, x: Tensor, **values: Tensor) -> Tensor:
        """(tokens, in) -> (tokens, out) with these tensors in place of the layer's own; or, where x
        and they have one more dimension in front, at several points at once."""
        point = self.point(**values)
        x = self.inputs(x, point)
        weight, bias = self.weight_seen(point)
        if weight.dim() == 2:
            y = F.linear(x, weight.to(x.dtype))
        else:
            y = x @ weight.to(x.dtype).mT
        return y if bias is None else y.add_(bias.to(x.dtype).unsqueeze(-2))

    def point(self, **values: Tensor) -> Point:
        """The layer's tensors, some of them replaced."""
        own = (values.get(name, getattr(self, name)) for name in Point._fields)
        return Point(*own)

    def inputs(self, x: Tensor, point: Point | None = None, rounding: bool = True) -> Tensor:
        """A((x - shift) / s), in x's dtype; without A, if it is not to be rounded."""
        point = point or self.point()
        if point.shift is not None:
            x = x - self._columns(point.shift).to(x.dtype)
        if point.log_scale is not None:
            x = x / self._columns(point.log_scale).exp().to(x.dtype)
        if rounding and self.rounding and self.scheme.act_bits is not None:
            assert point.input_clip is not None
            even = self.scheme.act_symmetric
            x = kernels.clip_rows(x, _share(point.input_clip).unsqueeze(-1), even)
            x = reference.fake_quantize_rows(x, self.scheme.act_bits, even).to(x.dtype)
        return x

    def weight_seen(self, point: Point | None = None) -> tuple[Tensor, Tensor | None]:
        """Q(W s) and bias + W shift, at least float32."""
        point = point or self.point()
        weight, bias = self.transformed(point)
        if not self.rounding:
            return weight, bias
        codes, scale, zero = self._rounded(weight, point)
        if zero is not None:
            codes = codes - zero.unsqueeze(-1)
        return (codes * scale.unsqueeze(-1)).flatten(-2), bias

    def transformed(self, point: Point | None = None) -> tuple[Tensor, Tensor | None]:
        """W s and bias + W shift."""
        point = point or self.point()
        weight = _wide(point.weight)
        bias = None if point.bias is None else _wide(point.bias)
        if point.shift is not None:
            shift = self._columns(point.shift).to(weight.dtype)
            moved = (weight @ shift.mT).squeeze(-1)
            bias = moved if bias is None else bias + moved
        if point.log_scale is not None:
            weight = weight * self._columns(point.log_scale).exp().to(weight.dtype)
        return weight, bias

    def quantized(self) -> QuantLinear:
        """The ordinary layer of the same numbers, for inputs that come transformed."""
        weight, bias = self.transformed()
        codes, scale, zero = self._rounded(weight, self.point())
        whole = codes.flatten(-2).to(torch.int8)
        layer = QuantLinear.from_codes(self, self.scheme, whole, scale, zero)  # type: ignore[arg-type]
        layer.scale_dtype = self.scale_dtype
        if self.bias is not None and bias is not None:
            layer.bias = nn.Parameter(bias.to(self.bias.dtype), requires_grad=False)
        if self.input_clip is not None and bool(self.input_clip.any()):
            layer.input_clip = _share(self.input_clip)
        return layer

    def steps(self) -> Tensor:
        """The distance between grid points: (out, groups)."""
        return self._rounded(self.transformed()[0], self.point())[1]

    def _columns(self, channels: Tensor) -> Tensor:
        """Values of channels (..., channels) once per input column: (..., 1, in)."""
        return channels[..., self.places].unsqueeze(-2)

    def ends(
        self, weight: Tensor | None = None, point: Point | None = None
    ) -> tuple[Tensor, Tensor]:
        """The clipped extremes of every group, between which the grid lies: (..., out, groups)."""
        point = point or self.point()
        low, high = self._extremes(self.transformed(point)[0] if weight is None else weight)
        return low * _share(point.lower), high * _share(point.upper)

    @torch.no_grad()
    def pin_(self, low: Tensor, high: Tensor) -> None:
        """Set the thresholds so that the grid of the weights as they are lies between these ends,
        as far as weights reach to half of them: a threshold is at most twice an extreme."""
        ends = zip((self.lower, self.upper), self._extremes(), (low, high), strict=True)
        for side, own, end in ends:
            share = torch.where(own == 0, 1.0, end / own)
            side.copy_(share.clamp_min(math.exp(LEAST)).log().clamp(LEAST, MOST))

    def _extremes(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Smallest and largest weight of every group, 0 among them."""
        weight = self.transformed()[0] if weight is None else weight
        shape = self.scheme.scale_shape(self.out_features, self.in_features)
        grouped = affine.in_groups(weight.float(), shape[1], self.scheme.group_size)
        low, high = affine.extremes(grouped, shape)
        return low.clamp(max=0.0), high.clamp(min=0.0)

    def _rounded(self, weight: Tensor, point: Point) -> tuple[Tensor, Tensor, Tensor | None]:
        """Float codes (..., out, groups, columns of a group), scale and zero."""
        scheme = self.scheme
        scale, zero = affine.grid(*self.ends(weight, point), scheme)
        groups = scheme.scale_shape(self.out_features, self.in_features)[1]
        grouped = affine.in_groups(weight.float(), groups, scheme.group_size)
        return affine.rounded(grouped, scale, zero, scheme), scale, zero

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scheme={self.scheme}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FakeQuantLinear:
        """Move with the model but stay float32, and stay shared between layers."""
        kept = {name: getattr(self, name) for name in _KEPT}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, values in kept.items():
            moved = getattr(self, name)
            if moved is not None and moved.dtype != values.dtype:
                setattr(self, name, values.to(moved.device))
        return self


def _share(log: Tensor) -> Tensor:
    return log.clamp(LEAST, MOST).exp()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if torch.finfo(tensor.dtype).bits < 32 else tensor


def fake_layers(model: nn.Module) -> dict[str, FakeQuantLinear]:
    """The fake-quantized layers of a model by name.

    >>> fake_layers(nn.Linear(2, 2))
    {}
    """
    return {n: m for n, m in model.named_modules() if isinstance(m, FakeQuantLinear)}


def only_fake(model: nn.Module) -> dict[str, FakeQuantLinear]:
    """The same; a model without any is an error."""
    found = fake_layers(model)
    if not found:
        raise BadInput(
            "this model has no layer that is trained through its rounding: prepare it with "
            "`zotune quantize --method zeroqat`, or tune another space"
        )
    return found
