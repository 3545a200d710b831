"""Sites: modules that own tuned blocks, and how each part of a stacked batch sees its own values.

Probes are stacked along the batch axis. While an evaluation runs, each site's `forward` is
replaced by a *probed forward*: rows of probe p are computed with that probe's values, which exist
only in a scratch the size of one layer. Nothing is written, so there is nothing to restore.

The generic probed forward calls the module's own forward once per slice of the batch and works
for every module. Faster ones are registered per layer type in `forwards.py`; each is tested
against the generic one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zotune.core.block import Block
from zotune.core.noise import Key
from zotune.core.perturbation import Perturbation
from zotune.core.probe import Probe
from zotune.errors import ZotuneError
from zotune.quant.kernels import has_triton


class StackingError(ZotuneError):
    """A site saw rows that cannot be told apart by probe; evaluate one probe at a time."""


@dataclass(frozen=True)
class Part:
    """Rows of the stacked batch that share one point: a probe, and an example if lanes are on."""

    probe: int
    lane: int | None


@dataclass
class View:
    """What one stacked evaluation looks like from inside a site.

    The stacked batch has `rows` = len(probes) x examples x k rows, probe-major. A piece of a batch
    keeps each example's direction: `first` is the number of its first example in the whole batch,
    or `places` are the numbers of all, where they do not run on.
    """

    probes: Sequence[Probe]
    examples: int
    perturbation: Perturbation
    first: int = 0
    rows: int = 0
    focus: Part | None = None
    places: Sequence[int] | None = None
    visited: set[str] = field(default_factory=set)
    shared: list[nn.Module] = field(default_factory=list)
    table: Tensor | None = None
    _scratch: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def lanes(self) -> bool:
        return self.probes[0].per_example

    @property
    def parts(self) -> list[Part]:
        if self.focus is not None:
            return [self.focus]
        probes = range(len(self.probes))
        if not self.lanes:
            return [Part(p, None) for p in probes]
        return [Part(p, b) for p in probes for b in range(self.examples)]

    @property
    def paired(self) -> bool:
        """Whether probes come in twos that share a direction."""
        keys = [probe.key for probe in self.probes]
        return len(keys) % 2 == 0 and keys[::2] == keys[1::2]

    def index(self, part: Part) -> int:
        """The place of a part among all parts."""
        return part.probe * (self.examples if self.lanes else 1) + (part.lane or 0)

    def streams(self, device: torch.device) -> Tensor:
        """Key and step of every part as a GPU's kernels read them, one table for all sites."""
        if self.table is None or self.table.device != device:
            self.table = streams(self, device)
        return self.table

    def lane_key(self, probe: Probe, lane: int) -> Key:
        """The key of one example's own direction."""
        number = self.first + lane if self.places is None else self.places[lane]
        return probe.key.fold(lane=number)

    def direction(self, block: Block, probe: Probe, lane: int | None) -> Tensor:
        """u of one probe, kept while the site is being computed: +eps and -eps share it."""
        key = probe.key if lane is None else self.lane_key(probe, lane)
        if (block.name, key) not in self._scratch:
            self._scratch[block.name, key] = self.perturbation.displacement(key, block)
        return self._scratch[block.name, key]

    def lane_directions(self, block: Block, probe: Probe) -> Tensor:
        """u of every example of one probe: (examples, *block.shape)."""
        if (block.name, "lanes", probe.key) not in self._scratch:
            keys = [self.lane_key(probe, b) for b in range(self.examples)]
            u = self.perturbation.draw_lanes(keys, block)
            self._scratch[block.name, "lanes", probe.key] = u
        return self._scratch[block.name, "lanes", probe.key]

    def value(self, block: Block, part: Part) -> Tensor:
        """The block as the rows of `part` see it."""
        probe = self.probes[part.probe]
        if probe.step == 0:
            return block.value()
        if has_triton(block.device.type):
            from zotune.core import forwards_triton

            found = forwards_triton.points(self, block, part)
            if found is not None:
                return found[0]
        return block.at(self.direction(block, probe, part.lane), probe.step)

    @contextmanager
    def narrowed(self, rows: int) -> Iterator[None]:
        """For a forward of `rows` rows per probe, of what examples share; without lanes, or with
        as many rows as examples."""
        before = self.examples, self.rows, self.visited
        self.examples, self.rows = min(rows, self.examples), rows * len(self.probes)
        self.visited = set()
        try:
            yield
        finally:
            self.examples, self.rows, self.visited = before

    def forget(self) -> None:
        self._scratch.clear()

    @contextmanager
    def focused(self, part: Part) -> Iterator[None]:
        """Sites called from inside another site's slice see that slice's probe only."""
        before, self.focus = self.focus, part
        try:
            yield
        finally:
            self.focus = before


def streams(view: View, device: torch.device | str) -> Tensor:
    """The table (parts, 6) of `noise_triton.table`: one row per part, its weight the step."""
    from zotune.core import noise_triton

    keys, steps = [], []
    for probe in view.probes:
        lanes = range(view.examples) if view.lanes else (None,)
        keys += [probe.key if lane is None else view.lane_key(probe, lane) for lane in lanes]
        steps += [probe.step] * len(lanes)
    return noise_triton.table(keys, steps, [0] * len(keys), torch.device(device))


