"""QES: whole codes, a gate at the edges, and what rounding loses carried on.

Run: pytest tests/methods/test_qes.py
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from restated import exact
from torch import Tensor
from toys import batch, digest, small

from zotune import methods
from zotune.core import noise, spaces
from zotune.core.block import CodeBlock
from zotune.core.evaluator import TorchEvaluator
from zotune.core.feedback import ErrorFeedback
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.core.probe import Losses
from zotune.core.step import Tuner
from zotune.errors import BadInput
from zotune.methods.qes import Population, WholeSteps

SEED, STEPS = 11, 20


def tuner_of(scheme: str = "int4-g8", space: str = "codes", **options: Any) -> Tuner:
    model = small(0, scheme)
    built = spaces.parse(space).build(model)
    evaluator = TorchEvaluator(model, built, exact)
    options = {"eps": 0.1, "lr": 0.05, "queries": 3, **options}
    return Tuner(built, methods.get("qes", **options), SEED, evaluator=evaluator, total=STEPS)  # type: ignore[arg-type]


def values(tuner: Tuner) -> dict[str, Tensor]:
    return {b.name: b.value().float().clone() for b in tuner.space}


def up_block(scheme: str = "int4-g8") -> CodeBlock:
    block = next(iter(spaces.get("codes").build(small(0, scheme))))
    assert isinstance(block, CodeBlock)
    return block


def run_rule(rule: ErrorFeedback, block: CodeBlock, drift: Tensor, steps: int) -> dict[str, Tensor]:
    """Steps of a constant g, applied."""
    state = rule.state(block, block.shape)
    for t in range(1, steps + 1):
        step = rule.step(lambda k: drift.clone(), state, t, 1.0, block, 0)
        block.move_(0, block.rows, step, Key(0, step=t))
    return state


@pytest.mark.parametrize("scheme", ["int4-g8", "int3-channel", "int8-channel"])
def test_qes_restated(scheme: str) -> None:
    lr, sigma, gamma, pairs = 0.4, 0.2, 0.9, 3
    tuner = tuner_of(scheme, lr=lr, eps=sigma, gamma=gamma, queries=pairs)
    model = small(0, scheme)
    blocks: dict[str, Any] = {b.name: b for b in spaces.get("codes").build(model)}
    W = {n: b.value().double() for n, b in blocks.items()}
    e = {n: torch.zeros_like(w) for n, w in W.items()}
    edges = 0

    def loss_at(codes: dict[str, Tensor], t: int) -> float:
        for n, b in blocks.items():
            b.module.set_codes_(codes[n].to(torch.int8))
        with torch.no_grad():
            return float(exact(model, batch(6, t))[0].double().mean())

    def gate(n: str, step: Tensor) -> Tensor:
        lowest, highest = blocks[n].limits
        return step * ((W[n] + step >= lowest) & (W[n] + step <= highest))

    for t in range(STEPS):
        members, rewards = [], []
        for j in range(pairs):
            key, delta = Key(SEED, step=t, query=j), {}
            for n, b in blocks.items():
                x = sigma * Gaussian().draw(key, b).double()
                chance = noise.draw("uniform", key, f"{n}#round", 0, b.numel).view(b.shape)
                delta[n] = (x + (chance.double() + 1) / 2).floor()
                assert float(delta[n].abs().max()) <= 1  # where a clamp is the paper's gate
            for sign in (1, -1):
                members.append({n: sign * delta[n] for n in W})
                rewards.append(-loss_at({n: W[n] + gate(n, sign * delta[n]) for n in W}, t))
        F = torch.tensor(rewards, dtype=torch.float64)
        F = (F - F.mean()) / F.std(correction=0)
        for n in W:
            ghat = sum(f * m[n] for f, m in zip(F, members, strict=True)) / (2 * pairs * sigma)
            v = lr * ghat + gamma * e[n]
            applied = gate(n, v.round())
            edges += int((applied != v.round()).sum())
            W[n], e[n] = W[n] + applied, v - applied
    assert edges > 0
    before = values(tuner)
    for t in range(STEPS):
        assert tuner.step(batch(6, t)).applied
    for n, codes in values(tuner).items():
        assert float((codes != before[n]).float().mean()) > 0.1
        # A sum within float32 rounding of a half may go to either side of it.
        assert float((codes.double() != W[n]).double().mean()) < 0.01
    assert tuner.kept_bytes == 4 * tuner.space.numel


def test_with_gamma_one_nothing_is_lost() -> None:
    """W - e = W_0 - lr sum g, and |e| <= 1/2, while no code reaches an edge."""
    tuner = tuner_of("int8-channel", gamma=1.0, lr=0.2)
    before, total = values(tuner), {b.name: torch.zeros(b.shape).double() for b in tuner.space}
    for t in range(STEPS):
        estimate = tuner.step(batch(6, t)).estimate
        assert estimate is not None
        for b in tuner.space:
            total[b.name] += 0.2 * tuner.estimated(b, estimate).double()
    for b in tuner.space:
        e = tuner.state["qes"][b.name]["residual"].double()
        wanted = before[b.name].double() - total[b.name]
        inside = wanted.abs() < 126
        assert float(inside.double().mean()) > 0.9
        assert float((b.value() - e - wanted)[inside].abs().max()) < 1e-4
        assert float(e[inside].abs().max()) <= 0.5 + 1e-6
        assert float((b.value() - before[b.name]).abs().max()) > 0


@pytest.mark.parametrize(("drift", "moves"), [(0.049, 0), (0.051, 22)])
def test_below_half_of_one_minus_gamma_a_drift_never_moves_a_code(drift: float, moves: int) -> None:
    block = up_block("int8-channel")
    block.module.codes.zero_()
    state = run_rule(ErrorFeedback(0.9), block, torch.full(block.shape, drift), 1000)
    assert torch.equal(block.value(), torch.full(block.shape, -moves, dtype=torch.int8))
    assert float(state["residual"].abs().max()) <= 0.5
    block.module.codes.zero_()  # and what is not forgotten arrives in full
    run_rule(ErrorFeedback(1.0), block, torch.full(block.shape, drift), 1000)
    assert torch.equal(block.value(), torch.full(block.shape, -round(drift * 1000)).to(torch.int8))


@pytest.mark.parametrize("scheme", ["int4-g8", "int3-channel", "int8-channel"])
def test_codes_at_the_edges_are_probed_and_come_back_bit_for_bit(scheme: str) -> None:
    tuner = tuner_of(scheme, lr=0.0, eps=0.5)
    for i, block in enumerate(tuner.space):
        assert isinstance(block, CodeBlock)
        block.module.set_codes_(torch.full(block.shape, block.limits[i % 2], dtype=torch.int8))
    assert isinstance(tuner.evaluator, TorchEvaluator)
    before = digest(tuner.evaluator.model)
    for t in range(3):
        tuner.step(batch(6, t))
    assert digest(tuner.evaluator.model) == before


def test_the_gate_holds_a_code_and_the_residual_keeps_what_it_held() -> None:
    block = up_block()
    block.module.set_codes_(torch.full(block.shape, 7, dtype=torch.int8))
    state = run_rule(ErrorFeedback(0.5), block, torch.full(block.shape, -1.2), 1)
    assert torch.equal(block.value(), torch.full(block.shape, 7, dtype=torch.int8))
    assert torch.equal(state["residual"], torch.full(block.shape, -1.2))


def test_a_residual_drawn_again_is_the_stored_one() -> None:
    """While the run is younger than the window, at constant lr, with no code at an edge: equal
    codes, bit for bit; with a short window they part."""
    runs = {}
    for name, options in {
        "stored": {},
        "rebuilt": {"residual": "rebuilt", "window": STEPS},
        "short": {"residual": "rebuilt", "window": 1},
    }.items():
        tuner = tuner_of("int8-channel", lr=0.2, **options)
        for b in tuner.space:
            assert isinstance(b, CodeBlock)
            b.module.set_codes_(b.value().clamp(-60, 60))
        for t in range(STEPS):
            tuner.step(batch(6, t))
        assert all(float(c.abs().max()) < 100 for c in values(tuner).values())
        assert tuner.kept_bytes == (4 * tuner.space.numel if name == "stored" else 0)
        runs[name] = values(tuner)
    for b in runs["stored"]:
        assert torch.equal(runs["stored"][b], runs["rebuilt"][b])
    assert any(not torch.equal(runs["stored"][b], runs["short"][b]) for b in runs["stored"])


def test_few_codes_are_probed_and_e_f_delta_is_a_share_of_the_gradient() -> None:
    """P(u != 0) = sigma sqrt(2 / pi) within 2 %; the same share is E[u u^T] / sigma."""
    block, sigma = up_block("int8-channel"), 0.01
    draws = 1_500_000 // block.numel
    u = WholeSteps(sigma).draw_lanes([Key(SEED, step=t) for t in range(draws)], block).flatten(1)
    share = sigma * math.sqrt(2 / math.pi)
    assert float((u != 0).float().mean()) == pytest.approx(share, rel=0.02)
    assert set(u.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert abs(float(u.mean())) < 4 * math.sqrt(share / u.numel())
    assert float(u.square().mean()) / sigma == pytest.approx(0.80, rel=0.02)
    part = WholeSteps(0.3).draw(Key(0), block, 3, 9)
    assert torch.equal(part, WholeSteps(0.3).draw(Key(0), block)[3:9])


def test_fitness_is_normalised_over_the_whole_population() -> None:
    told = Population(eps=0.5, queries=2).tell(Key(0), Losses.of([1.0, 2.0, 5.0, 4.0]))
    std = math.sqrt(2.5)
    assert told.coefficients == pytest.approx((-1 / std, 1 / std))
    scaled = Population(eps=0.5, queries=2).tell(Key(0), Losses.of([10.0, 20.0, 50.0, 40.0]))
    assert scaled.coefficients == pytest.approx(told.coefficients)
    even = Population(queries=2).tell(Key(0), Losses.of([1.0] * 4))
    assert even.coefficients == (0.0, 0.0)
    bad = Population(queries=2).tell(Key(0), Losses.of([1.0, math.inf, 1.0, 1.0]))
    assert not bad.finite


def test_refusals() -> None:
    model = small(0, "int4-g8")
    for space, message in (
        ("norms", "use 'codes'"), ("codes + norms", "use 'codes'"),
        ("codes(eps=0.5)", "its own eps or lr"), ("codes(lr=0.5)", "its own eps or lr"),
    ):  # fmt: skip
        built = spaces.parse(space).build(model)
        with pytest.raises(BadInput, match=message):
            Tuner(built, methods.get("qes"), 0)  # type: ignore[arg-type]
    for bad, message in (
        ({"gamma": 1.5}, "gamma"), ({"residual": "none"}, "residual"), ({"window": 0}, "past"),
        ({"residual": "rebuilt", "schedule": "linear"}, "residual='stored'"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=message):
            methods.get("qes", **bad)
