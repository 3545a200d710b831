"""The table of kernels for the forward of a quantized linear layer.

A kernel is a function `(x, codes, scale, zero, bias, scheme, compute_dtype) -> y` known by name.
`reference` works everywhere and is the truth; `cpu` and `triton` (NVIDIA and AMD GPUs) are fast and
chosen by themselves where they can run.
Codes of dtype uint8 are packed; any other dtype holds one number per weight, fractions included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Final

import torch
from torch import Tensor

from zotune.errors import BadInput
from zotune.quant.codebooks import TABLES, look_up
from zotune.quant.packing import unpack
from zotune.quant.scheme import Scheme

Kernel = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Scheme, torch.dtype | None], Tensor
]

# Modules, not functions: importing a kernel may be slow, so it waits for the first use.
KERNELS: Final[dict[str, str]] = {
    "reference": "zotune.quant.kernels.reference",
    "cpu": "zotune.quant.kernels.cpu",
    "triton": "zotune.quant.kernels.triton",
}
# Ways that a kernel goes: see `rounded.py` and `bf16.py`.
WAYS: Final[dict[str, tuple[str, ...]]] = {"cpu": ("vnni", "onednn", "bf16", "dequantized")}
_forced: ContextVar[str | None] = ContextVar("zotune_kernel", default=None)
_forced_way: ContextVar[str | None] = ContextVar("zotune_kernel_way", default=None)


def kernel(name: str) -> Kernel:
    """The kernel called `name`.

    Raises:
        BadInput: if there is none; the message lists those that exist.

    >>> kernel("reference").__module__
    'zotune.quant.kernels.reference'
    """
    if name not in KERNELS:
        raise BadInput(f"kernel {name!r} is unknown; use one of {sorted(KERNELS)}")
    found: Kernel = import_module(KERNELS[name]).linear
    return found


@contextmanager
def force(name: str | None) -> Iterator[None]:
    """Use the named kernel for every forward inside the block; None lets zotune choose again.

    "cpu/vnni" also names the way that the kernel goes wherever a layer can go it (`WAYS`).

    >>> with force("reference"):
    ...     chosen(torch.zeros(1, 8), torch.ones(1, 1), None, None)
    'reference'
    """
    base, _, way = (name or "").partition("/")
    if name is not None:
        kernel(base)
        if way and way not in WAYS.get(base, ()):
            raise BadInput(f"kernel {name!r} is unknown; {base} goes {WAYS.get(base, ())}")
    tokens = _forced.set(base or None), _forced_way.set(way or None)
    try:
        yield
    finally:
        _forced.reset(tokens[0])
        _forced_way.reset(tokens[1])


def forced_way() -> str | None:
    """The way that is forced upon the kernel, None for the fastest."""
    return _forced_way.get()


def chosen(x: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> str:
    """Name of the kernel that `linear` will use: forced, else by device and need for a gradient."""
    forced = _forced.get()
    if forced is not None:
        return forced
    if torch.is_grad_enabled():
        for tensor in (x, scale, zero, bias):
            if tensor is not None and tensor.requires_grad:
                return "reference"
    if x.device.type == "cpu":
        return "cpu"
    return "triton" if has_triton(x.device.type) else "reference"


@cache
def has_triton(device: str) -> bool:
    """Whether Triton's kernels run on this kind of device.

    >>> has_triton("cpu")
    False
    """
    return device == "cuda" and find_spec("triton") is not None


def linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    scheme: Scheme,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """y = x @ ((codes - zero) * scale).T + bias by the chosen kernel.

    Args:
        x: (..., in).
        codes: uint8 packed (out, bytes), or one number per weight (out, in).
        scale: (out, groups), (out, 1) or (1, 1).
        zero: like scale, or None.
        bias: (out,) or None.
        scheme: the layer's scheme.
        compute_dtype: dtype of the product; None means x's dtype.

    Returns:
        (..., out) in x's dtype.
    """
    run = kernel(chosen(x, scale, zero, bias))
    if codes.dtype == torch.uint8 and (scheme.kind, scheme.bits) in TABLES:
        codes = look_up(unpack(codes, scheme.bits, x.shape[-1]), scheme.kind, scheme.bits)
    return run(x, codes, scale, zero, bias, scheme, compute_dtype)


def rounded_inputs(x: Tensor, scheme: Scheme) -> Tensor:
    """Activations as the product takes them, where no kernel rounds them itself (8-bit integers).

    >>> rounded_inputs(torch.tensor([[7.5, 3.4]]), Scheme.parse("int4-channel-a4")).tolist()
    [[7.0, 3.0]]
    """
    if scheme.float_inputs:
        return fake_quantize_float(x)
    if scheme.act_bits is None or scheme.integer_inputs:
        return x
    from zotune.quant.kernels import reference

    return reference.fake_quantize_rows(x, scheme.act_bits, scheme.act_symmetric).to(x.dtype)


def clip_rows(x: Tensor, share: Tensor, symmetric: bool = True) -> Tensor:
    """Activations no larger than `share` of the largest of their row; or, unless `symmetric`,
    within `share` of the smallest and of the largest.

    >>> clip_rows(torch.tensor([[4.0, -8.0]]), torch.tensor([0.75])).tolist()
    [[4.0, -6.0]]
    >>> clip_rows(torch.tensor([[4.0, -8.0]]), torch.tensor([0.75]), symmetric=False).tolist()
    [[3.0, -6.0]]
    """
    if x.numel() == 0:
        return x
    from zotune.quant.kernels import reference

    low, high = reference.ends(x)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    share = share.to(x.dtype)
    return torch.maximum(torch.minimum(x, high * share), low * share)


def fake_quantize_float(x: Tensor) -> Tensor:
    """Activations rounded to E4M3 with one scale per row, max|x| / 448; the gradient passes.

    >>> fake_quantize_float(torch.tensor([[448.0, 17.0]])).tolist()
    [[448.0, 16.0]]
    """
    with torch.no_grad():
        scale = x.float().abs().amax(-1, keepdim=True) / 448.0
        units = x.float() / scale.clamp_min(torch.finfo(torch.float32).tiny)
        rounded = units.clamp_(-448.0, 448.0).to(torch.float8_e4m3fn).float() * scale
    return rounded.to(x.dtype) if not x.requires_grad else x + (rounded - x).detach()


def refuse_gradient(name: str, *tensors: Tensor | None) -> None:
    """Raises BadInput where the kernel `name`, which has no gradient, would lose one."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise BadInput(
            f"kernel {name!r} has no gradient and one is wanted; use kernel 'reference' or "
            "torch.no_grad()"
        )


