"""One step: order of events, records, replay, degenerate losses.

Run: pytest tests/core/test_step.py
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from toys import CASES, Case, batch, cross_entropy, digest, point

from zotune.core import moves, nouns, spaces
from zotune.core.estimator import Estimate, Estimator, OneSided, PerExample, TwoSided
from zotune.core.evaluator import FunctionEvaluator, TorchEvaluator
from zotune.core.grid import Rounded
from zotune.core.low_rank import LowRank
from zotune.core.method import Method, Schedule
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian, Rademacher, Sparse, Sphere
from zotune.core.probe import Losses
from zotune.core.rule import Adam, SignSGD
from zotune.core.shaping import Clip, Sign, Standardize
from zotune.core.space import Space, tensors
from zotune.core.step import Tuner
from zotune.errors import BadInput


def vector(n: int = 10, **options: Any) -> Space:
    return tensors({"x": torch.ones(n)}, **options)


def sphere(values: dict[str, Tensor], _: Any) -> float:
    return float(sum(v.double().square().sum() for v in values.values()))


def tuner_of(space: Space, method: Method, f: Any = sphere, **options: Any) -> Tuner:
    return Tuner(space, method, seed=7, evaluator=FunctionEvaluator(space, f), **options)


# ---- what stays ----------------------------------------------------------------------


@pytest.mark.parametrize("rule", [SignSGD(), Adam()], ids=["sign", "adam"])
def test_a_block_without_a_rate_is_neither_probed_nor_moved(rule: Any) -> None:
    space = tensors({"x": torch.ones(3)}) + tensors({"y": torch.ones(3)}, lr=0.0)
    seen: list[Tensor] = []

    def f(values: dict[str, Tensor], _: Any) -> float:
        seen.append(values["y"].clone())
        return sphere(values, _)

    tuner = tuner_of(space, Method("m", rule=rule, lr=0.01), f)
    for _ in range(3):
        tuner.step(None)
    assert len(seen) == 6
    assert all(torch.equal(y, torch.ones(3)) for y in seen)
    x, y = (block.value() for block in space)
    assert not torch.equal(x, torch.ones(3))
    assert torch.equal(y, torch.ones(3))
    assert [block.name for block in space.probed] == ["x"]


def test_layers_that_stay_cost_no_probed_forward() -> None:
    model = Case("norms").model()
    space = spaces.parse("norms(lr=0.0) + head").build(model)
    evaluator = TorchEvaluator(model, space, cross_entropy)
    tuner = Tuner(space, Method("m", lr=0.1), 7, evaluator=evaluator, total=1)
    before = [block.value().clone() for block in space]
    tuner.step(batch())
    moved = [not torch.equal(a, b.value()) for a, b in zip(before, space, strict=True)]
    assert moved == [block.name.startswith("head") for block in space]
    assert evaluator.visited == {"head"}


# ---- order ---------------------------------------------------------------------------


def test_an_estimate_is_recorded_before_anything_moves() -> None:
    space = vector()
    seen: list[tuple[int, Estimate, Tensor]] = []
    tuner = tuner_of(
        space, Method("m", lr=0.01),
        record=lambda t, e: seen.append((t, e, space.blocks[0].value().clone())),
    )  # fmt: skip
    first = tuner.step(None)
    tuner.step(None)
    assert [t for t, _, _ in seen] == [0, 1]
    assert torch.equal(seen[0][2], torch.ones(10))
    assert seen[0][1] == first.estimate
    assert not torch.equal(seen[1][2], torch.ones(10))


def test_a_record_that_fails_leaves_everything_where_it_was() -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    space = vector()
    tuner = tuner_of(space, Method("m", lr=0.01), record=full)
    with pytest.raises(OSError, match="no space"):
        tuner.step(None)
    assert torch.equal(space.blocks[0].value(), torch.ones(10))
    assert (tuner.done, tuner.applied) == (0, 0)


def test_ask_and_tell_are_the_halves_of_a_step() -> None:
    whole, halves = vector(), vector()
    a, b = tuner_of(whole, Method("m", lr=0.01)), Tuner(halves, Method("m", lr=0.01), seed=7)
    for _ in range(3):
        a.step(None)
        losses = FunctionEvaluator(halves, sphere).losses(b.ask(), None, Gaussian())
        b.tell(losses)
    assert torch.equal(whole.blocks[0].value(), halves.blocks[0].value())
    with pytest.raises(BadInput, match="no evaluator"):
        b.step(None)


def test_directions_change_from_step_to_step_and_with_the_seed() -> None:
    tuner = tuner_of(vector(), Method("m", TwoSided(1e-3, 2), lr=0.01))
    first = tuner.ask()
    tuner.step(None)
    assert not {p.key for p in first} & {p.key for p in tuner.ask()}
    assert Tuner(vector(), Method("m"), seed=8).ask()[0].key != first[0].key
    for seed in (-1, 2**63):
        with pytest.raises(BadInput, match="want 0 <= seed"):
            Tuner(vector(), Method("m"), seed=seed)


def test_the_schedule_is_in_force_and_reported() -> None:
    method = Method("m", lr=0.1, schedule=Schedule("linear", warmup=2))
    tuner = tuner_of(vector(), method, total=6)
    rates = [tuner.step(None).lr for _ in range(6)]
    assert rates == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.075, 0.05, 0.025])


@given(kind=st.sampled_from(("constant", "linear", "cosine")), total=st.integers(1, 50),
       warmup=st.integers(0, 60))  # fmt: skip
def test_a_schedule_rises_then_never_rises_again(kind: Any, total: int, warmup: int) -> None:
    factors = [Schedule(kind, warmup).factor(t, total) for t in range(total + 3)]
    assert all(0 <= f <= 1 for f in factors)
    risen = factors[: warmup + 1]
    assert risen == sorted(risen)
    after = factors[warmup:]
    assert after == sorted(after, reverse=True)


def test_a_method_refuses_what_makes_no_sense_and_is_rebuilt_from_its_repr() -> None:
    for options in ({"lr": -1.0}, {"lr": math.nan}, {"weight_decay": -0.1}, {"units": "metres"}):
        with pytest.raises(BadInput, match="want"):
            Method("m", **options)
    with pytest.raises(BadInput, match="schedule 'square'"):
        Schedule("square")  # type: ignore[arg-type]
    method = Method(
        "m", OneSided(0.1, 3), Sparse(0.3), Adam(0.7), (Clip(3.0), Sign()), units="absolute"
    )
    assert eval(repr(method), vars(nouns).copy()) == method
    assert method.but(lr=0.5).lr == 0.5
    assert method.forwards == 4


# ---- losses that say nothing, or nonsense --------------------------------------------


def after(losses: list[float], method: Method) -> tuple[bool, Tensor]:
    """Whether a step with these losses is applied, and where it leads from ones."""
    space = vector()
    tuner = Tuner(space, method, seed=7)
    report = tuner.tell(Losses.of(losses))
    assert tuner.done == 1
    assert tuner.applied == int(report.applied)
    return report.applied, space.blocks[0].value()


SHAPINGS = [(), (Clip(1.0),), (Sign(),), (Standardize(),), (Clip(1.0), Standardize())]


@pytest.mark.parametrize("shaping", SHAPINGS, ids=repr)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("estimator", [TwoSided(0.1, 2), OneSided(0.1, 3)], ids=repr)
def test_a_loss_that_is_not_finite_moves_nothing_wherever_it_stands(
    estimator: Estimator, bad: float, shaping: Any
) -> None:
    for place in range(4):
        losses = [1.0, 2.0, 3.0, 4.0]
        losses[place] = bad
        applied, x = after(losses, Method("m", estimator, shaping=shaping, lr=0.1))
        assert not applied
        assert torch.equal(x, torch.ones(10))


def test_a_skipped_step_is_recorded_and_the_run_goes_on() -> None:
    losses = iter([1.0, 0.5, math.nan, 0.5, 1.0, 0.5])
    seen: list[Estimate] = []
    tuner = tuner_of(
        vector(), Method("m", rule=Adam(moments="rebuilt", history=3), lr=0.1),
        lambda values, _: next(losses), record=lambda t, e: seen.append(e),
    )  # fmt: skip
    reports = [tuner.step(None) for _ in range(3)]
    assert [r.applied for r in reports] == [True, False, True]
    assert [r.step for r in reports] == [0, 1, 2]
    assert (tuner.done, tuner.applied, len(tuner.recent), len(seen)) == (3, 2, 2, 3)
    assert tuner.space.blocks[0].value().isfinite().all()


@pytest.mark.parametrize("shaping", SHAPINGS, ids=repr)
@pytest.mark.parametrize("rule", [Adam(), Adam(moments="rebuilt"), SignSGD()], ids=repr)
def test_equal_losses_move_nothing(shaping: Any, rule: Any) -> None:
    for queries in (1, 2):
        applied, x = after(
            [0.7] * 2 * queries,
            Method("m", TwoSided(0.1, queries), rule=rule, shaping=shaping, lr=0.1),
        )
        assert applied
        assert torch.equal(x, torch.ones(10))


# ---- replay --------------------------------------------------------------------------

METHODS = [
    Method("sgd", TwoSided(0.05, 2), lr=0.05),
    Method("adam", PerExample(0.05), Rademacher(), Adam(), lr=0.01),
    Method(
        "rebuilt",
        OneSided(0.05, 3),
        LowRank(1),
        Adam(0.7, 0.9, moments="rebuilt", history=2),
        lr=0.01,
    ),
    Method("sign", TwoSided(0.05), Sparse(0.5), SignSGD(), (Clip(0.1),), lr=0.01, weight_decay=0.1),
    Method("sphere", TwoSided(0.05), Sphere(), lr=0.05, schedule=Schedule("cosine", 1)),
    Method("rounded", TwoSided(0.05), Rounded(4), lr=0.05),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[-1], Case("codes", "int3-channel")], ids=str)
def test_the_list_of_estimates_gives_the_weights_again_bit_for_bit(
    case: Case, dtype: torch.dtype, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """... in any size of runs: what is recorded is the whole run."""
    log: list[Estimate] = []
    model = case.model().to(dtype)
    space = case.build(model)
    if case.space == "codes":
        method = method.but(weight_decay=0.0)  # they have none
    start = {b.name: b.state().clone() for b in space}
    evaluator = TorchEvaluator(model, space, cross_entropy)
    tuner = Tuner(space, method, 3, evaluator=evaluator, record=lambda t, e: log.append(e), total=5)
    for t in range(5):
        tuner.step(batch(4, t))
    end = {b.name: b.state().clone() for b in space}
    assert any(not torch.equal(start[n], end[n]) for n in end)
    for run in (1, 50, 1 << 20):
        monkeypatch.setattr(moves, "RUN", run)
        space.load_(start)
        replayed = Tuner(space, method, 3, total=5)
        for estimate in log:
            replayed.apply_(estimate)
        same = [torch.equal(b.state(), end[b.name]) for b in space]
        if isinstance(method.perturbation, LowRank):  # a product of matrices, cut elsewhere
            assert all(
                torch.allclose(b.state().float(), end[b.name].float(), atol=2e-2) for b in space
            )
        else:
            assert all(same)


def test_state_is_complete_and_wrong_states_are_refused() -> None:
    case = CASES[-1]
    model = case.model()
    space = case.build(model)
    evaluator = TorchEvaluator(model, space, cross_entropy)
    method = Method("m", TwoSided(0.05), rule=Adam(), lr=0.01)
    tuner = Tuner(space, method, 3, evaluator=evaluator, total=9)
    for t in range(3):
        tuner.step(batch(4, t))
    saved = {k: v.clone() for k, v in tuner.state_tensors().items()}
    for t in range(3, 6):
        tuner.step(batch(4, t))
    end = digest(model)
    again = Tuner(space, method, 3, evaluator=evaluator, total=9)
    again.load_(saved, 3, 3)
    for t in range(3, 6):
        again.step(batch(4, t))
    assert digest(model) == end
    with pytest.raises(BadInput, match="lacks blocks"):
        again.load_({k: v for k, v in saved.items() if space.blocks[0].name not in k}, 3, 3)


# ---- it learns -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_falls_on_a_sphere_in_every_dtype(dtype: torch.dtype) -> None:
    space = tensors({"x": torch.ones(10, dtype=dtype), "y": torch.ones((), dtype=dtype)})
    tuner = tuner_of(space, Method("m", TwoSided(0.1, 4), lr=0.03))
    for _ in range(150):
        tuner.step(None)
    assert sphere({b.name: b.value() for b in space}, None) < 0.1
    assert all(b.value().dtype == dtype for b in space)


def test_steps_are_taken_in_the_blocks_own_units() -> None:
    """Two blocks of very unlike size learn at one lr, because each counts in its own unit."""
    large, little = torch.full((5,), 1000.0), torch.full((5,), 1e-3)

    def distance(values: dict[str, Tensor], _: Any) -> float:
        return float(
            (values["large"] / 1000).square().sum() + (values["little"] * 1000).square().sum()
        )

    def learned(units: Any) -> list[float]:
        space = tensors({"large": large.clone()}, unit=1000.0) + tensors(
            {"little": little.clone()}, unit=1e-3
        )
        tuner = tuner_of(space, Method("m", TwoSided(0.05), lr=0.03, units=units), distance)
        for _ in range(200):
            tuner.step(None)
        return [float(point(b).abs().mean() / b.unit) for b in space]  # type: ignore[arg-type]

    assert max(learned("relative")) < 0.1
    assert learned("absolute")[0] > 0.99


def test_the_noise_key_of_a_step_is_the_seed_and_its_number() -> None:
    tuner = Tuner(vector(), Method("m"), seed=5)
    assert tuner.key == Key(5)
    tuner.tell(Losses.of([1.0, 1.0]))
    assert tuner.key == Key(5, step=1)
