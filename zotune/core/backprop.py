"""The backprop baselines: AdamW by torch's own autograd and optimizer, on the same spaces.

They run through the same sites, tasks and loop as the forward-only methods, so that every table
can show what a gradient would have bought, and what it costs in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from zotune.core.block import Block, FloatBlock
from zotune.core.estimator import Estimate
from zotune.core.evaluator import TorchEvaluator
from zotune.core.exact import frozen
from zotune.core.method import Schedule
from zotune.core.sites import sites_of
from zotune.core.space import Space
from zotune.core.step import StepReport, Tuner
from zotune.errors import BadInput


@dataclass(frozen=True)
class Backprop:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with exact gradients.

    lr is absolute, as everywhere for AdamW. Gradients are clipped to norm `clip` (0: never).
    """

    name: str = "adamw"
    lr: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.0
    clip: float = 1.0
    schedule: Schedule = field(default_factory=Schedule)

    @property
    def forwards(self) -> int:
        """One forward (and one backward) per step."""
        return 1

    def but(self, **changes: Any) -> Backprop:
        return replace(self, **changes)


class Gradient:
    """The true gradient of the batch loss over float blocks, by autograd, in `leaves`.

    Raises BadInput for blocks without gradients (integer codes).
    """

    def __init__(self, blocks: Sequence[Block], evaluator: TorchEvaluator) -> None:
        self.blocks = [b for b in blocks if isinstance(b, FloatBlock)]
        if len(self.blocks) < len(blocks):
            raise BadInput("integer codes have no gradient; backprop wants float spaces")
        self.evaluator, self.sites = evaluator, sites_of(self.blocks)
        # At least float32, so that no small step is lost; 16-bit weights get the rounded values.
        self.leaves = {
            b.name: b.master.to(torch.promote_types(b.master.dtype, torch.float32), copy=True)
            .detach()
            .requires_grad_()
            for b in self.blocks
        }

    def backward(self, batch: Any) -> float:
        """Add the gradient to the leaves' `grad`, in the evaluator's micro-batches; the loss."""
        total, whole = 0.0, 0.0
        for piece in self.evaluator.pieces(batch):
            with torch.enable_grad(), self._held():
                loss, weight = self.evaluator.objective(self.evaluator.model, piece)
                share = (loss.float() * weight).sum()
                if not share.requires_grad:
                    raise BadInput(
                        "this objective has no gradient; backprop needs a differentiable loss"
                    )
                share.backward()  # type: ignore[no-untyped-call]
            total, whole = total + float(share.detach()), whole + float(weight.detach().sum())
        for leaf in self.leaves.values():
            if leaf.grad is not None:
                leaf.grad /= max(whole, 1e-30)
        return total / max(whole, 1e-30)

    def forget_(self, names: set[str]) -> list[Tensor]:
        """No gradient of these blocks any more; gives back their leaves."""
        self.blocks = [b for b in self.blocks if b.name not in names]
        self.sites = sites_of(self.blocks)
        return [self.leaves.pop(name) for name in names & self.leaves.keys()]

    def _held(self) -> ExitStack:
        """Every site holding its leaves: the model's own tensors need no gradient."""
        stack = ExitStack()
        stack.enter_context(frozen(self.evaluator.model))
        for site in self.sites:
            values = {
                attribute: self.leaves[block.name].to(block.value().dtype)
                for attribute, block in site.blocks.items()
            }
            stack.enter_context(site.holding(values))
        return stack


def cosine(tuner: Tuner, estimate: Estimate, batch: Any) -> float:
    """Cosine between an estimate's g and the true gradient, in the blocks' own units.

    To be called before the estimate is applied. One backward pass and a gradient of every probed
    block: for small models.
    """
    if not isinstance(tuner.evaluator, TorchEvaluator):
        raise BadInput("the true gradient needs a torch model; drop check_gradient")
    true = Gradient(tuner.active.probed, tuner.evaluator)
    true.backward(batch)
    both = ours = theirs = 0.0
    with torch.no_grad():
        for block in true.blocks:
            g, grad = tuner.estimated(block, estimate), true.leaves[block.name].grad
            ours += float(g.square().sum(dtype=torch.float64))
            if grad is not None:
                grad = grad * block.reach / block.eps_ratio
                both += float((g * grad).sum(dtype=torch.float64))
                theirs += float(grad.square().sum(dtype=torch.float64))
    return both / (ours * theirs) ** 0.5 if ours * theirs > 0 else 0.0


