"""Evaluators: however it is cut up, the same losses. Run: pytest tests/core/test_evaluator.py"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import CASES, Case, batch, bert, cross_entropy, digest, gpt2, llama, observe, small

from zotune.core import spaces
from zotune.core.evaluator import FunctionEvaluator, TorchEvaluator
from zotune.core.low_rank import LowRank
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian, Perturbation, Rademacher
from zotune.core.probe import Losses, Probe
from zotune.core.sites import StackingError
from zotune.core.space import Space, tensors
from zotune.errors import BadInput
from zotune.tasks.batch import Batch

TOLERANCE = {
    torch.float32: 2e-5,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}  # absolute, on losses of 1
MODELS: dict[str, Callable[[], nn.Module]] = {
    "small": small,
    "bert": bert,
    "gpt2": gpt2,
    "llama": llama,
    "llama-tied": lambda: llama(tied=True),
}


def bound(space: Space, eps: float = 0.3) -> Space:
    space.bind_(eps, 1.0, "relative")
    return space


def pair(lanes: bool = False, queries: int = 2) -> list[Probe]:
    """A base point and +-eps along a few directions."""
    signed = [Probe(Key(5, step=1, query=q), s, lanes) for q in range(queries) for s in (0.3, -0.3)]
    return [Probe(Key(5, step=1), 0.0, lanes), *signed]


def example(whole: Batch, b: int) -> Batch:
    return whole.select(b, b + 1)


def naive(
    model: nn.Module, space: Space, probes: list[Probe], whole: Batch, law: Perturbation
) -> Tensor:
    """Losses (probes, examples) by writing each point into a copy, one example at a time."""
    rows = []
    for probe in probes:
        row = []
        for b in range(whole.size):
            key = probe.key.fold(lane=b) if probe.per_example else probe.key
            one = copy.deepcopy(model)
            modules = dict(one.named_modules())
            for block in space:
                value = block.at(law.draw(key, block), probe.step) if probe.step else block.value()
                for owner in block.owners:
                    holder = modules[owner.path]
                    for table in (holder._parameters, holder._buffers):
                        if owner.attribute in table:
                            table[owner.attribute] = value  # type: ignore[assignment]
            with torch.no_grad():
                row.append(float(cross_entropy(one, example(whole, b))[0]))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def measured(
    evaluator: TorchEvaluator, probes: list[Probe], whole: Batch, law: Any = None
) -> Tensor:
    return evaluator.losses(probes, whole, law or Gaussian()).per_example


@pytest.mark.parametrize("lanes", [False, True], ids=["shared", "lanes"])
@pytest.mark.parametrize("name", MODELS)
def test_every_probe_and_example_alone_gives_the_losses_of_the_stack(
    name: str, lanes: bool
) -> None:
    model, whole = MODELS[name](), batch(3)
    space = bound(spaces.get("weights").build(model))
    probes = pair(lanes)
    truth = naive(model, space, probes, whole, Gaussian())
    assert float(truth.std(0).min()) > 1e-3  # the probes differ, so agreement says something
    for options in (
        {},
        {"stack": 1},
        {"stack": 2},
        {"micro_batch": 2},
        {"stack": 3, "micro_batch": 1},
        {"fast": False},
    ):
        losses = measured(TorchEvaluator(model, space, cross_entropy, **options), probes, whole)
        assert torch.allclose(losses, truth, rtol=0, atol=TOLERANCE[torch.float32]), options


@pytest.mark.parametrize("lanes", [False, True], ids=["shared", "lanes"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_every_space_the_stack_equals_each_example_alone(
    case: Case, dtype: torch.dtype, lanes: bool
) -> None:
    model, whole = case.model().to(dtype), batch(3)
    space = bound(case.build(model))
    probes = pair(lanes, queries=1)
    truth = naive(model, space, probes, whole, Gaussian())
    for use in (True, False):
        evaluator = TorchEvaluator(model, space, cross_entropy, fast=use)
        assert torch.allclose(
            measured(evaluator, probes, whole), truth, rtol=0, atol=TOLERANCE[dtype]
        )


@settings(max_examples=25)
@given(
    size=st.integers(1, 7),
    stack=st.none() | st.integers(1, 6),
    micro=st.none() | st.integers(1, 8),
    queries=st.integers(1, 3),
    lanes=st.booleans(),
    law=st.sampled_from((Gaussian(), Rademacher(), LowRank())),
)
def test_stacks_and_micro_batches_of_any_size_agree(
    size: int, stack: int | None, micro: int | None, queries: int, lanes: bool, law: Perturbation
) -> None:
    model, whole = small(), batch(size)
    space = bound(spaces.get("weights").build(model))
    probes = pair(lanes, queries)
    plain = TorchEvaluator(model, space, cross_entropy, stack=1, fast=False)
    cut = TorchEvaluator(model, space, cross_entropy, stack=stack, micro_batch=micro)
    assert torch.allclose(
        measured(cut, probes, whole, law), measured(plain, probes, whole, law), rtol=0, atol=2e-5
    )
    assert cut.forwards == plain.forwards == len(probes)


@pytest.mark.parametrize("lanes", [False, True], ids=["shared", "lanes"])
def test_examples_of_several_rows_stay_together_and_share_a_direction(lanes: bool) -> None:
    """Two candidates per example, as in multiple choice: the lower of two losses counts."""
    flat = batch(6)
    whole = Batch({"input_ids": flat["input_ids"], "label": flat["label"]}, 3)

    def lowest(model: nn.Module, here: Batch) -> tuple[Tensor, Tensor]:
        loss, _ = cross_entropy(model, here)
        pairs = loss.view(-1, 2).amin(1)
        return pairs, torch.ones_like(pairs)

    model = bert()
    space = bound(spaces.get("weights").build(model))
    probes = pair(lanes)
    together = measured(TorchEvaluator(model, space, lowest), probes, whole)
    assert together.shape == (5, 3)
    alone = TorchEvaluator(model, space, lowest, stack=1, fast=False, micro_batch=1)
    assert torch.allclose(together, measured(alone, probes, whole), rtol=0, atol=2e-5)


def test_the_batch_loss_is_the_weighted_mean_however_it_is_cut() -> None:
    def weighted(model: nn.Module, here: Batch) -> tuple[Tensor, Tensor]:
        loss, _ = cross_entropy(model, here)
        return loss, (here["label"] + 1).float()

    model, whole = small(), batch(5)
    space = bound(spaces.get("weights").build(model))
    loss, weight = weighted(model, whole)
    truth = float((loss.double() * weight).sum() / weight.sum())
    for options in ({}, {"stack": 1}, {"micro_batch": 2}):
        losses = TorchEvaluator(model, space, weighted, **options).losses(pair(), whole, Gaussian())
        assert float(losses.weights.sum()) == pytest.approx(1)
        assert float(losses.mean[0]) == pytest.approx(truth, rel=1e-6)


def test_the_two_sides_of_a_probe_lie_on_opposite_sides_whatever_dropout_says() -> None:
    model = small()
    model.up = nn.Sequential(model.up, nn.Dropout(0.5))  # type: ignore[assignment]
    model.train()
    space = bound(spaces.get("head").build(model))
    evaluator = TorchEvaluator(model, space, cross_entropy)
    first, second = (measured(evaluator, pair(), batch(4)) for _ in range(2))
    assert torch.equal(first, second)


# ---- check ---------------------------------------------------------------------------


class Centred(nn.Module):
    """Subtracts the batch's mean: rows of one probe reach into another's."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


