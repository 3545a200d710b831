"""What methods may add to a step: interludes, memory, subspaces, observation, exact gradients.

Run: pytest tests/core/test_seams.py
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from toys import batch, cross_entropy, digest, gpt2, small

from zotune.core import spaces
from zotune.core.block import Block
from zotune.core.estimator import Estimate, OneSided, TwoSided
from zotune.core.evaluator import TorchEvaluator
from zotune.core.method import Interlude, Method
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian, Perturbation
from zotune.core.probe import Probe
from zotune.core.rule import SGD, Adam
from zotune.core.space import Space
from zotune.core.step import Tuner
from zotune.core.subspace import Subspace
from zotune.errors import BadInput


def tuner_on(space: str, method: Method, total: int = 8) -> Tuner:
    model = small()
    built = spaces.parse(space).build(model, _observe)
    return Tuner(built, method, 3, evaluator=TorchEvaluator(model, built, cross_entropy))


def _observe(model: torch.nn.Module, after: object = None, examples: object = None) -> None:
    for t in range(3):
        cross_entropy(model, batch(8, t))


# ---- interludes ------------------------------------------------------------------------


def test_an_interlude_takes_its_turn_with_its_own_lr() -> None:
    method = Method(
        "m", lr=0.1, units="absolute",
        interlude=Interlude(2, 1, Method("rest", lr=0.0, units="absolute")),
    )  # fmt: skip
    tuner = tuner_on("weights", method)
    assert tuner.evaluator is not None
    model = tuner.evaluator.model  # type: ignore[attr-defined]
    states = [digest(model)]
    for t in range(4):
        tuner.step(batch(4, t))
        states.append(digest(model))
    changed = [a != b for a, b in pairwise(states)]
    assert changed == [True, True, False, True]


def test_an_interlude_that_journals_otherwise_is_refused() -> None:
    other = Method("rest", TwoSided(queries=3))
    with pytest.raises(BadInput, match="as many scalars"):
        Method("m", interlude=Interlude(2, 1, other))


# ---- subspaces and memory ----------------------------------------------------------------


@dataclass(frozen=True)
class Columns(Subspace):
    """z (rows, 1) on one column that changes every two steps."""

    def inner(self, block: Block) -> tuple[int, ...] | None:
        return (block.rows, 1) if len(block.shape) == 2 else None

    def expand(
        self, z: Tensor, key: Key, block: Block, start: int = 0, stop: int | None = None
    ) -> Tensor:
        out = torch.zeros((len(z[start:stop]), *block.shape[1:]))
        out[:, (key.step // 2) % block.shape[1]] = z[start:stop, 0]
        return out

    def carry(self, z: Tensor, block: Block, old: Key, new: Key) -> Tensor:
        return z if old.step // 2 == new.step // 2 else torch.zeros_like(z)


def test_a_rule_acts_on_a_subspaces_coordinates_and_is_carried_when_the_basis_changes() -> None:
    method = Method("m", TwoSided(0.01), Columns(), Adam(), lr=0.01, units="absolute")
    tuner = tuner_on("weights(pattern='up.weight')", method)
    (block,) = tuner.space.blocks
    assert {k: tuple(v.shape) for k, v in tuner.state["m"][block.name].items()} == {
        "m": (block.rows, 1), "v": (block.rows, 1)
    }  # fmt: skip
    assert tuner.kept_bytes == 2 * 4 * block.rows
    before = block.value().clone()
    for t in range(3):
        tuner.step(batch(4, t))
    moved = (block.value() - before).abs().sum(0) > 0
    assert moved.nonzero().flatten().tolist() == [0, 1]
    # After the basis changed, the moments hold one step only: those before were carried to zero.
    g = tuner.recent[0]
    z = Columns().combine_inner(g.keys, g.coefficients, block)
    assert torch.allclose(tuner.state["m"][block.name]["m"], 0.1 * z)


@dataclass(frozen=True)
class Counting(Perturbation):
    """Gaussian, and a count of what was learned per block."""

    def state(self, block: Block) -> dict[str, Tensor]:
        return {"count": torch.zeros(())}

    def learn_(self, space: Space, estimate: Estimate) -> None:
        for block in space.probed:
            block.memory["count"] += estimate.extras[0]

    def draw(self, key: Key, block: Block, start: int = 0, stop: int | None = None) -> Tensor:
        return Gaussian().draw(key, block, start, stop) * (1 + block.memory["count"])


@dataclass(frozen=True)
class Extra(TwoSided):
    """One more scalar a step: 1."""

    def count(self, examples: int) -> int:
        return self.queries + 1

    def rebuild(self, key: Key, scalars: object, loss: float) -> Estimate:
        values = tuple(scalars)  # type: ignore[arg-type]
        if len(values) == self.queries:
            values = (*values, 1.0)
        keys = self.keys(key, self.queries)
        return Estimate(key, keys, values[:-1], loss, extras=values[-1:])


def test_memory_is_learned_saved_and_restored() -> None:
    method = Method("m", Extra(0.01), Counting(), lr=0.01, units="absolute")
    tuner = tuner_on("norms", method)
    for t in range(3):
        tuner.step(batch(4, t))
    saved = {k: v.clone() for k, v in tuner.state_tensors().items()}
    again = tuner_on("norms", method)
    again.load_(saved, 3, 3)
    for each in (tuner, again):
        assert [float(b.memory["count"]) for b in each.space] == [3.0, 3.0]
        each.step(batch(4, 3))
    for a, b in zip(tuner.space, again.space, strict=True):
        assert torch.equal(a.value(), b.value())
    assert tuner.recent[0].scalars[-1] == 1.0


@dataclass(frozen=True)
class Leaving(Perturbation):
    """Gaussian; keeps the point that a step left, and where it led."""

    def state(self, block: Block) -> dict[str, Tensor]:
        return {"from": block.state().clone(), "to": block.state().clone()}

    def leave_(self, space: Space, estimate: Estimate) -> None:
        for block in space.probed:
            block.memory["from"].copy_(block.state())

    def learn_(self, space: Space, estimate: Estimate) -> None:
        for block in space.probed:
            block.memory["to"].copy_(block.state())

    def draw(self, key: Key, block: Block, start: int = 0, stop: int | None = None) -> Tensor:
        return Gaussian().draw(key, block, start, stop)


def test_a_law_sees_the_point_that_a_step_leaves_decay_included() -> None:
    method = Method("m", TwoSided(0.01), Leaving(), lr=0.1, weight_decay=0.1, units="absolute")
    tuner = tuner_on("weights", method)
    for t in range(3):
        before = {b.name: b.value().clone() for b in tuner.space}
        tuner.step(batch(4, t))
        for block in tuner.space:
            assert torch.equal(block.memory["from"], before[block.name])
            assert torch.equal(block.memory["to"], block.value())
            assert not torch.equal(block.memory["from"], block.memory["to"])


# ---- several batches -----------------------------------------------------------------------


def test_a_step_on_several_batches_is_one_on_all_their_examples() -> None:
    method = Method("m", TwoSided(0.01), lr=0.1, units="absolute", batches=3)
    assert method.forwards == 6
    apart, together = tuner_on("weights", method), tuner_on("weights", method)
    whole = batch(12)
    for tuner, here in ((apart, [whole.select(i, i + 4) for i in (0, 4, 8)]), (together, whole)):
        (c,) = tuner.step(here).estimate.coefficients  # type: ignore[union-attr]
        assert abs(c) > 0.01
    for a, b in zip(apart.space, together.space, strict=True):
        torch.testing.assert_close(a.value(), b.value())


def test_forwards_are_the_mean_over_a_turn_rounded_up() -> None:
    rest = Method("rest", TwoSided(queries=1))
    assert Method("m", batches=8, interlude=Interlude(1, 3, rest)).forwards == 6
    assert Method("m", interlude=Interlude(50, 10, rest)).forwards == 2
    with pytest.raises(BadInput, match="batches=0"):
        Method("m", batches=0)


# ---- observation ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Watching(Perturbation):
    """Keeps what it saw; directions are Gaussian."""

    observes: ClassVar[bool] = True
    seen: list[tuple[str, tuple[int, ...]]] = field(default_factory=list, compare=False)

    def observe_(self, block: Block, x: Tensor) -> None:
        self.seen.append((block.name, tuple(x.shape)))

    def draw(self, key: Key, block: Block, start: int = 0, stop: int | None = None) -> Tensor:
        return Gaussian().draw(key, block, start, stop)


@pytest.mark.parametrize(("estimator", "forwards"), [(TwoSided(0.01), 3), (OneSided(0.01), 2)])
def test_an_observing_law_sees_the_base_point_of_this_batch_first(
    estimator: TwoSided | OneSided, forwards: int
) -> None:
    watching = Watching()
    method = Method("m", estimator, watching, lr=0.0)
    tuner = tuner_on("weights(pattern='up.weight')", method)
    here = batch(5, 0)
    wanted = tuner_on("weights(pattern='up.weight')", Method("n", estimator, lr=0.0))
    assert tuner.step(here).estimate.coefficients == pytest.approx(  # type: ignore[union-attr]
        wanted.step(here).estimate.coefficients, rel=1e-3  # type: ignore[union-attr]
    )  # fmt: skip
    assert watching.seen == [("up.weight", (5, 6, 16))]
    assert tuner.evaluator is not None
    assert tuner.evaluator.forwards == forwards == method.forwards
    assert not tuner.replayable


# ---- exact gradients -------------------------------------------------------------------------


@contextmanager
def recorded() -> Iterator[list[int]]:
    """Sizes of the tensors that autograd keeps for a backward pass."""
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize(
    "head",
    ["head(exact=True)", "head(basis='classes', exact=True)", "head(basis='white', exact=True)"],
)
def test_the_heads_gradient_is_exact_and_nothing_below_is_recorded(
    head: str, micro_batch: int | None
) -> None:
    model = small()

    def observe(m: torch.nn.Module, after: object = None, examples: object = None) -> None:
        for t in range(3):
            cross_entropy(m, batch(8, t))
            if after is not None:
                after(batch(8, t))  # type: ignore[operator]

    space = spaces.parse(f"{head} + norms").build(model, observe)
    evaluator = TorchEvaluator(model, space, cross_entropy, micro_batch=micro_batch)
    probes = [Probe(Key(0), 0.0), Probe(Key(0, query=1), 0.0)]
    here = batch(6, 1)
    with recorded() as sizes:
        losses = evaluator.losses(probes, here, Gaussian())
    assert max(sizes) <= 12 * max(16 * 3, here.size * 16)  # the head's inputs and logits, no more
    exact = {b.name for b in space if b.exact}
    assert set(losses.exact) == exact
    assert exact
    blocks = {b.name: b for b in space if b.exact}
    for name, block in blocks.items():
        (owner,) = block.owners
        leaf = block.value().clone().requires_grad_()
        with torch.enable_grad():
            for site in evaluator.last.sites:
                if site.module is owner.module:
                    with site.holding({owner.attribute: leaf}):
                        cross_entropy(model, here)[0].mean().backward()
        assert leaf.grad is not None
        torch.testing.assert_close(losses.exact[name], leaf.grad, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_exact_blocks_follow_their_own_lr_in_their_own_unit() -> None:
    method = Method("m", TwoSided(0.01), Gaussian(), SGD(), lr=0.1, units="relative")
    tuner = tuner_on("head(exact=True, lr=0.3) + norms", method)
    assert isinstance(tuner.evaluator, TorchEvaluator)
    block = next(b for b in tuner.space if b.name == "head.weight")
    before = block.value().clone()
    g = tuner.evaluator.losses(tuner.ask(), batch(6, 0), Gaussian()).exact["head.weight"]
    tuner.step(batch(6, 0))
    unit = block.unit
    torch.testing.assert_close(before - block.value(), 0.3 * unit * unit * g)


def test_exact_gradients_of_shared_layers_are_refused() -> None:
    model = gpt2()
    space = spaces.parse("head(exact=True)").build(model)
    with pytest.raises(BadInput, match="several layers share"):
        TorchEvaluator(model, space, cross_entropy)


def test_a_rule_that_looks_back_cannot_have_what_cannot_be_replayed() -> None:
    with pytest.raises(BadInput, match="looks back"):
        tuner_on("head(exact=True)", Method("m", rule=Adam(moments="rebuilt")))
