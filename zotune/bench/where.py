"""Where the time of a step goes, by torch's profiler.

Operators of torch are sorted by name. What numba compiles is no operator, so the functions that
call it are given spans of their own for the time of the measurement; what torch does inside a span
belongs to the span.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from importlib import import_module
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

PRODUCTS, ATTENTION, REST = "products", "attention", "norms, activations, embeddings"
NOISE, ROUNDING, UPDATE = "noise", "quantize, dequantize, rescale", "update"
PYTHON = "Python"
PARTS = (PRODUCTS, ATTENTION, REST, ROUNDING, NOISE, UPDATE, PYTHON)

SPANS = {
    PRODUCTS: ("zotune.quant.kernels.vnni:product_", "zotune.quant.kernels.bf16:product_"),
    NOISE: ("zotune.core.noise:draw_rows", "zotune.core.noise:draw_whole",
            "zotune.core.noise:combine_"),
    ROUNDING: ("zotune.quant.kernels.rounded:round_rows", "zotune.quant.kernels.rounded:rescale_",
               "zotune.quant.kernels.cpu:weight_scratch", "zotune.quant.kernels.cpu:codes_scratch"),
    UPDATE: ("zotune.core.step:Tuner.apply_",),
}  # fmt: skip
"""Products that finish their outputs in the same pass count as products."""
OPERATORS = (
    (ATTENTION, re.compile(r"attention|softmax|flash|bmm")),
    (PRODUCTS, re.compile(r"mm$|mm_|int_mm|addmm|linear|int4pack|gemm|conv")),
)
_SPAN = "zotune: "


def shares(work: Callable[[], object], calls: int = 3) -> dict[str, float]:
    """The share of each of `PARTS` in the time of some calls of `work`; they sum to 1.

    >>> import torch
    >>> found = shares(lambda: torch.ones(64, 64) @ torch.ones(64, 64))
    >>> abs(sum(found.values()) - 1) < 1e-6
    True
    """
    with spans(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(calls):
            with record_function(_SPAN + PYTHON):
                work()
    events = list(profiler.events() or ())
    here = {e.thread for e in events if e.name == _SPAN + PYTHON}
    found: dict[str, float] = defaultdict(float)
    for event in events:
        if event.thread in here:
            found[_part(event)] += event.self_cpu_time_total
    total = sum(found.values())
    return {part: found[part] / total for part in PARTS}


def _part(event: Any) -> str:
    """Its own span or the innermost around it; where that is the whole call, by its name."""
    around = event
    while around is not None and not around.name.startswith(_SPAN):
        around = around.cpu_parent
    part: str = PYTHON if around is None else around.name.removeprefix(_SPAN)
    if part != PYTHON or event is around:
        return part
    return next((p for p, names in OPERATORS if names.search(event.name)), REST)


@contextmanager
def spans() -> Iterator[None]:
    """The functions of `SPANS` say when they run."""
    with ExitStack() as stack:
        for part, places in SPANS.items():
            for place in places:
                owner, name = owner_of(place)
                stack.enter_context(_replaced(owner, name, _recorded(getattr(owner, name), part)))
        yield


def owner_of(place: str) -> tuple[Any, str]:
    """The module or class, and the name in it, of "module:name" or "module:Class.name"."""
    module, _, path = place.partition(":")
    *outer, name = path.split(".")
    owner: Any = import_module(module)
    for part in outer:
        owner = getattr(owner, part)
    return owner, name


def _recorded(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    @wraps(function)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        with record_function(_SPAN + part):
            return function(*args, **kwargs)

    return recorded


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)