def mixing() -> nn.Module:
    model = small()
    model.down = nn.Sequential(model.down, Centred())  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("eps", [1.0, 1e-1, 1e-3])
@pytest.mark.parametrize("space", ["weights", "weights(pattern='down')", "norms", "adapter"])
def test_check_finds_a_model_that_mixes_the_batch_at_any_eps(space: str, eps: float) -> None:
    """At a small eps all losses are close, so it is their differences that have to agree."""
    model = mixing()
    built = spaces.parse(space).build(model, observe)
    built.bind_(eps, 1.0, "relative")
    evaluator = TorchEvaluator(model, built, cross_entropy)
    probes = [Probe(Key(1), s) for s in (eps, -eps)]
    evaluator.check(batch(6), probes, Gaussian())
    assert evaluator.stack == 1


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("eps", [1e-1, 1e-3])
@pytest.mark.parametrize("name", ["small", "bert", "gpt2", "llama"])
def test_check_keeps_the_stack_of_a_model_that_does_not(
    name: str, eps: float, dtype: torch.dtype
) -> None:
    model = MODELS[name]().to(dtype)
    space = spaces.get("weights").build(model)
    space.bind_(eps, 1.0, "relative")
    before = digest(model)
    for lanes in (False, True):
        evaluator = TorchEvaluator(model, space, cross_entropy)
        probes = [Probe(Key(1), s, lanes) for s in (eps, -eps)]
        assert evaluator.check(batch(6), probes, Gaussian()) == []
        assert evaluator.stack is None
        assert evaluator.forwards == 0
    assert digest(model) == before