def code_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of a product with whole codes: in float16 its sums would pass 65504.

    >>> code_dtype(torch.float16)
    torch.float32
    """
    return torch.float32 if dtype == torch.float16 else dtype


def int8_product(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """One integer product that several sets of scales can share.

    Args:
        x: (tokens, in) float activations, quantized here to int8 per token.
        codes: int8 (out, in).

    Returns:
        acc int32 (tokens, out) and x_scale float32 (tokens, 1), so that
        y = acc * x_scale * scale.T for symmetric channel or tensor scales.

    >>> acc, x_scale = int8_product(torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.int8))
    >>> acc.tolist()
    [[127]]
    """
    x_codes, x_scale = quantize_rows(x)
    return integer_matmul(x_codes, codes), x_scale


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.quantize_rows`, compiled where x lies on the CPU."""
    from zotune.quant.kernels import reference, rounded

    return (rounded if x.device.type == "cpu" else reference).quantize_rows(x)


def integer_matmul(x_codes: Tensor, codes: Tensor, out: Tensor | None = None) -> Tensor:
    """x_codes (tokens, in) @ codes (out, in).T in int32; both int8. Exact on every machine.

    `out`, if given, may be used for the result.

    >>> ones = torch.ones(2, 3, dtype=torch.int8)
    >>> integer_matmul(ones, ones[:1]).tolist()
    [[3], [3]]
    """
    tokens, outputs, columns = x_codes.shape[0], codes.shape[0], codes.shape[1]
    if min(tokens, outputs, columns) == 0:
        return torch.zeros(tokens, outputs, dtype=torch.int32, device=x_codes.device)
    # For one column oneDNN's call fails and leaves the output unwritten (pytorch issue 195066).
    if x_codes.device.type == "cpu" and columns > 1 and int_mm_is_exact():
        right = _canonical(codes).t()
        if out is None:
            return torch._int_mm(_canonical(x_codes), right)
        return torch._int_mm(_canonical(x_codes), right, out=out)
    return _matmul_by_floats(x_codes, codes)


@cache
def int_mm_is_exact() -> bool:
    """Whether `torch._int_mm` is exact on this CPU.

    Without VNNI instructions its 16-bit sums saturate (pytorch issue 136746): tried, not guessed.
    """
    high = torch.full((32, 64), 127, dtype=torch.int8)
    low = torch.full((32, 64), -128, dtype=torch.int8)
    return all(
        torch.equal(torch._int_mm(a, b.t()), _matmul_by_floats(a, b))
        for a, b in ((high, high), (high, low), (low, high), (low, low))
    )


def _matmul_by_floats(x_codes: Tensor, codes: Tensor) -> Tensor:
    """Exact products in float32: 1024 terms of at most 2^14 sum to at most 2^24."""
    total = torch.zeros(x_codes.shape[0], codes.shape[0], dtype=torch.int32, device=x_codes.device)
    for k in range(0, codes.shape[1], 1024):
        x_part, part = x_codes[:, k : k + 1024], codes[:, k : k + 1024]
        total += (x_part.float() @ part.float().t()).to(torch.int32)
    return total


def _canonical(matrix: Tensor) -> Tensor:
    """Contiguous, with the usual strides also where a size of 1 leaves them free."""
    return matrix.contiguous().view(-1).view(matrix.shape)
