"""What this machine can do: rates of matrix products and bandwidth of memory, measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from zotune.bench.rows import Row
from zotune.quant.kernels import integer_matmul

PRODUCTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
SIZES = ((1024, 1024, 1024), (1536, 1536, 384), (1024, 2048, 2048))
"""(tokens, out, in): a peak is the best of them."""
BUFFER = 1 << 26  # float32 numbers that are read or copied: more than any cache holds
REPEATS = 5


def measure(
    sizes: tuple[tuple[int, int, int], ...] = SIZES, buffer: int = BUFFER
) -> dict[str, float]:
    """Operations per second of fp32, bf16 and int8 products, bytes per second of a read and a copy.

    A copy counts what it reads and what it writes.
    """
    found = {name: max(rate(*size, dtype) for size in sizes) for name, dtype in PRODUCTS.items()}
    x = torch.ones(buffer)
    y = torch.empty_like(x)
    found["read"] = 4 * buffer / best(x.sum)
    found["copy"] = 8 * buffer / best(lambda: y.copy_(x))
    return found


def rate(tokens: int, outputs: int, columns: int, dtype: torch.dtype) -> float:
    """Multiplications and additions per second of one product, the best of a few runs."""
    x = torch.ones(tokens, columns).to(dtype)
    weight = torch.ones(outputs, columns).to(dtype)
    if dtype == torch.int8:
        out = torch.empty(tokens, outputs, dtype=torch.int32)
        seconds = best(lambda: integer_matmul(x, weight, out))
    else:
        seconds = best(lambda: torch.nn.functional.linear(x, weight))
    return 2 * tokens * outputs * columns / seconds


def best(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """The shortest of some runs in seconds: a peak is what the machine gives undisturbed."""
    work()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return max(min(found), 1e-9)


def rows(peaks: Mapping[str, float]) -> list[Row]:
    """The peaks as rows of a report."""
    products = [Row(f"peak: {n} products", peaks[n] / 1e12, "TFLOP/s") for n in PRODUCTS]
    moved = [Row(f"peak: memory {n}", peaks[n] / 1e9, "GB/s") for n in ("read", "copy")]
    return products + moved