@pytest.mark.parametrize("case", CASES, ids=str)
def test_check_keeps_the_stack_on_every_space(case: Case) -> None:
    model = case.model()
    space = case.build(model)
    space.bind_(1e-2, 1.0, "relative")
    evaluator = TorchEvaluator(model, space, cross_entropy)
    evaluator.check(batch(6), [Probe(Key(1), s) for s in (1e-2, -1e-2)], Gaussian())
    assert evaluator.stack is None


def test_check_falls_back_where_rows_cannot_be_told_apart_or_the_stack_does_not_fit() -> None:
    class Table(nn.Module):
        """A bias looked up by position, on its own rows."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = small()
            self.bias = nn.Embedding(7, 3)
            nn.init.constant_(self.bias.weight, 0.1)

        def forward(self, input_ids: Tensor) -> Tensor:
            out: Tensor = self.inner(input_ids) + self.bias(torch.arange(7)).mean(0)
            return out

    class Fixed(nn.Module):
        """Believes that a batch has four rows."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = small()

        def forward(self, input_ids: Tensor) -> Tensor:
            out: Tensor = self.inner(input_ids.view(4, -1)[:, :6])
            return out + torch.zeros(4, 1)

    for model in (Table(), Fixed()):
        space = bound(spaces.get("weights").build(model), 1e-2)
        evaluator = TorchEvaluator(model, space, cross_entropy)
        evaluator.check(batch(4), [Probe(Key(1), s) for s in (1e-2, -1e-2)], Gaussian())
        assert evaluator.stack == 1
        truth = naive_stack(model, space)
        assert torch.allclose(measured(evaluator, pair(), batch(4)), truth, atol=2e-5)