class BackpropTuner:
    """The same face as `Tuner`, for the baselines: step, state_tensors, load_.

    Raises BadInput for blocks without gradients (integer codes).
    """

    def __init__(
        self, space: Space, method: Backprop, evaluator: TorchEvaluator, total: int
    ) -> None:
        space.bind_(1.0, method.lr, "absolute")
        space.check_decay(method.weight_decay)
        self.space, self.method, self.evaluator, self.total = space, method, evaluator, total
        self.active = space
        self.gradient = Gradient(space.blocks, evaluator)
        self.done = self.applied = 0
        groups: list[dict[str, Any]] = [
            {
                "params": [self.gradient.leaves[b.name]],
                "weight_decay": method.weight_decay * b.decay,
                "lr": b.lr if b.lr is not None else method.lr,
            }
            for b in self.gradient.blocks
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(method.b1, method.b2))
        self.rates = [g["lr"] for g in groups]

    def step(self, batch: Any) -> StepReport:
        """One forward, one backward, one AdamW update, in the evaluator's micro-batches."""
        factor = self.method.schedule.factor(self.done, self.total)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad()
        loss = self.gradient.backward(batch)
        self.evaluator.forwards += 1
        leaves = list(self.gradient.leaves.values())
        finite = bool(torch.tensor(loss).isfinite())
        if finite:
            limit = self.method.clip or float("inf")
            norm = torch.nn.utils.clip_grad_norm_(leaves, limit)
            finite = bool(norm.isfinite())
        report = StepReport(self.done, loss, self.method.lr * factor, finite)
        self.done += 1
        if finite:
            self.optimizer.step()
            self.applied += 1
            self._write_back()
        return report

    def freeze_(self, names: Iterable[str]) -> None:
        """From now on these blocks stay as they are; their moments go."""
        gone = set(names)
        self.active = self.active.without(gone)
        for leaf in self.gradient.forget_(gone):
            self.optimizer.state.pop(leaf, None)
        held = {id(leaf) for leaf in self.gradient.leaves.values()}
        groups = zip(self.optimizer.param_groups, self.rates, strict=True)
        kept = [(group, rate) for group, rate in groups if id(group["params"][0]) in held]
        self.optimizer.param_groups[:] = [group for group, _ in kept]
        self.rates = [rate for _, rate in kept]

    @torch.no_grad()
    def _write_back(self) -> None:
        for block in self.gradient.blocks:
            leaf = self.gradient.leaves[block.name]
            if block.minimum is not None:
                leaf.clamp_min_(block.minimum)
            block.load_(leaf)

    def state_tensors(self) -> dict[str, Tensor]:
        out = {f"block/{name}": value for name, value in self.space.state().items()}
        for name, leaf in self.gradient.leaves.items():
            out[f"leaf/{name}"] = leaf.detach()
            for k, v in self.optimizer.state[leaf].items():
                out[f"rule/{name}/{k}"] = v
        return out

    def load_(self, tensors: Mapping[str, Tensor], done: int, applied: int) -> None:
        for block in self.space:
            block.load_(tensors[f"block/{block.name}"])
        for name, leaf in self.gradient.leaves.items():
            with torch.no_grad():
                leaf.copy_(tensors[f"leaf/{name}"])
            start = f"rule/{name}/"
            state = {k[len(start) :]: v.clone() for k, v in tensors.items() if k.startswith(start)}
            if state:
                self.optimizer.state[leaf] = state
        self._write_back()
        self.done, self.applied = done, applied


AnyTuner = Tuner | BackpropTuner
