"""The output layer, whole or on a basis measured once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from zotune.core.block import FloatBlock, Owner
from zotune.core.space import Observe, Space, SpaceSpec
from zotune.core.spaces.parameters import blocks_of, heads
from zotune.errors import BadInput
from zotune.models import PooledClassifier
from zotune.models.adapter import CHILD, LowRank, attach

BASES: Final = ("classes", "white")
SHRINKAGE: Final = 0.3  # share of the mean variance added to the covariance within classes
RIDGE: Final = 0.01  # share of the mean square added to the inputs' second moments
CLASS_EXAMPLES: Final = 4096  # training examples that the directions are measured on, at most


@dataclass(frozen=True)
class Head(SpaceSpec):
    """The output layer: a classifier's head or a language model's output embedding.

    basis="classes" tunes W + C A, C (labels, labels) from zero, with the rows of A on Fisher's
    discriminant directions of the head's inputs and on their mean: (S + 0.3 s I)^-1 (mean_k - mean)
    for the covariance S within classes and its mean variance s, which forward passes reveal. A few
    dozen numbers instead of thousands, so that every probe says much about each. `project` keeps of
    W only its least-squares fit on those directions, for a head that was only guessed (from label
    texts), whose rest is noise. C A is folded into W when the run ends.

    basis="white" takes every direction, C (labels, in), with A = (E[x x^T] + 0.01 s I)^(-1/2) for
    the inputs x and the mean s of their squares: coordinates of equal size without correlations, in
    which plain steps go where Newton's would on the whole head.

    layers="all" lets a classifier's head read every layer's mean state, not the last one's only:
    what a layer knows of the classes need not pass through those above it (after the linear
    classifier probes of Alain & Bengio 2016, arXiv 1610.01644).

    `exact` takes the gradient that the forwards give exactly, an outer product for a softmax, and
    leaves the head out of the probes: no backward pass runs through the network, but such a run
    cannot be replayed from its journal.
    """

    basis: str | None = None
    project: bool = False
    layers: str = "last"
    exact: bool = False

    def __post_init__(self) -> None:
        if self.basis not in (None, *BASES):
            raise BadInput(
                f"basis={self.basis!r}; want one of {', '.join(BASES)}, or none for the whole head"
            )
        if self.layers not in ("last", "all"):
            raise BadInput(f"layers={self.layers!r}; want 'last' or 'all'")
        if self.project and self.basis != "classes":
            raise BadInput("project=True needs a smaller basis; use basis='classes'")

    @property
    def options(self) -> dict[str, Any]:
        return {**super().options, "exact": self.exact}

    def build(self, model: nn.Module, observe: Observe | None = None) -> Space:
        if self.layers == "all":
            if not isinstance(model, PooledClassifier):
                raise BadInput(
                    f"layers='all' wants an encoder with a head that a task put on it, not a "
                    f"{type(model).__name__}; use layers='last'"
                )
            model.widen_()
        inside = heads(model)
        if self.basis is None:
            return blocks_of(model, self, lambda o: id(o.module) in inside, None, "head")
        path, layer = _linear_head(model, inside)
        found = layer._modules.get(CHILD)
        adapter, unit = (
            (found, 1.0)
            if isinstance(found, LowRank)
            else self._attach(path, layer, model, observe)
        )
        if self.project:
            with torch.no_grad():
                layer.weight.zero_()
        owner = Owner(f"{path}.{CHILD}", adapter, "B")
        block = FloatBlock.of(f"{path}.lora_B", adapter.B, [owner], unit=unit, **self.options)
        return Space([block])

    def _attach(
        self, path: str, layer: nn.Linear, model: nn.Module, observe: Observe | None
    ) -> tuple[LowRank, float]:
        if observe is None:
            raise BadInput("a head on a basis measures activations: it needs `observe`")
        seen = _Seen(layer.out_features)
        handle = layer.register_forward_hook(seen)
        try:
            observe(model, seen.label if self.basis == "classes" else None, CLASS_EXAMPLES)
        finally:
            handle.remove()
        a = seen.white() if self.basis == "white" else seen.basis(path)
        start = (
            seen.fit(layer.weight, a) if self.project else torch.zeros(layer.out_features, len(a))
        )
        adapter = LowRank(a, start).to(layer.weight.device)
        attach(layer, adapter)
        return adapter, seen.unit(layer.weight)


def _linear_head(model: nn.Module, inside: set[int]) -> tuple[str, nn.Linear]:
    found = [
        (p, m) for p, m in model.named_modules() if id(m) in inside and isinstance(m, nn.Linear)
    ]
    if not found:
        raise BadInput("this model has no linear head; a head on a basis is for classifiers")
    return found[-1]


class _Seen:
    """The head's inputs, and their classes where they are asked for, batch by batch."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.inputs: list[Tensor] = []
        self.labels: list[Tensor] = []

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.inputs.append(args[0].detach().float().cpu())

    def label(self, batch: Any) -> None:
        """Called after each observed batch, with the batch."""
        labels = batch.tensors.get("label")
        if labels is None or len(labels) != len(self.inputs[-1]):
            raise BadInput(
                "this task's batches have no label per head input; use head without basis"
            )
        self.labels.append(labels.cpu())

    def unit(self, weight: Tensor) -> float:
        """std of the logits: what the head's outputs vary by."""
        return float((torch.cat(self.inputs) @ weight.detach().float().cpu().mT).std()) or 1.0

    def fit(self, weight: Tensor, a: Tensor) -> Tensor:
        """C (labels, labels) with the least square error of C A x against W x."""
        x = torch.cat(self.inputs).double()
        logits = x @ weight.detach().double().cpu().mT
        return torch.linalg.lstsq(x @ a.double().mT, logits).solution.mT.float().contiguous()

    def white(self) -> Tensor:
        """(in, in): (E[x x^T] + ridge)^(-1/2), the mean input among the directions."""
        x = torch.cat(self.inputs).double()
        moments = x.mT @ x / len(x)
        moments.diagonal().add_(RIDGE * moments.diagonal().mean().clamp_min(1e-12))
        values, vectors = torch.linalg.eigh(moments)
        return ((vectors * values.rsqrt()) @ vectors.mT).float().contiguous()

    def basis(self, path: str) -> Tensor:
        """(labels, in): orthogonal discriminant directions and that of the mean input, which is
        every class's bias; each with coefficients of rms 1."""
        x, y = torch.cat(self.inputs).double(), torch.cat(self.labels)
        counts = torch.bincount(y, minlength=self.classes)
        empty = (counts == 0).nonzero().flatten().tolist()
        if empty:
            raise BadInput(f"no training example of classes {empty} was observed for head {path!r}")
        sums = torch.zeros(self.classes, x.shape[1], dtype=x.dtype).index_add_(0, y, x)
        means, centre = sums / counts.unsqueeze(1), x.mean(0)
        inner = x - means[y]
        within = inner.mT @ inner / len(x)
        shrink = SHRINKAGE * within.diagonal().mean().clamp_min(1e-12)
        within.diagonal().add_(shrink)
        across = centre / centre.norm().clamp_min(1e-30)
        rows = torch.linalg.solve(within, (means - centre).mT).mT
        rows = rows - (rows @ across).unsqueeze(1) * across  # A maps the mean input to zero
        rows = torch.linalg.svd(rows, full_matrices=False).Vh[: min(self.classes, x.shape[1]) - 1]
        signs = torch.gather(rows, 1, rows.abs().argmax(1, keepdim=True)).sign()
        rows = torch.cat([rows * signs, across.unsqueeze(0)])
        spread = (x @ rows.mT).square().mean(0).sqrt().clamp_min(1e-30)
        return (rows / spread.unsqueeze(1)).float().contiguous()