class Relative(nn.Module):
    """Positions relative to each other, looked up as a (T, T) table: its rows are no examples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small()
        self.bias = nn.Embedding(6, 3)
        nn.init.constant_(self.bias.weight, 0.1)

    def forward(self, input_ids: Tensor) -> Tensor:
        steps = torch.arange(input_ids.shape[1])
        table = self.bias((steps.unsqueeze(0) - steps.unsqueeze(1)).abs())
        out: Tensor = self.inner(input_ids) + 3 * table[0].sum(0)
        return out


@pytest.mark.parametrize("make", [Relative, mixing])
def test_check_refuses_directions_per_example_where_examples_cannot_be_told_apart(
    make: Callable[[], nn.Module],
) -> None:
    """Six positions and six examples: nothing would raise, and every loss would be wrong."""
    model = make()
    space = bound(spaces.get("weights").build(model), 1e-2)
    evaluator = TorchEvaluator(model, space, cross_entropy)
    with pytest.raises(StackingError, match="directions='batch'"):
        evaluator.check(batch(6), [Probe(Key(1), s, True) for s in (1e-2, -1e-2)], Gaussian())


def naive_stack(model: nn.Module, space: Space) -> Tensor:
    """Probes one by one over the whole batch, by writing into a copy."""
    rows = []
    for probe in pair():
        one = copy.deepcopy(model)
        for block in space:
            value = block.at(Gaussian().draw(probe.key, block), probe.step)
            one.get_parameter(block.name).data = value if probe.step else block.value()
        with torch.no_grad():
            rows.append(cross_entropy(one, batch(4))[0].double())
    return torch.stack(rows)


def test_check_names_the_blocks_that_no_forward_uses() -> None:
    model = bert()  # its classifier never calls nothing but what it has
    model.spare = nn.Linear(4, 4)  # type: ignore[assignment]
    space = bound(spaces.get("weights").build(model))
    evaluator = TorchEvaluator(model, space, cross_entropy)
    assert evaluator.check(batch(4), pair(), Gaussian()) == ["spare.weight", "spare.bias"]


def test_a_stack_that_cannot_work_is_an_error_that_says_what_to_do() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Embedding(7, 3)

        def forward(self, input_ids: Tensor) -> Tensor:
            return torch.zeros(len(input_ids), 3) + self.bias(torch.arange(7)).mean(0)

    model = Table()
    space = bound(spaces.get("weights").build(model))
    with pytest.raises(StackingError, match="stack=1"):
        measured(TorchEvaluator(model, space, cross_entropy), pair(), batch(4))


# ---- hooks, objectives, options ------------------------------------------------------


def test_adapters_add_their_output_once_under_tuned_layers_too() -> None:
    model = small()
    space = bound(spaces.parse("adapter(rank=2) + weights").build(model, observe))
    for block in space:
        if block.name.endswith("lora_B"):
            block.move_(0, block.rows, -0.2 * Gaussian().draw(Key(7), block), Key(7))
    whole = batch(3)
    for lanes in (False, True):
        truth = naive(model, space, pair(lanes), whole, Gaussian())
        losses = measured(TorchEvaluator(model, space, cross_entropy), pair(lanes), whole)
        assert torch.allclose(losses, truth, rtol=0, atol=2e-5)


def test_an_objective_of_the_whole_batch_runs_one_probe_at_a_time() -> None:
    sizes: list[int] = []

    def share_wrong(model: nn.Module, here: Batch) -> tuple[Tensor, Tensor]:
        sizes.append(here.size)
        loss, _ = cross_entropy(model, here)
        return loss.amax().view(1), torch.ones(1)

    model, whole = small(), batch(5)
    space = bound(spaces.get("weights").build(model))
    evaluator = TorchEvaluator(model, space, share_wrong, stack=4, per_example=False)
    losses = evaluator.losses(pair(), whole, Gaussian())
    assert losses.per_example.shape == (5, 1)
    assert set(sizes) == {5}
    truth = naive(model, space, pair(), whole, Gaussian()).amax(1)
    assert torch.allclose(losses.mean, truth, atol=2e-5)
    with pytest.raises(BadInput, match="directions='batch'"):
        evaluator.losses(pair(lanes=True), whole, Gaussian())
    with pytest.raises(BadInput, match="drop micro_batch"):
        TorchEvaluator(model, space, share_wrong, per_example=False, micro_batch=2)


def test_stacks_and_micro_batches_below_one_are_refused() -> None:
    model = small()
    space = spaces.get("weights").build(model)
    for options in ({"stack": 0}, {"micro_batch": 0}, {"stack": -1}):
        with pytest.raises(BadInput, match="at least 1"):
            TorchEvaluator(model, space, cross_entropy, **options)


def test_shared_directions_and_directions_per_example_may_be_asked_for_together() -> None:
    model, whole = small(), batch(3)
    space = bound(spaces.get("weights").build(model))
    probes = [*pair(), *pair(lanes=True), *pair()]
    losses = measured(TorchEvaluator(model, space, cross_entropy), probes, whole)
    truth = naive(model, space, probes, whole, Gaussian())
    assert torch.allclose(losses, truth, rtol=0, atol=2e-5)


def test_no_graph_is_kept() -> None:
    model = small().requires_grad_(True)
    space = bound(spaces.get("weights").build(model))
    losses = measured(TorchEvaluator(model, space, cross_entropy), pair(), batch(3))
    assert not losses.requires_grad
    assert all(p.grad is None for p in model.parameters())


# ---- plain functions -----------------------------------------------------------------


def test_a_function_sees_the_values_of_each_probe() -> None:
    space = bound(tensors({"x": torch.ones(3), "y": torch.zeros(2, 2)}, unit=2.0))
    seen = []

    def function(values: dict[str, Tensor], given: Any) -> float:
        seen.append({k: v.clone() for k, v in values.items()})
        return given + float(values["x"].sum())

    evaluator = FunctionEvaluator(space, function)
    losses = evaluator.losses(pair(), 100.0, Gaussian())
    assert evaluator.forwards == 5
    x, y = space.blocks
    for probe, values, loss in zip(pair(), seen, losses.mean.tolist(), strict=True):
        assert torch.allclose(values["x"], 1 + 2 * probe.step * Gaussian().draw(probe.key, x))
        assert torch.allclose(values["y"], 2 * probe.step * Gaussian().draw(probe.key, y))
        assert loss == pytest.approx(100 + float(values["x"].sum()))
    assert torch.equal(x.value(), torch.ones(3))
    with pytest.raises(BadInput, match="directions='batch'"):
        evaluator.losses(pair(lanes=True), None, Gaussian())


def test_losses_of_a_list_are_one_column() -> None:
    losses = Losses.of([1.0, 2.0])
    assert losses.per_example.dtype == torch.float64
    assert losses.mean.tolist() == [1.0, 2.0]
