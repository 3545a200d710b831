"""Adapters on frozen activation bases: probe only where the gradient can be.

A linear layer's weight gradient G = sum_t dy_t x_t^T has its rows in the span of the layer's
inputs x_t. With the rows of A the leading directions of those inputs, W x + B A x with frozen A
and B from zero searches out x rank numbers instead of out x in, and the gain in squared cosine
over dense noise is (||G A^T||^2 / ||G||^2) (in / rank). After AGZO (2026, arXiv 2601.17261) and
ZO-Act (2026, arXiv 2607.01125); the basis is measured once, by forward passes only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zotune.core import noise
from zotune.core.block import FloatBlock, Owner
from zotune.core.noise import Key
from zotune.core.space import Observe, Space, SpaceSpec
from zotune.core.spaces.lora import body_linears, sizes
from zotune.core.spaces.parameters import body_adapters
from zotune.errors import BadInput
from zotune.models.adapter import CHILD, LowRank, attach, device_of

_SKETCH = 8  # directions kept beyond the rank while batches stream by
_SWEEPS = 3  # power iterations per batch


@dataclass(frozen=True)
class Adapter(SpaceSpec):
    """y = W x + B A x: A (rank, in) frozen on the leading input directions, B (out, rank) tuned.

    Unit of B: std of the layer's output / rms of the coefficients A x, so that eps counts in the
    layer's own output. Needs `observe`, a function that runs a few batches through the model.
    Adapters that the model already has are tuned further, on the bases they have.
    """

    rank: int = 1
    targets: str | None = None

    def build(self, model: nn.Module, observe: Observe | None = None) -> Space:
        if self.rank < 1:
            raise BadInput(f"rank={self.rank}; want rank >= 1")
        if body_adapters(model):
            return self._kept(model, observe)
        if observe is None:
            raise BadInput("the 'adapter' space measures activations: it needs `observe`")
        layers = body_linears(model, self.targets)
        watched = {p: _Watch(p, self.rank, m) for p, m in layers.items()}
        with _watching(layers, watched):
            observe(model)
        blocks = []
        for path, watch in watched.items():
            if not watch.seen:
                continue  # never called by this task: no gradient, nothing to tune
            adapter = LowRank(watch.basis, torch.zeros(sizes(layers[path])[1], self.rank))
            attach(layers[path], adapter.to(device_of(layers[path])))
            owner = Owner(f"{path}.{CHILD}", adapter, "B")
            name = f"{path}.lora_B"
            blocks.append(FloatBlock.of(name, adapter.B, [owner], unit=watch.unit, **self.options))
        return Space(blocks)

    def _kept(self, model: nn.Module, observe: Observe | None) -> Space:
        """Adapters that the model already has, tuned further on their own bases."""
        found = {path: (layer, adapter) for path, layer, adapter in body_adapters(model)}
        watched = {p: _Gain(adapter.A) for p, (_, adapter) in found.items()}
        if observe is not None:
            with _watching({p: layer for p, (layer, _) in found.items()}, watched):
                observe(model)
        return Space(
            FloatBlock.of(
                f"{p}.lora_B", adapter.B, [Owner(f"{p}.{CHILD}", adapter, "B")],
                unit=watched[p].unit / adapter.scaling, **self.options,
            )
            for p, (_, adapter) in found.items()
        )  # fmt: skip


class _Gain:
    """Output std / rms of the coefficients of a layer with a given basis."""

    def __init__(self, basis: Tensor) -> None:
        self.basis, self.output, self.coefficient = basis.detach().float().cpu(), 0.0, 0.0

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach().float().flatten(0, -2).cpu()
        self.output += float(output.detach().float().std(correction=0)) ** 2 * x.shape[0]
        self.coefficient += float((x @ self.basis.mT).square().mean()) * x.shape[0]

    @property
    def unit(self) -> float:
        return float((self.output / max(self.coefficient, 1e-30)) ** 0.5) or 1.0


class _Watch:
    """The leading input directions of one layer, kept up to date batch by batch."""

    def __init__(self, path: str, rank: int, layer: nn.Module) -> None:
        inputs, outputs = sizes(layer)
        if rank > min(inputs, outputs):
            raise BadInput(f"rank={rank} is more than layer {path!r} ({inputs} -> {outputs}) has")
        self.rank = rank
        width = min(rank + _SKETCH, inputs)
        start = noise.draw("gaussian", Key(0), f"{path}#sketch", 0, width * inputs)
        self.sketch = torch.linalg.qr(start.view(inputs, width)).Q  # (in, width)
        self.rows = torch.zeros(width, inputs)  # singular values x right vectors so far
        self.seen = 0
        self.output = self.coefficient = 0.0

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach().float().flatten(0, -2).cpu()
        y = output.detach().float().cpu()
        stacked = torch.cat([self.rows, x])
        for _ in range(_SWEEPS):
            self.sketch = torch.linalg.qr(stacked.mT @ (stacked @ self.sketch)).Q
        _, s, v = torch.linalg.svd(stacked @ self.sketch, full_matrices=False)
        self.sketch = self.sketch @ v.mT
        self.rows = s.unsqueeze(1) * self.sketch.mT
        self.seen += x.shape[0]
        self.output += float(y.std(correction=0)) ** 2 * x.shape[0]
        self.coefficient += float((x @ self.basis.mT).square().mean()) * x.shape[0]

    @property
    def basis(self) -> Tensor:
        """(rank, in), orthonormal rows; signs fixed so that the same data give the same basis."""
        rows = self.sketch.mT[: self.rank]
        signs = torch.gather(rows, 1, rows.abs().argmax(1, keepdim=True)).sign()
        return (rows * torch.where(signs == 0, 1.0, signs)).contiguous()

    @property
    def unit(self) -> float:
        return float((self.output / max(self.coefficient, 1e-30)) ** 0.5) or 1.0


@contextmanager
def _watching(layers: dict[str, nn.Module], watched: dict[str, Any]) -> Iterator[None]:
    handles = [layers[p].register_forward_hook(w) for p, w in watched.items()]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
