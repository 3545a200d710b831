"""However a batch is cut, an example keeps its direction and its share; memory that runs out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import batch, cross_entropy, small

from zotune.core import spaces
from zotune.core.evaluator import TorchEvaluator
from zotune.core.fitting import fitted, trial_of
from zotune.core.meter import Meter
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.core.probe import Probe
from zotune.core.space import Space
from zotune.errors import ZotuneError
from zotune.tasks.batch import Batch

CPU = torch.device("cpu")


def space(model: nn.Module) -> Space:
    built = spaces.get("weights").build(model)
    built.bind_(0.3, 1.0, "relative")
    return built


def probes(lanes: bool, queries: int = 2) -> list[Probe]:
    return [Probe(Key(5, query=q), s, lanes) for q in range(queries) for s in (0.3, -0.3)]


def weighted(model: nn.Module, here: Batch) -> tuple[Tensor, Tensor]:
    loss, _ = cross_entropy(model, here)
    return loss, (here["label"] + 1).float()


@settings(max_examples=25)
@given(
    order=st.permutations(range(6)),
    cuts=st.sets(st.integers(1, 5)),
    room=st.none() | st.integers(1, 200),
    lanes=st.booleans(),
)
def test_pieces_in_any_order_give_the_losses_of_the_whole_batch(
    order: list[int], cuts: set[int], room: int | None, lanes: bool
) -> None:
    model, whole = small(), batch(6)
    edges = [0, *sorted(cuts), 6]
    pieces = []
    for start, stop in itertools.pairwise(edges):
        places = order[start:stop]
        rows = {name: t[places] for name, t in whole.tensors.items()}
        pieces.append(Batch(rows, len(places), places=tuple(places)))
    plain = TorchEvaluator(model, space(model), weighted).losses(probes(lanes), whole, Gaussian())
    cut = TorchEvaluator(model, space(model), weighted, room=room)
    found = cut.losses(probes(lanes), pieces, Gaussian())
    assert torch.allclose(found.per_example, plain.per_example, rtol=0, atol=2e-5)
    assert torch.allclose(found.weights, plain.weights)
    assert cut.forwards == 4


@given(room=st.integers(1, 300), size=st.integers(1, 9), count=st.integers(1, 5))
def test_no_forward_takes_more_than_there_is_room_for(room: int, size: int, count: int) -> None:
    model, whole, seen = small(), batch(size), list[int]()

    def counted(module: nn.Module, here: Batch) -> tuple[Tensor, Tensor]:
        seen.append(here["input_ids"].numel())
        return cross_entropy(module, here)

    evaluator = TorchEvaluator(model, space(model), counted, room=room)
    evaluator.losses(probes(False, count), whole, Gaussian())
    length = whole["input_ids"].shape[1]
    assert max(seen) <= max(room, length)  # one probe of one example is the least
    assert sum(seen) == 2 * count * size * length
    if room >= 2 * count * size * length:
        assert len(seen) == 1
    elif room >= size * length:
        assert all(n % (size * length) == 0 for n in seen)  # probes one by one go first


@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize("fits", [6, 12, 40])
def test_a_step_is_measured_again_in_smaller_pieces_when_memory_runs_out(
    fits: int, lanes: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, whole, sizes = small(), batch(5), list[int]()

    def short(module: nn.Module, here: Batch) -> tuple[Tensor, Tensor]:
        sizes.append(here["input_ids"].numel())
        if sizes[-1] > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return cross_entropy(module, here)

    plain = TorchEvaluator(model, space(model), cross_entropy)
    tight = TorchEvaluator(model, space(model), short)
    truth = plain.losses(probes(lanes), whole, Gaussian())
    for _ in range(2):
        found = tight.losses(probes(lanes), whole, Gaussian())
        assert torch.allclose(found.per_example, truth.per_example, rtol=0, atol=2e-5)
    assert tight.forwards == 2 * plain.forwards
    failed = sum(n > fits for n in sizes)
    assert len([r for r in caplog.records if "out of memory" in r.message]) == failed
    assert all(n <= fits for n in sizes[len(sizes) // 2 :])  # the second time nothing fails


def test_exact_gradients_are_not_counted_twice_when_memory_runs_out() -> None:
    def built(model: nn.Module) -> Space:
        found = spaces.parse("head(exact=True) + weights(pattern='up')").build(model)
        found.bind_(0.3, 1.0, "relative")
        return found

    calls = []

    def short(module: nn.Module, here: Batch) -> tuple[Tensor, Tensor]:
        calls.append(here.size)
        if len(calls) == 2:  # the first piece has left its gradient already
            raise MemoryError
        return cross_entropy(module, here)

    first, second = small(), small()
    plain = TorchEvaluator(first, built(first), cross_entropy)
    tight = TorchEvaluator(second, built(second), short, micro_batch=3)
    truth = plain.losses(probes(False), batch(6), Gaussian()).exact
    found = tight.losses(probes(False), batch(6), Gaussian()).exact
    assert truth.keys() == found.keys() != set()
    for name, g in truth.items():
        torch.testing.assert_close(found[name], g, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_cut_says_so_and_other_errors_pass() -> None:
    def full(module: nn.Module, here: Batch) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    def wrong(module: nn.Module, here: Batch) -> Any:
        raise ValueError("another matter")

    model = small()
    with pytest.raises(ZotuneError, match="one probe of one example"):
        TorchEvaluator(model, space(model), full).losses(probes(False), batch(3), Gaussian())
    with pytest.raises(ZotuneError, match="as a whole"):
        TorchEvaluator(model, space(model), full, per_example=False).losses(
            probes(False), batch(3), Gaussian()
        )
    with pytest.raises(ValueError, match="another matter"):
        TorchEvaluator(model, space(model), wrong).losses(probes(False), batch(3), Gaussian())


@given(
    each=st.integers(1, 50), fixed=st.integers(0, 2000), bend=st.sampled_from((1.0, 1.3)),
    free=st.integers(1000, 200_000),
)  # fmt: skip
def test_the_size_chosen_keeps_to_its_share_even_where_memory_bends(
    each: int, fixed: int, bend: float, free: int
) -> None:
    """Nothing smaller than the least, and what was tried last fits."""

    def taken(numbers: int) -> int:
        return fixed + int(each * numbers**bend)

    def trial(numbers: int) -> int:
        held = torch.empty(taken(numbers), dtype=torch.uint8)
        del held
        return numbers

    found = fitted(trial, 10, 20, 1000, free, CPU).numbers
    assert found >= 10
    assert found == 10 or taken(min(found, 1000)) <= 0.7 * free
    if bend == 1.0 and 10 < found < 1000:
        assert taken(found + 2) > 0.7 * free


def test_trials_take_more_probes_first_and_then_more_examples() -> None:
    ran = []
    trial = trial_of(lambda part, count: ran.append((part.size, count)), batch(6), 2)
    length = batch(1).numbers
    assert [trial(n * length) for n in (1, 2, 3, 4, 12, 99)] == [
        n * length for n in (1, 2, 2, 4, 12, 12)
    ]
    assert ran == [(1, 1), (1, 2), (1, 2), (2, 2), (6, 2), (6, 2)]


def test_the_meter_counts_what_lives_and_not_views_or_what_was_there() -> None:
    before = torch.ones(1000)
    with Meter() as meter:
        for _ in range(5):
            made = (before + 1).view(10, 100)[:5].t()
        before.add_(made.sum())
    assert 8000 <= meter.peak < 8100  # the next one is made before the last is gone
    assert max(meter.sizes) == 1000
