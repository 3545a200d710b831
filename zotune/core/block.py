"""Blocks: the named tensors that training may move, and the only code that writes them.

A block knows its *unit*, the natural size of a change (the scale itself for a quantization scale,
output std / coefficient rms for an adapter), so that one eps fits all blocks. It answers two
questions: what value does a probe see (`at`, on the side, nothing is written), and what happens
when the rule's step is applied (`move_`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zotune.core import noise
from zotune.core.codes import shifted, stepped
from zotune.core.noise import Key
from zotune.errors import BadInput
from zotune.quant.layer import QuantLayer
from zotune.quant.packing import pack, unpack


@dataclass(frozen=True)
class Owner:
    """A module that holds a block under one of its attribute names (tied blocks have several)."""

    path: str
    module: nn.Module
    attribute: str

    @property
    def tensor(self) -> Tensor:
        """What the module holds under that name now."""
        found = getattr(self.module, self.attribute)
        assert isinstance(found, Tensor)
        return found


@dataclass
class Block(ABC):
    """One named tensor of a space.

    `eps` and `lr` override the method's for this block; with lr=0 it stays. After `bind_`, a probe
    sees theta + step * reach * u and an update moves theta by -stride * rule(g). `exact` blocks
    are not probed: forward passes give their gradient (a head's). `memory` is what the
    method's perturbation keeps of this block (a curvature, an anchor); most keep nothing.
    """

    name: str
    shape: tuple[int, ...]
    device: torch.device
    owners: tuple[Owner, ...]
    unit: Tensor | float = 1.0
    eps: float | None = None
    lr: float | None = None
    decay: bool = False
    exact: bool = False
    reach: Tensor | float = field(default=1.0, init=False)
    stride: Tensor | float = field(default=1.0, init=False)
    eps_ratio: float = field(default=1.0, init=False)
    lr_ratio: float = field(default=1.0, init=False)
    memory: dict[str, Tensor] = field(default_factory=dict, init=False)

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def still(self) -> bool:
        """Whether it stays where it is: neither probed nor moved."""
        return self.lr == 0

    @property
    def rows(self) -> int:
        """Blocks are drawn and moved in runs of rows (dim 0)."""
        return self.shape[0] if self.shape else 1

    def bind_(self, eps: float, lr: float, units: str) -> None:
        """Fix reach and stride for a method's eps and lr; units "relative" or "absolute"."""
        if self.lr and not lr:
            raise BadInput(
                f"lr=0, but block {self.name!r} has lr={self.lr}: want an lr > 0 for both"
            )
        unit = self.unit if units == "relative" else 1.0
        self.eps_ratio = (self.eps / eps) if self.eps is not None and eps else 1.0
        self.lr_ratio = (self.lr / lr) if self.lr is not None and lr else 1.0
        self.reach = _times(unit, self.eps_ratio)
        self.stride = _times(unit, self.lr_ratio)

    @property
    def grid(self) -> Tensor | None:
        """Weight per code (broadcastable to the shape) for integer blocks, else None."""
        return None

    @abstractmethod
    def at(self, u: Tensor, step: float) -> Tensor:
        """theta + step * reach * u as the module would see it; u is block-shaped, float32."""

    @abstractmethod
    def value(self) -> Tensor:
        """The current point as the module sees it (no copy where none is needed)."""

    @abstractmethod
    def move_(self, start: int, stop: int, step: Tensor, key: Key) -> None:
        """theta[start:stop] -= step (rows; float32); rounding noise, if any, comes from `key`."""

    @abstractmethod
    def decay_(self, factor: float, key: Key) -> None:
        """theta -= factor * theta (weight decay, decoupled)."""

    def follow_(self) -> None:
        """Take over the storage that the module's tensor has now, its values being the same."""

    @abstractmethod
    def state(self) -> Tensor:
        """The full-precision state to be saved in a snapshot."""

    @abstractmethod
    def load_(self, state: Tensor) -> None:
        """Restore what `state` gave."""


def _times(unit: Tensor | float, ratio: float) -> Tensor | float:
    """unit * ratio; the unit itself, not a copy, where that is what it is."""
    return unit if ratio == 1.0 else unit * ratio


def part(value: Tensor | float, start: int, stop: int, rows: int) -> Tensor | float:
    """Rows start:stop of something broadcastable to a block with `rows` rows."""
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows and rows > 1:
        return value[start:stop]
    return value


@dataclass
class FloatBlock(Block):
    """A floating-point block.

    With `keep_master`, a 16-bit tensor gets a float32 master, so that no small step is lost;
    without, it is moved by stochastic rounding (unbiased, no extra memory). `minimum` bounds the
    values from below, probes included (quantization scales stay positive).
    """

    tensor: Tensor = field(default_factory=lambda: torch.empty(0))
    minimum: float | None = None
    keep_master: bool = True

    def __post_init__(self) -> None:
        if not self.tensor.is_floating_point():
            raise BadInput(
                f"block {self.name!r} has dtype {self.tensor.dtype}; a float block wants a "
                "floating-point tensor. Tune quantized codes with the 'codes' space"
            )
        self.master = self.tensor.detach()
        if self.keep_master:
            self.master = _wide(self.master)

    @classmethod
    def of(
        cls, name: str, tensor: Tensor, owners: Sequence[Owner] = (), **options: Any
    ) -> FloatBlock:
        return cls(
            name, tuple(tensor.shape), tensor.device, tuple(owners), tensor=tensor, **options
        )

    def _bounded(self, value: Tensor) -> Tensor:
        return value if self.minimum is None else value.clamp_min(self.minimum)

    def at(self, u: Tensor, step: float) -> Tensor:
        if isinstance(self.reach, float):
            if self._in_one_pass(u):
                from zotune.core import floats_cpu

                return floats_cpu.shifted(self.master, u, step * self.reach, self.minimum)
            moved = torch.add(_wide(self.master), u, alpha=step * self.reach)
        else:
            moved = torch.addcmul(_wide(self.master), self.reach, u, value=step)
        return self._bounded(moved).to(self.tensor.dtype)

    def _in_one_pass(self, u: Tensor) -> bool:
        """Whether compiled code gives a probe's point: bfloat16 on the CPU, without a master."""
        plain = self.master.dtype == self.tensor.dtype == torch.bfloat16
        return (
            plain and u.device.type == "cpu" and u.shape == self.shape and u.dtype == torch.float32
        )

    def at_rows(self, rows: Tensor, u: Tensor | None, step: float) -> Tensor:
        """Chosen rows of `at` (u holds just those rows); u = None gives the base point's."""
        if u is None:
            return self.tensor.detach()[rows]
        assert isinstance(self.reach, float)
        moved = torch.add(_wide(self.master[rows]), u, alpha=step * self.reach)
        return self._bounded(moved).to(self.tensor.dtype)

    def value(self) -> Tensor:
        return self.tensor.detach()

    def move_(self, start: int, stop: int, step: Tensor, key: Key) -> None:
        here = slice(start, stop) if self.shape else ...
        master, stored = self.master[here], self.tensor.detach()[here]
        if _wide(master) is master:
            master.sub_(step)
            if self.minimum is not None:
                master.clamp_min_(self.minimum)
            if master.data_ptr() != stored.data_ptr():
                stored.copy_(master)
        else:
            width = self.numel // max(self.rows, 1)
            target = self._bounded(stored.float() - step)
            stored.copy_(_round_to(target, stored.dtype, key, self.name, start * width))

    def decay_(self, factor: float, key: Key) -> None:
        self.move_(0, self.rows, factor * _wide(self.master), key)

    def follow_(self) -> None:
        if self.master.dtype == self.tensor.dtype:
            self.master = self.tensor.detach()

    def state(self) -> Tensor:
        return self.master

    def load_(self, state: Tensor) -> None:
        self.master.copy_(state)
        self.tensor.detach().copy_(self.master)


def _wide(tensor: Tensor) -> Tensor:
    """At least float32; the tensor itself where it is."""
    return tensor.float() if torch.finfo(tensor.dtype).bits < 32 else tensor


def _round_to(value: Tensor, dtype: torch.dtype, key: Key, name: str, start: int) -> Tensor:
    """Stochastic rounding of float32 to a 16-bit dtype: the mean over keys is the value itself."""
    nearest = value.to(dtype)
    infinity = torch.full_like(nearest, float("inf"))
    error = value - nearest.float()
    towards = torch.where(error >= 0, infinity, -infinity)
    other = torch.nextafter(nearest, towards)
    gap = (other.float() - nearest.float()).abs()
    chance = noise.draw("uniform", key, f"{name}#round", start, start + value.numel(), value.device)
    chance = (chance * 0.5 + 0.5).view_as(value)
    return torch.where(chance * gap < error.abs(), other, nearest)


@dataclass
class CodeBlock(Block):
    """The integer codes of a quantized layer, moved by whole codes and clamped to their range.

    Coordinates are codes: a displacement of 1 is one grid step. Whole displacements stay int8,
    so that integer kernels run; others are seen as fractional codes. `moved` counts the codes that
    updates have changed, for whoever watches a run, on the device that moves them.
    """

    moved: int | Tensor = field(default=0, init=False)

    @classmethod
    def of(cls, name: str, owner: Owner, **options: Any) -> CodeBlock:
        module = owner.module
        assert isinstance(module, QuantLayer)
        if module.scheme.kind != "int":
            raise BadInput(
                f"codes of {owner.path!r} are floats ({module.scheme}), which do not move by whole "
                "steps; tune its scales"
            )
        shape = (module.rows, module.columns)
        return cls(name, shape, module.codes.device, (owner,), **options)

    @property
    def module(self) -> QuantLayer:
        module = self.owners[0].module
        assert isinstance(module, QuantLayer)
        return module

    @property
    def limits(self) -> tuple[int, int]:
        half = 1 << (self.module.scheme.bits - 1)
        return -half, half - 1

    @property
    def grid(self) -> Tensor:
        return self.module.grid

    def at(self, u: Tensor, step: float) -> Tensor:
        return shifted(self.value(), u, step * self.reach, *self.limits)

    def value(self) -> Tensor:
        return self.module.unpacked()

    def move_(self, start: int, stop: int, step: Tensor, key: Key) -> None:
        bits, columns = self.module.scheme.bits, self.shape[1]
        stored = self.module.codes[start:stop]
        codes = stored if bits == 8 else unpack(stored, bits, columns)
        moved, whole = stepped(codes, step, *self.limits)
        if not whole:
            chance = noise.draw(
                "uniform", key, f"{self.name}#round", start * columns, stop * columns, step.device
            )
            down = step.floor()
            down += chance.view_as(step) * 0.5 + 0.5 < step - down
            moved, _ = stepped(codes, down, *self.limits)
        self.moved += int((moved != codes).sum())
        stored.copy_(moved if bits == 8 else pack(moved, bits))

    def forget_moved_(self) -> None:
        """Count from 0 again, where the count lies."""
        if isinstance(self.moved, Tensor):
            self.moved.zero_()
        else:
            self.moved = 0

    def decay_(self, factor: float, key: Key) -> None:
        raise BadInput(
            f"weight_decay={factor} on integer codes {self.name!r}: codes have no decay; "
            "use weight_decay=0"
        )

    def state(self) -> Tensor:
        return self.module.codes

    def load_(self, state: Tensor) -> None:
        self.module.codes.copy_(state)
