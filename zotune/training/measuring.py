"""Before the first step of `--method auto`: how steep, how bent and how noisy the loss is.

In the blocks' own units, with L(theta + eps u) = L + eps g.u + eps^2 u^T H u / 2:

    slopes   c = (l+ - l-) / (2 eps)          E[c c'] = |g|^2  for one u on two batches
    bends    h = (l+ + l- - 2 l0) / eps^2     E[h] = tr H,  Var[h] = 2 |H|^2 (Frobenius)

A step lr * mean_k c_k u_k lowers a quadratic by lr |g|^2 - lr^2 (tr(H) s + |H| |g|^2) / 2 at
least, with s = E[c^2] / k and |H| no less than the largest eigenvalue: most for

    lr = |g|^2 / (tr(H) s + |H| |g|^2)

Noise piles up over a run: to lr^2 tr(H) s T / 6 behind T steps of a linear schedule, and never
beyond lr d s / 4, where d numbers have come to rest. lr is no larger than what keeps the smaller of
the two at `NOISE` of the loss. No parameter moves while this is measured.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zotune.core.estimator import Estimator, PerExample, estimator
from zotune.core.evaluator import TorchEvaluator
from zotune.core.method import Method
from zotune.core.noise import Key
from zotune.core.probe import Losses, Probe
from zotune.core.space import Space
from zotune.core.spaces.parameters import heads
from zotune.training.batches import Batches

log = logging.getLogger("zotune")

FIRST, LEAST, MOST = 0.01, 1e-4, 0.2  # eps to begin with, and its bounds
BEND = 0.02  # share of the loss that curvature adds at a probe: well above rounding
NOISE = 0.03  # share of the loss that a run may end with because its steps are noisy
BATCHES, DIRECTIONS = 6, 4
PER_EXAMPLE = 1 << 16  # numbers of a block, beyond which a direction per example costs too much
HEAD_QUERIES = 16  # where the network below runs once for all probes
_LANE = 1 << 20  # step numbers that no run reaches: these directions are met only here


@dataclass(frozen=True)
class Landscape:
    """What the probes saw.

    slope: |g|^2. batch, example: E[c^2] of a direction on a whole batch, and on one example.
    trace: tr H. norm: |H|. loss: |L| at the base point, what changes are compared with.
    """

    loss: float
    slope: float
    batch: float
    example: float
    trace: float
    norm: float

    def eps(self) -> float:
        """Where the curvature bends the loss by `BEND` of it."""
        return min(max(math.sqrt(2 * BEND * self.loss / self.trace), LEAST), MOST)

    def lr(self, estimates: Estimator, examples: int, steps: int, numel: int) -> float:
        """The step that lowers the loss most now and leaves little noise at the end."""
        square = self.example if isinstance(estimates, PerExample) else self.batch
        spread = square / estimates.count(examples)
        greedy = self.slope / (self.trace * spread + self.norm * self.slope)
        noise = NOISE * self.loss
        calm = max(
            math.sqrt(6 * noise / (self.trace * spread * steps)), 4 * noise / (numel * spread)
        )
        return min(greedy, calm)


def measured(
    method: Method,
    given: set[str],
    space: Space,
    evaluator: TorchEvaluator,
    batches: Batches,
    steps: int,
) -> Method:
    """`auto` with directions, queries, eps and lr for this space, but for what was `given`.

    Costs 72 forwards over batches of the size trained with.
    """
    if not space.probed:
        log.warning("auto: every gradient is exact, so nothing is probed; lr=%.3g", method.lr)
        return method
    space = Space(space.probed)
    chosen = _estimator(method, given, space, evaluator)
    eps = chosen.eps if "eps" in given else _eps(method, space, evaluator, batches)
    seen = look(method, space, evaluator, batches, eps)
    chosen = type(chosen)(eps, chosen.queries)
    lr = method.lr
    if "lr" not in given:
        lr = seen.lr(chosen, batches.size, steps, space.numel)
    log.info(
        "auto: %s, lr=%.3g, measured by %d forwards (slope %.3g, noise %.3g, curvature %.3g)",
        chosen, lr, evaluator.forwards, seen.slope**0.5, seen.example**0.5, seen.trace,
    )  # fmt: skip
    evaluator.forwards = 0
    return method.but(estimator=chosen, lr=lr)


def _estimator(
    method: Method, given: set[str], space: Space, evaluator: TorchEvaluator
) -> Estimator:
    """A direction per example where blocks are small, many where they cost next to nothing."""
    small = max(b.numel for b in space) <= PER_EXAMPLE and evaluator.per_example
    directions = "example" if small else "batch"
    inside = heads(evaluator.model)
    head = small and all(id(o.module) in inside for b in space for o in b.owners)
    queries = HEAD_QUERIES if head and "queries" not in given else method.estimator.queries
    if "directions" in given:
        return type(method.estimator)(method.estimator.eps, queries)
    return estimator(directions, method.estimator.eps, queries)


def _eps(method: Method, space: Space, evaluator: TorchEvaluator, batches: Batches) -> float:
    first = look(method, space, evaluator, batches, FIRST, batches_seen=2)
    return first.eps()


def look(
    method: Method,
    space: Space,
    evaluator: TorchEvaluator,
    batches: Batches,
    eps: float,
    batches_seen: int = BATCHES,
) -> Landscape:
    """The same few directions on several batches, and one per example on each."""
    space.bind_(eps, 1.0, method.units)
    key = Key(batches.seed, step=_LANE)
    shared = [key.fold(query=j) for j in range(DIRECTIONS)]
    slopes, bends, lanes, level = [], [], [], 0.0
    for step in range(batches_seen):
        batch = batches[step]
        probes = [Probe(key, 0.0), *_pairs(shared, eps)]
        seen = evaluator.losses(probes, batch, method.perturbation)
        c, h = _slopes(seen, eps)
        level += abs(float(seen.mean[0])) / batches_seen
        slopes.append(c)
        bends.append(h)
        if evaluator.per_example:
            each = seen.per_example[1:].view(DIRECTIONS, 2, -1)
            lanes.append((each[:, 0] - each[:, 1]).square().mean() / (2 * eps) ** 2)
    c, h = torch.stack(slopes), torch.stack(bends)  # (batches, directions)
    batch_square = float(c.square().mean())
    cross = (c.sum(0).square() - c.square().sum(0)) / (len(c) * (len(c) - 1))
    floor = batch_square / (4 * len(c))  # a slope that cannot be told from none
    norm = float((h.mean(0).var() / 2).sqrt())
    trace = max(float(h.mean()), norm, 1e-12)
    example = float(torch.stack(lanes).mean()) if lanes else batch_square
    slope = max(float(cross.mean()), floor)
    return Landscape(max(level, 1e-12), slope, batch_square, example, trace, norm)


def _pairs(keys: list[Key], eps: float) -> list[Probe]:
    return [Probe(k, step) for k in keys for step in (eps, -eps)]


def _slopes(seen: Losses, eps: float) -> tuple[Tensor, Tensor]:
    base, pairs = seen.mean[0], seen.mean[1:].view(-1, 2)
    return (pairs[:, 0] - pairs[:, 1]) / (2 * eps), (pairs.sum(1) - 2 * base) / eps**2