@dataclass(frozen=True)
class Site:
    """A module and its tuned blocks by attribute name."""

    path: str
    module: nn.Module
    blocks: dict[str, Block]
    forward: Callable[..., Any] | None = None  # the module's own, or a wrapper's around it

    @property
    def wrapped(self) -> bool:
        """Whether another library has put a forward around the module's own."""
        own = type(self.module).forward
        return self.forward is not None and getattr(self.forward, "__func__", None) is not own

    @contextmanager
    def holding(self, values: dict[str, Tensor]) -> Iterator[None]:
        """The module with these tensors in place of its own: no parameter is written."""
        tables = [
            (table, name, table[name])
            for name in values
            for table in (self.module._parameters, self.module._buffers)
            if name in table
        ]
        for table, name, _ in tables:
            table[name] = values[name]  # type: ignore[assignment]
        try:
            yield
        finally:
            for table, name, own in tables:
                table[name] = own  # type: ignore[assignment]

    def call(self, values: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """The module's own forward at these values (hooks do not run twice)."""
        own = self.forward or partial(type(self.module).forward, self.module)
        with self.holding(values):
            return own(*args, **kwargs)


def sites_of(blocks: Sequence[Block]) -> list[Site]:
    """Group blocks by the modules that own them; a tied block appears at each of its owners."""
    found: dict[int, tuple[str, nn.Module, dict[str, Block]]] = {}
    for block in blocks:
        for owner in block.owners:
            entry = found.setdefault(id(owner.module), (owner.path, owner.module, {}))
            entry[2][owner.attribute] = block
    return [Site(*entry, forward=entry[1].forward) for entry in found.values()]


ProbedForward = Callable[..., Any]
_FORWARDS: dict[type[nn.Module], ProbedForward] = {}


def probed(*kinds: type[nn.Module]) -> Callable[[ProbedForward], ProbedForward]:
    """Register a fast probed forward for exactly these layer types.

    It is called as f(site, view, *args, **kwargs) and returns NotImplemented where the generic
    forward has to do.
    """

    def register(forward: ProbedForward) -> ProbedForward:
        for kind in kinds:
            if kind in _FORWARDS:
                raise ZotuneError(f"{kind.__name__} already has a probed forward")
            _FORWARDS[kind] = forward
        return forward

    return register


def rows_per_part(site: Site, view: View, rows: int) -> int:
    """How many rows each part has; 0 means that all parts share the rows (a broadcast input)."""
    total = len(view.probes) * view.examples
    if len(view.parts) == 1:
        return rows
    if rows % total == 0:
        return rows // len(view.parts)
    if rows == 1:
        return 0
    raise StackingError(
        f"site {site.path!r} got {rows} rows; want a multiple of {len(view.probes)} probes x "
        f"{view.examples} examples, or 1. Use stack=1 for this model"
    )


def generic(site: Site, view: View, *args: Any, **kwargs: Any) -> Any:
    """Slice by slice, with the module's own forward: right for every module."""
    parts = view.parts
    if len(parts) == 1:
        with view.focused(parts[0]):
            return site.call(
                {a: view.value(b, parts[0]) for a, b in site.blocks.items()}, *args, **kwargs
            )
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()]
    if not tensors:
        raise StackingError(f"site {site.path!r} takes no tensor; use stack=1 for this model")
    rows = tensors[0].shape[0]
    each = rows_per_part(site, view, rows)
    outputs = []
    for index, part in enumerate(parts):
        here = slice(index * each, (index + 1) * each) if each else slice(0, 1)

        def cut(t: Any, here: slice = here) -> Any:
            if type(t) in (tuple, list):
                return type(t)(map(cut, t))
            return t[here] if isinstance(t, Tensor) and t.dim() and t.shape[0] == rows else t

        values = {a: view.value(b, part) for a, b in site.blocks.items()}
        with view.focused(part):
            out = site.call(values, *map(cut, args), **{k: cut(v) for k, v in kwargs.items()})
        if not isinstance(out, Tensor):
            raise StackingError(
                f"site {site.path!r} returned {type(out).__name__}, not a tensor; use stack=1"
            )
        if not each:
            out = out.expand(view.rows // len(parts), *out.shape[1:])
        outputs.append(out)
    return torch.cat(outputs)


@contextmanager
def observing(sites: Sequence[Site], perturbation: Perturbation) -> Iterator[None]:
    """Let a perturbation see what flows into the sites at the base point."""

    def watch(site: Site) -> Callable[..., None]:
        def seen(module: nn.Module, args: tuple[Any, ...]) -> None:
            for block in site.blocks.values():
                perturbation.observe_(block, args[0])

        return seen

    for site in sites:
        for block in site.blocks.values():
            perturbation.begin_(block)
    handles = [site.module.register_forward_pre_hook(watch(site)) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def probing(sites: Sequence[Site], view: View, fast: bool = True) -> Iterator[View]:
    """Give each site its probed forward for the duration; nothing outlives the block."""

    def replacement(site: Site) -> Callable[..., Any]:
        chosen = _FORWARDS.get(type(site.module)) if fast else None

        def forward(*args: Any, **kwargs: Any) -> Any:
            view.visited.add(site.path)
            result = NotImplemented
            if chosen is not None and view.focus is None and not kwargs:
                result = chosen(site, view, *args)
            if result is NotImplemented:
                result = generic(site, view, *args, **kwargs)
            if view.focus is None:
                view.forget()
            return result

        return forward

    own = [vars(site.module).get("forward") for site in sites]  # a wrapper's, as a rule none
    try:
        for site in sites:
            site.module.forward = replacement(site)  # type: ignore[method-assign]
        yield view
    finally:
        for site, forward in zip(sites, own, strict=True):
            if forward is None:
                vars(site.module).pop("forward", None)
            else:
                site.module.forward = forward  # type: ignore[method-assign]
        view.forget()
