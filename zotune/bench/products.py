"""How many operations the matrix products of a forward take, by their arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from zotune.quant.linear import QuantLinear, is_conv1d

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}


def operations(model: nn.Module, run: Callable[[], object]) -> dict[str, float]:
    """Multiplications and additions in the products of what `run` does with the model.

    Linear layers take 2 tokens in out, attention 4 queries keys width; by "fp32", "bf16", "int8".

    >>> layer = nn.Linear(3, 5)
    >>> operations(layer, lambda: layer(torch.ones(2, 4, 3)))
    {'fp32': 240.0}
    """
    found: Counter[str] = Counter()
    with _layers_counted(model, found), _Attention(found), torch.no_grad():
        run()
    return {name: float(count) for name, count in found.items()}


def seconds_at(peaks: Mapping[str, float], found: Mapping[str, float]) -> float:
    """The least time that these operations take at the machine's peak rates.

    >>> seconds_at({"fp32": 100.0, "int8": 400.0}, {"fp32": 50.0, "int8": 200.0})
    1.0
    """
    return sum(count / peaks[name] for name, count in found.items())


@contextmanager
def _layers_counted(model: nn.Module, found: Counter[str]) -> Iterator[None]:
    def seen(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        columns = args[0].shape[-1]
        found[_arithmetic(module, args[0])] += 2 * output.numel() * columns

    handles = [
        module.register_forward_hook(seen)
        for module in model.modules()
        if isinstance(module, nn.Linear | QuantLinear) or is_conv1d(module)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _arithmetic(module: nn.Module, x: Tensor) -> str:
    if not isinstance(module, QuantLinear):
        return _name(x.dtype)
    return "int8" if module.scheme.integer_inputs else _name(module.compute_dtype or x.dtype)


def _name(dtype: torch.dtype) -> str:
    """float16 goes by the rate of bfloat16, anything wider by float32's."""
    return NAMES.get(dtype, "bf16" if dtype == torch.float16 else "fp32")


class _Attention(TorchFunctionMode):
    """Counts products of two batches of matrices, whoever asks for them."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        if func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            terms = query.numel() * key.shape[-2]
            self.found[_name(query.dtype)] += 2 * terms * (1 + value.shape[-1] // key.shape[-1])
        elif func in (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm) and args[1].dim() > 2:
            self.found[_name(args[0].dtype)] += 2 * args[0].numel() * args[1].shape[-1]
        return func(*args, **(kwargs or {}))
