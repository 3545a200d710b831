"""One file, one method. A factory in any file of this folder, marked with `@method`, is found by
the command line, the docs and the test matrix with no other edit.

Options that methods share:

    `lr`            length of a step
    `eps`           perturbation scale: how far from the present point losses are measured
    `units`         what lr and eps count: "relative" each block's own unit, "absolute" its numbers
    `queries`       directions measured and averaged per step
    `directions`    "batch": one for the whole batch, from both sides; "one-sided": from one side
                    and the base point; "example": one of its own for each example
    `schedule`      of lr: "constant", "linear" or "cosine" to 0
    `warmup`        steps in which lr rises
    `weight_decay`  decoupled, on the matrices of layers only, told by module type
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from importlib import import_module
from typing import Any

from zotune.core import nouns
from zotune.core.backprop import Backprop
from zotune.core.calls import nearest, split_calls
from zotune.core.method import Method
from zotune.errors import BadInput, ZotuneError

AnyMethod = Method | Backprop
Factory = Callable[..., AnyMethod]

FLOATS = (
    "weights", "lora", "adapter", "norms", "biases", "head", "scales", "zeros", "latents",
    "clipping", "transforms", "activations",
)  # fmt: skip
"""Every space of floats: for methods that ask nothing of a block's shape."""


@dataclass(frozen=True)
class Entry:
    """What `zotune list methods` shows of a method."""

    name: str
    factory: Factory
    paper: str
    year: int
    arxiv: str
    spaces: tuple[str, ...]
    memory: str

    @property
    def default_space(self) -> str:
        return self.spaces[0]

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.factory) or "").split("\n")[0]

    @property
    def options(self) -> dict[str, Any]:
        return {n: p.default for n, p in inspect.signature(self.factory).parameters.items()}


_ENTRIES: dict[str, Entry] = {}


def method(
    *, paper: str, year: int, arxiv: str, spaces: tuple[str, ...], memory: str
) -> Callable[[Factory], Factory]:
    """Mark a factory as a method. Its name is the function's, with dashes; the first of `spaces`
    is its default, and what comes again counts once; `memory` says in words what it keeps beyond
    inference."""

    def mark(factory: Factory) -> Factory:
        name = factory.__name__.replace("_", "-")
        if name in _ENTRIES:
            raise ZotuneError(f"there is already a method called {name!r}; choose a unique name")
        once = tuple(dict.fromkeys(spaces))
        _ENTRIES[name] = Entry(name, factory, paper, year, arxiv, once, memory)
        return factory

    return mark


def entries() -> dict[str, Entry]:
    """All methods by name, in alphabetical order."""
    for info in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{info.name}")
    return dict(sorted(_ENTRIES.items()))


def records() -> dict[str, Any]:
    """What the repr of a method or a space may name: the core's nouns, and the records that
    methods keep in their own files. A name that two of them claim is an error.

    >>> eval(repr(get("mezo")), records()) == get("mezo")
    True
    """
    found = {name: getattr(nouns, name) for name in nouns.__all__}
    for known in entries().values():
        module = import_module(known.factory.__module__)
        for name, kind in vars(module).items():
            own = isinstance(kind, type) and kind.__module__ == module.__name__
            if own and is_dataclass(kind) and found.setdefault(name, kind) is not kind:
                raise ZotuneError(f"{module.__name__}.{name} has the name of another record")
    return found


def entry(name: str) -> Entry:
    """One method's entry; an unknown name offers the nearest."""
    known = entries()
    name = name.replace("_", "-")
    if name not in known:
        raise BadInput(f"unknown method {name!r}{nearest(name, known)}")
    return known[name]


def get(name: str, **options: Any) -> AnyMethod:
    """A method by name with its options.

    >>> get("mezo", eps=1e-2).estimator.eps
    0.01
    """
    found = entry(name)
    unknown = sorted(set(options) - set(found.options))
    if unknown:
        raise BadInput(
            f"method {found.name!r} has no option {unknown[0]!r}"
            f"{nearest(unknown[0], found.options)}"
        )
    return found.factory(**options)


def parse(text: str, **overrides: Any) -> AnyMethod:
    """A method from a short call; overrides win.

    >>> parse("zo-sign(queries=2)", eps=1e-2).forwards
    4
    """
    calls = split_calls(text)
    if len(calls) != 1:
        raise BadInput(f"cannot read method {text!r}: want one name(option=value)")
    name, options = calls[0]
    return get(name, **{**options, **overrides})
