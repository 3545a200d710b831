"""MeZO-SVRG: estimates corrected at an anchor, whose own estimate is drawn again, not kept.

Run: pytest tests/methods/test_mezo_svrg.py
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from restated import Restated, exact
from training import lab

from zotune import methods
from zotune.core import spaces
from zotune.core.evaluator import FunctionEvaluator, TorchEvaluator
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.core.space import Space, tensors
from zotune.core.step import Tuner
from zotune.errors import BadInput
from zotune.tasks.batch import Batch
from zotune.training import train

STEPS, EVERY, MANY = 13, 4, 3
PAPER = {"lr": 0.05, "eps": 1e-3, "every": EVERY, "batches": MANY, "share": 0.4}


def svrg(**options: Any) -> Any:
    return methods.get("mezo-svrg", **{**PAPER, **options})


def fed(t: int) -> Batch | list[Batch]:
    """What a run feeds step t with."""
    return toys.batch(6, t) if t % EVERY else [toys.batch(6, t + k) for k in range(MANY)]


@pytest.mark.parametrize("queries", [1, 3])
def test_mezo_svrg_restated(queries: int) -> None:
    lr, eps, decay = PAPER["lr"], PAPER["eps"], 0.1
    paper = Restated()
    anchor = {n: p.clone() for n, p in paper.theta.items()}
    g = {n: torch.zeros_like(p) for n, p in paper.theta.items()}

    def slope(t: int, u: Any) -> float:
        return (paper.loss(t, u, eps) - paper.loss(t, u, -eps)) / (2 * eps)

    for t in range(STEPS):
        us = [paper.direction(Gaussian(), paper.key(t, j)) for j in range(queries)]
        here = {n: p.clone() for n, p in paper.theta.items()}
        if t % EVERY == 0:
            anchor = here
            c = [sum(slope(t + k, u) for k in range(MANY)) / MANY for u in us]
            g = {n: sum(a * u[n] for a, u in zip(c, us, strict=True)) / queries for n in here}
            step, rate = g, lr
        else:
            c = [slope(t, u) for u in us]
            paper.move_({n: anchor[n] - p for n, p in here.items()})
            c = [a - slope(t, u) for a, u in zip(c, us, strict=True)]
            paper.move_({n: p - anchor[n] for n, p in here.items()})
            mean = {n: sum(a * u[n] for a, u in zip(c, us, strict=True)) / queries for n in here}
            step, rate = {n: mean[n] + g[n] for n in here}, PAPER["share"] * lr
        for n, p in paper.theta.items():
            p.sub_(rate * decay * p * paper.blocks[n].decay)
        paper.move_(step, -rate)
    evaluator = TorchEvaluator(paper.tuned, paper.space, exact)
    method = svrg(queries=queries, weight_decay=decay)
    tuner = Tuner(paper.space, method, paper.seed, evaluator=evaluator, total=STEPS)
    for t in range(STEPS):
        assert tuner.now.batches == (1 if t % EVERY else MANY)
        assert tuner.step(fed(t)).applied
    assert paper.apart() < 1e-4
    for block in paper.space:
        kept = block.memory["anchor"].double()
        torch.testing.assert_close(kept, anchor[block.name], rtol=1e-4, atol=1e-5)


def test_a_copy_of_what_is_tuned_is_kept_and_no_estimate() -> None:
    model = toys.small()
    space = spaces.get("weights").build(model)
    tuner = Tuner(space, svrg(queries=2), 0)
    assert tuner.kept_bytes == 4 * space.numel + (2 * 8 + 8) * len(space.blocks)
    assert tuner.replayable


@pytest.mark.parametrize("name", methods.entries()["mezo-svrg"].spaces)
@pytest.mark.parametrize("units", ["relative", "absolute"])
def test_the_probes_behind_the_first_ones_lie_around_the_anchor(name: str, units: str) -> None:
    """For every space, in runs of rows as well as whole, and far from the anchor."""
    scheme = {"scales": "int4-g8", "zeros": "int4-g8-asym"}.get(name)
    options = "(rank=2)" if name == "adapter" else "(targets='up|down')" if name == "lora" else ""
    rounding = name in ("latents", "clipping", "transforms", "activations")
    model = toys.faked() if rounding else toys.small(scheme=scheme)
    space = spaces.parse(f"{name}{options}").build(model, toys.observe)
    eps = 1e-2
    tuner = Tuner(space, svrg(eps=eps, queries=2, units=units), 0)
    tuner.done = 1
    law, probes = tuner.now.perturbation, tuner.ask()
    for block in space:
        anchor = block.value().double()
        block.move_(0, block.rows, 0.3 * torch.ones(block.shape) * block.stride, Key(5))
        for probe, (j, sign) in zip(probes[4:], [(0, 1), (0, -1), (1, 1), (1, -1)], strict=True):
            z = Gaussian().draw(Key(0, step=1, query=j), block).double()
            u = law.draw(probe.key, block)
            near = anchor + sign * eps * z * block.reach
            near = near.clamp_min(getattr(block, "minimum", None) or -math.inf)
            torch.testing.assert_close(block.at(u, probe.step).double(), near, rtol=1e-4, atol=1e-5)
            parts = [law.draw(probe.key, block, i, i + 1) for i in range(block.rows)]
            assert torch.equal(torch.cat([p.view(-1) for p in parts]), u.view(-1))
            if isinstance(block.reach, float):
                some = [block.rows - 1, 0]
                assert torch.equal(law.draw_rows(probe.key, block, some), u[some])


def quadratic(space: Space) -> FunctionEvaluator:
    """|x|^2 / 2 + b x: a batch b, or the mean of several, moves the gradient and nothing else."""

    def loss(values: dict[str, torch.Tensor], batch: Any) -> float:
        x = values["x"].double()
        if batch is None:
            return math.nan
        return float(x @ x / 2 + x @ batch)

    return FunctionEvaluator(space, loss)


def test_what_batches_differ_by_cancels() -> None:
    """Whatever batch a step between anchors sees, it moves by the anchor's batch alone."""

    def end(seed: int, name: str) -> torch.Tensor:
        (block,) = space = tensors({"x": torch.ones(8)})
        generator = torch.Generator().manual_seed(seed)
        method = svrg(lr=0.02, share=1.0) if name == "mezo-svrg" else methods.get("mezo", lr=0.02)
        tuner = Tuner(space, method, 0, evaluator=quadratic(space))
        for t in range(EVERY):
            b = torch.randn(8, generator=generator, dtype=torch.float64)
            tuner.step(b if t else torch.full((8,), 0.5, dtype=torch.float64))
        return block.value()

    torch.testing.assert_close(end(1, "mezo-svrg"), end(2, "mezo-svrg"), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(end(1, "mezo"), end(2, "mezo"), rtol=0.1)


def test_an_anchor_whose_loss_is_not_finite_leaves_the_one_before_it_whole() -> None:
    (block,) = space = tensors({"x": torch.ones(8)})
    tuner = Tuner(space, svrg(lr=0.02), 0, evaluator=quadratic(space))
    zero = torch.zeros(8, dtype=torch.float64)
    for _ in range(EVERY):
        tuner.step(zero)
    kept = {k: v.clone() for k, v in block.memory.items()}
    assert not tuner.step(None).applied
    tuner.step(zero)
    assert all(torch.equal(kept[k], v) for k, v in block.memory.items())
    assert int(kept["step"]) == 0


def test_a_run_measures_its_anchors_on_several_batches(tmp_path: Path) -> None:
    result = train(lab.config(tmp_path / "run", "svrg"), model=toys.small(), task=lab.task())
    anchors, others = 4, 8
    assert result.forwards == 2 * anchors * 2 + others * 4
    sizes: list[int] = []

    def seen(model: Any, batch: Batch) -> Any:
        sizes.append(batch.size)
        return toys.cross_entropy(model, batch)

    from zotune.training.objective import Objective

    task = Objective(seen, lab.rows(), lab.rows(12))
    config = lab.config(tmp_path / "again", "svrg", stack=1, check_gradient=3)
    train(config, model=toys.small(), task=task)
    assert sizes.count(4) >= anchors * 2 * 2 + others * 4


@pytest.mark.parametrize(
    ("text", "space", "message"),
    [("mezo-svrg(every=1)", "weights", "every=1; want at least 2"),
     ("mezo-svrg(batches=0)", "weights", "batches=0; want at least 1"),
     ("mezo-svrg", "head(exact=True)", "drop exact=True"),
     ("mezo-svrg", "codes", "or tune scales")],
)  # fmt: skip
def test_what_it_cannot_do_is_refused_first(text: str, space: str, message: str) -> None:
    model = toys.small(scheme="int8-channel" if space == "codes" else None)
    with pytest.raises(BadInput, match=message):
        Tuner(spaces.parse(space).build(model), methods.parse(text), 0)  # type: ignore[arg-type]
