"""Batch norms moved along what new data shift their statistics by.

A network meets images of another kind (another camera, a lossy codec): what flows into its batch
norms has another mean m1 and variance v1 than the m0, v0 that they were trained with. Taking the
new ones over is AdaBN (Li et al. 2016, arXiv 1603.04779); part of the way is often better
(Schneider et al. 2020, arXiv 2006.16971). Here each layer has a share of its own for either:

    gain (x - m) / s + bias,   m = m0 + a (m1 - m0),   s = s0 (s1 / s0)^c
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zotune.errors import BadInput
from zotune.models.adapter import CHILD, remove


class Shift(nn.Module):
    """y -> centre + (y - centre - a shift) exp(-c stretch) per channel, y being a norm's output.

    `share` is (a, c). At (0, 0) nothing changes:

    >>> shift = Shift(torch.ones(3), torch.ones(3), torch.ones(3), 0.0)
    >>> shift(torch.full((2, 3, 4, 4), 5.0)).unique().tolist()
    [5.0]
    """

    centre: Tensor
    shift: Tensor
    stretch: Tensor

    def __init__(self, centre: Tensor, shift: Tensor, stretch: Tensor, share: float) -> None:
        super().__init__()
        self.register_buffer("centre", centre.float())
        self.register_buffer("shift", shift.float())
        self.register_buffer("stretch", stretch.float())
        self.share = nn.Parameter(centre.new_full((2,), share).float(), requires_grad=False)

    @classmethod
    def of(cls, norm: _BatchNorm, mean: Tensor, variance: Tensor, share: float) -> Shift:
        """From what a norm was trained with towards the mean and variance of its inputs now."""
        own_mean, own_variance = norm.running_mean, norm.running_var
        assert own_mean is not None
        assert own_variance is not None
        wide = (own_variance.double() + norm.eps).sqrt()
        moved = norm.weight.double() / wide * (mean - own_mean).double()
        stretch = ((variance.double() + norm.eps).sqrt() / wide).log()
        return cls(norm.bias.detach().clone(), moved, stretch, share)

    @classmethod
    def none(cls, norm: _BatchNorm) -> Shift:
        """One that changes nothing, to be filled from a journal."""
        zeros = torch.zeros_like(norm.bias)
        return cls(zeros, zeros.clone(), zeros.clone(), 0.0)

    def affine(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """Factor and term (..., channels) at shares (..., 2)."""
        factor = (-share[..., 1:] * self.stretch).exp()
        return factor, self.centre - (self.centre + share[..., :1] * self.shift) * factor

    def forward(self, y: Tensor) -> Tensor:
        """(batch, channels, ...) likewise."""
        factor, term = (t.view(-1, *[1] * (y.dim() - 2)) for t in self.affine(self.share))
        return (y * factor + term).to(y.dtype)

    def joined(self, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """What the norm gives with this behind it."""
        moved: Tensor = self(output)
        return moved


def norms_of(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """Batch norms with gain, bias and running statistics, by path."""
    return [
        (path, m) for path, m in model.named_modules()
        if isinstance(m, _BatchNorm) and m.affine and m.running_mean is not None
    ]  # fmt: skip


def shifts(model: nn.Module) -> Iterator[tuple[str, _BatchNorm, Shift]]:
    """(path, norm, shift) of every norm that has one."""
    for path, norm in norms_of(model):
        child = norm._modules.get(CHILD)
        if isinstance(child, Shift):
            yield path, norm, child


@contextmanager
def measuring(norms: Sequence[_BatchNorm]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inside, norms work on the statistics of each batch, as while they are trained. Yields a list
    that then holds each norm's mean statistics over batches; the norms are as they were.

    Raises:
        BadInput: no batch came by, or its activations are not finite.
    """
    found = list[tuple[Tensor, Tensor]]()
    before = [({k: b.clone() for k, b in n.named_buffers(recurse=False)}, n.momentum)
              for n in norms]  # fmt: skip
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over batches
            norm.train()
        yield found
        for norm in norms:
            mean, variance = norm.running_mean, norm.running_var
            assert mean is not None
            assert variance is not None
            if not norm.num_batches_tracked or not (mean + variance).isfinite().all():
                raise BadInput(
                    "the statistics of this model's batch norms could not be measured: they saw "
                    f"{int(norm.num_batches_tracked or 0)} batches, or numbers that are not finite"
                )
            found.append((mean.clone(), variance.clone()))
    finally:
        for norm, (buffers, momentum) in zip(norms, before, strict=True):
            norm.eval()
            norm.momentum = momentum
            for name, tensor in buffers.items():
                norm.get_buffer(name).copy_(tensor)


@torch.no_grad()
def fold_shifts_(model: nn.Module) -> None:
    """Make every shift part of its norm's own gain and bias, and remove it."""
    for _, norm, shift in list(shifts(model)):
        factor, term = shift.affine(shift.share.double())
        norm.weight.copy_((norm.weight.double() * factor).to(norm.weight.dtype))
        norm.bias.copy_((norm.bias.double() * factor + term).to(norm.bias.dtype))
        remove(norm)
