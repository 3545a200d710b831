"""Exact gradients of last layers, from the forward passes that the probes need anyway.

The gradient of a softmax head is an outer product, (p - y) x^T, of what its forward already
holds. So a block of the last layer need not be probed: only the head and the loss behind it are
recorded, nothing of the network below, and no backward pass runs through the network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from zotune.core.block import Block
from zotune.core.sites import sites_of
from zotune.errors import BadInput


class LastLayers:
    """Gathers the gradients of `exact` blocks over the forwards of one step."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block]) -> None:
        shared = [b.name for b in blocks if len(b.owners) != 1]
        if shared:
            raise BadInput(
                f"exact gradient of {shared[0]!r}, which several layers share: only the last "
                "layer's part would be exact; tune it without exact=True"
            )
        self.model = model
        self.blocks = {b.name: b for b in blocks}
        self.sites = sites_of(blocks)
        self.sums: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}

    @contextmanager
    def held(self) -> Iterator[None]:
        """The last layers on leaves of their own; the rest of the model records nothing."""
        if not self.blocks:
            yield
            return
        self.leaves = {n: b.value().detach().requires_grad_() for n, b in self.blocks.items()}
        with ExitStack() as stack:
            stack.enter_context(frozen(self.model))
            stack.enter_context(torch.enable_grad())
            for site in self.sites:
                values = {a: self.leaves[b.name] for a, b in site.blocks.items()}
                stack.enter_context(site.holding(values))
            yield
        self.leaves = {}

    def add_(self, loss: Tensor, weight: Tensor) -> None:
        """Add the gradient of sum(loss * weight), called inside `held`."""
        if not self.blocks:
            return
        total = (loss.float() * weight.detach()).sum()
        if not total.requires_grad:
            raise BadInput(
                "this objective has no gradient for the last layer; drop exact=True to probe it"
            )
        found = torch.autograd.grad(total, list(self.leaves.values()), allow_unused=True)
        for name, g in zip(self.leaves, found, strict=True):
            if g is None:
                raise BadInput(f"block {name!r} with exact=True is not used by this objective")
            self.sums[name] = self.sums[name] + g.float() if name in self.sums else g.float()

    def gradients(self, total: float) -> dict[str, Tensor]:
        """The sums over `total`, and a fresh start."""
        out = {name: g / total for name, g in self.sums.items()}
        self.sums = {}
        return out


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of the model asks for a gradient: what is not tuned costs no memory."""
    asking = [p for p in model.parameters() if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_()
