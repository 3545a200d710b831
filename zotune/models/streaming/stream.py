"""A model whose layers are in memory one at a time, the next one on its way.

    enter layer k:  wait for it ─► ask a thread for k + 1 and k + 2 ─► say that k is here ─► run
    leave layer k:  let it go

Nothing of a model's own code changes: layers are told by `layers_of`, order by the last forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.models.cut import layers_of
from zotune.models.streaming.store import Place, Store, bring
from zotune.models.streaming.sweeper import Sweeper

_SHARE = 0.5  # of the limit: activations and one layer's perturbed values want the rest


class Unit:
    """What comes and goes together: a layer, or a module beside the layers (an embedding)."""

    def __init__(self, path: str, module: nn.Module, layer: bool, store: Store) -> None:
        self.path, self.module, self.layer, self.store = path, module, layer, store
        self.tensors: list[Tensor] = []
        self.followers: list[Callable[[], None]] = []  # told when tensors have other storage
        self.held = False  # whether it stays in memory, for which there is room
        self.here = False
        self.written = False  # whether something was moved since it came

    @property
    def size(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def add_(self, tensors: Iterable[Tensor]) -> None:
        """These come and go with it from now on."""
        known = {id(t) for t in self.tensors}
        self.tensors += [t for t in tensors if id(t) not in known and self.store.place(t)]

    @property
    def places(self) -> list[Place]:
        found = (self.store.place(t) for t in self.tensors)
        return [place for place in found if place is not None]

    def fetch(self) -> None:
        """Read it; a thread does so ahead of time."""
        if not self.here:
            bring(self.places)
            self.here = True

    def arrive(self) -> None:
        """It is about to be used."""

    def leave(self) -> None:
        """It is not used any more."""
        if not self.held:
            for place in self.places:
                place.let_go()
                place.forget()
            self.here = False
        self.written = False


class Stream:
    """Brings the units of one model into memory as its forwards come to them.

    model: its tensors are moved to `store` where they do not lie there yet. limit: bytes of the
    model that may be in memory, those that the system caches included; None for all. `arrived` is
    called with each unit that a forward enters, before it runs. device: where the model runs; what
    is no layer stays there, where it is a GPU.

    Raises:
        BadInput: the model has no row of layers, or three of its units exceed the limit.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> stream = Stream(model, Store())
    >>> [unit.path for unit in stream.units], model(torch.ones(1, 4)).shape
    (['0', '2'], torch.Size([1, 2]))
    >>> stream.close()
    """

    def __init__(
        self,
        model: nn.Module,
        store: Store,
        limit: int | None = None,
        kind: Callable[..., Unit] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.model, self.store, self.device = model, store, torch.device(device)
        self.units = units_of(model, store, kind or self._kind())
        if self.device.type != "cpu":
            self._keep_beside()
        self.limit = limit
        if limit is not None and self.need > limit:
            raise BadInput(
                f"three layers of this model at once (the one that runs and the next two) take "
                f"{self.need:,} bytes, more than memory_limit={limit:,}; raise it"
            )
        self._hold()
        self.arrived: Callable[[Unit], None] = _nobody
        self.inside: Unit | None = None
        self.visited: set[Unit] = set()
        self.coming: dict[Unit, Future[None]] = {}
        self.after = dict(zip(self.units, [*self.units[1:], self.units[0]], strict=True))
        self.last: Unit | None = None
        self.thread = ThreadPoolExecutor(1, "zotune-stream")
        self.handles: list[Any] = []
        for unit in self.units:
            self.handles += [
                unit.module.register_forward_pre_hook(partial(self._enter, unit), prepend=True),
                unit.module.register_forward_hook(self._leave),
            ]
        self.sweeper = Sweeper(self)

    @property
    def size(self) -> int:
        """Bytes of all that is streamed."""
        return sum(unit.size for unit in self.units)

    @property
    def need(self) -> int:
        """The most bytes that forwards have in memory: what stays, one unit that runs, and two
        that are read ahead."""
        passing = sorted(unit.size for unit in self.units if not unit.held)
        return sum(unit.size for unit in self.units if unit.held) + sum(passing[-3:])

    def visit(self, unit: Unit) -> None:
        """Have a unit in memory, whatever else was there may go."""
        if unit is self.inside:
            return
        self._let_go()
        self._fetch(unit)
        self.coming.pop(unit).result()
        unit.arrive()
        self.inside = unit

    def rest(self) -> None:
        """Nothing is used now; what has been fetched for the next forward stays."""
        self._let_go()

    def park(self) -> None:
        """Everything at home, also what may stay: somebody changes where tensors lie."""
        self.rest()
        self._keep_only(())
        for unit in self.units:
            held, unit.held = unit.held, False
            unit.leave()
            unit.held = held

    def sweep(self) -> None:
        """Let go of what other readers of the model have left in memory."""
        used = [self.inside, *self.coming, *(u for u in self.units if u.held)]
        busy = {t.data_ptr() for unit in used if unit is not None for t in unit.tensors}
        for address, place in list(self.store.places.items()):
            if address not in busy:
                place.let_go()

    def close(self) -> None:
        """The model is an ordinary one again, its tensors still in their files."""
        self.sweeper.stop()
        self.park()
        for handle in self.handles:
            handle.remove()
        self.thread.shutdown()
        self.arrived = _nobody

    def _enter(self, unit: Unit, module: nn.Module, args: Any) -> None:
        if self.last is not None:
            self.after[self.last] = unit
        self.last = unit
        self.visit(unit)
        followers = [self.after[unit], self.after[self.after[unit]]]
        self._keep_only(followers)
        for follower in followers:
            if follower is not unit:
                self._fetch(follower)
        self.visited.add(unit)
        self.arrived(unit)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._let_go()

    def _let_go(self) -> None:
        unit, self.inside = self.inside, None
        if unit is not None:
            unit.leave()

    def _keep_only(self, wanted: Sequence[Unit]) -> None:
        """Of what has been fetched; others come where the order of the layers has changed."""
        for unit in [u for u in self.coming if u not in wanted]:
            self.coming.pop(unit).result()
            unit.leave()

    def _fetch(self, unit: Unit) -> None:
        if unit in self.coming:
            return
        self.coming[unit] = self.thread.submit(unit.fetch)

    def _kind(self) -> Callable[..., Unit]:
        if self.device.type == "cpu":
            return Unit
        from zotune.models.streaming.device import DeviceUnit

        return partial(DeviceUnit, device=self.device)

    def _keep_beside(self) -> None:
        """What is no layer lies on the device for good, and what layers share with it."""
        inside = {id(t) for u in self.units if u.layer for t in u.tensors}
        beside = {id(t): t for u in self.units if not u.layer for t in u.tensors}
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if id(tensor) not in inside or id(tensor) in beside:
                tensor.data = tensor.data.to(self.device)
        self.units = [unit for unit in self.units if unit.layer]
        for unit in self.units:
            unit.tensors = [t for t in unit.tensors if id(t) not in beside]

    def _hold(self) -> None:
        """The first units stay, as far as the limit goes. Always the same ones: who reads in
        circles through a cache of the latest finds nothing in it."""
        room = float("inf") if self.limit is None else _SHARE * self.limit - self.need
        for unit in self.units:
            room -= unit.size
            unit.held = room >= 0


def units_of(model: nn.Module, store: Store, kind: Callable[..., Unit]) -> list[Unit]:
    """The layers and the largest modules beside them, with their tensors in the store."""
    layers = layers_of(model)
    if not layers:
        raise BadInput(
            f"{type(model).__name__} holds no row of layers (no nn.ModuleList or nn.Sequential of "
            "them), so there is nothing to stream by: drop --stream"
        )
    chosen = {id(layer) for _, layer in layers}
    above = {id(m) for m in model.modules() if any(id(c) in chosen for c in m.modules())} - chosen
    shelve_all_(model, store)
    units, paths = list[Unit](), {id(m): path for path, m in model.named_modules()}
    for module in model.modules():
        for child in module.children() if id(module) in above else ():
            if id(child) not in above:
                unit = kind(paths[id(child)], child, id(child) in chosen, store)
                unit.add_((*child.parameters(), *child.buffers()))
                units.append(unit)
    return [unit for unit in units if unit.tensors]


def _nobody(unit: Unit) -> None:
    """Nobody waits for a unit."""


def shelve_all_(model: nn.Module, store: Store) -> None:
    """Move what is not in the store yet; tensors that share memory go on sharing it."""
    moved: dict[tuple[int, torch.Size], Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if store.place(tensor) is None and tensor.is_contiguous():
            key = (tensor.data_ptr(), tensor.shape)
            if key not in moved:
                moved[key] = store.put(tensor)
            tensor.data = moved[key]
