"""ConMeZO: the update restated, the cone's geometry, what it remembers.

Run: pytest tests/methods/test_conmezo.py
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from restated import Restated, exact
from torch import Tensor
from toys import batch, cosine, digest, float_block, small

from zotune import methods
from zotune.core import spaces
from zotune.core.estimator import Estimate
from zotune.core.evaluator import TorchEvaluator
from zotune.core.method import Method
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.core.space import Space
from zotune.core.step import Tuner
from zotune.errors import BadInput
from zotune.methods.conmezo import Cone

STEPS = 20


@pytest.mark.parametrize(("queries", "narrow"), [(1, 0), (1, 8), (3, 8)])
def test_twenty_steps_are_the_formula_in_float64(queries: int, narrow: int) -> None:
    lr, eps, angle, b = 0.02, 1e-3, 1.1, 0.8
    paper = Restated("weights")
    m = {n: torch.zeros(block.shape).double() for n, block in paper.blocks.items()}
    d = sum(x.numel() for x in m.values())
    for t in range(STEPS):
        a = math.pi / 2 - (math.pi / 2 - angle) * (min(1, t / narrow) if narrow else 1)
        norm = math.sqrt(sum(float(x.square().sum()) for x in m.values()))
        g = {n: torch.zeros_like(x) for n, x in m.items()}
        for key in (paper.key(t, j) for j in range(queries)):
            u = paper.direction(Gaussian(), key)
            if t:
                u = {n: math.cos(a) * math.sqrt(d) / norm * m[n] + math.sin(a) * u[n] for n in u}
            c = (paper.loss(t, u, eps) - paper.loss(t, u, -eps)) / (2 * eps)
            g = {n: g[n] + c / queries * u[n] for n in u}
        m = {n: b * m[n] + (1 - b) * g[n] for n in m}
        paper.move_(g, -lr)
    method = methods.get(
        "conmezo", lr=lr, eps=eps, angle=angle, b1=b, narrow=narrow, queries=queries
    )
    tuner = paper.tune(method, STEPS)
    assert paper.apart() < 1e-5
    assert tuner.kept_bytes == 4 * d + 8 * len(paper.blocks)


def learned(law: Cone, *shapes: tuple[int, ...]) -> Space:
    """A space whose memory has seen one step of given coefficients."""
    space = Space(float_block(f"b{i}", *shape) for i, shape in enumerate(shapes))
    for block in space:
        block.memory.update(law.state(block))
    key = Key(7)
    law.learn_(space, Estimate(key, (key, key.fold(query=1)), (2.0, -3.0), 0.0))
    return space


def all_of(law: Cone, key: Key, space: Space) -> Tensor:
    return torch.cat([law.draw(key, b).double().flatten() for b in space])


@pytest.mark.parametrize("angle", [0.3, 1.35, math.pi / 2])
def test_directions_lie_on_the_cone_and_are_as_long_as_gaussian_ones(angle: float) -> None:
    law = Cone(angle, narrow=0)
    space = learned(law, (60, 50), (80,), ())
    m = torch.cat([b.memory["m"].double().flatten() for b in space])
    d = len(m)
    for t in range(1, 5):
        u = all_of(law, Key(1, step=t), space)
        assert cosine(u, m) == pytest.approx(math.cos(angle), abs=5 / math.sqrt(d))
        assert float(u.norm()) / math.sqrt(d) == pytest.approx(1, abs=5 / math.sqrt(d))
    # Not block by block: one small block may lie far from the cone of the whole.
    lengths = [float(b.memory["m"].norm() * b.memory["gain"]) / b.numel**0.5 for b in space]
    assert max(lengths) / min(lengths) > 1.01


def test_any_rows_are_rows_of_the_whole() -> None:
    law = Cone(0.8, narrow=0)
    block = learned(law, (9, 4)).blocks[0]
    key = Key(1, step=2, lane=1)
    whole = law.draw(key, block)
    parts = [law.draw(key, block, 0, 4), law.draw(key, block, 4)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(law.draw_rows(key, block, [8, 0]), whole[[8, 0]])
    g = law.combine([key, key.fold(query=1)], [2.0, -1.0], block, 3, 8)
    wanted = 2 * whole[3:8] - law.draw(key.fold(query=1), block, 3, 8)
    assert torch.allclose(g, wanted, atol=1e-5)


def test_without_a_momentum_it_is_mezo() -> None:
    law, block = Cone(0.5, narrow=0), float_block("w", 4, 3)
    block.memory.update(law.state(block))
    assert torch.equal(law.draw(Key(1), block), Gaussian().draw(Key(1), block))
    space = Space([block])
    law.learn_(space, Estimate(Key(1), (Key(1),), (0.0,), 0.0))  # a plateau leaves no direction
    assert torch.equal(law.draw(Key(2), block), Gaussian().draw(Key(2), block))


def test_the_angle_narrows_from_a_right_one() -> None:
    law = Cone(1.35, narrow=4)
    assert [law.angle_at(t) for t in (0, 2, 4, 99)] == pytest.approx(
        [math.pi / 2, (math.pi / 2 + 1.35) / 2, 1.35, 1.35]
    )


def test_it_resumes_bitwise_in_the_middle_and_skips_what_is_not_finite() -> None:
    method = methods.get("conmezo", lr=0.05, eps=0.01, angle=0.9, narrow=5, queries=2)
    assert isinstance(method, Method)

    def tuner() -> tuple[Any, Tuner]:
        model = small()
        space = spaces.get("weights").build(model)
        return model, Tuner(space, method, 1, evaluator=TorchEvaluator(model, space, exact))

    (model, straight), (resumed, again) = tuner(), tuner()
    for t in range(3):
        straight.step(batch(4, t))
    again.load_({k: v.clone() for k, v in straight.state_tensors().items()}, 3, 3)
    before = {b.name: b.memory["m"].clone() for b in again.space}
    keys = tuple(again.key.fold(query=j) for j in range(2))
    for each in (straight, again):
        each.apply_(Estimate(again.key, keys, (float("nan"), 1.0), 0.0))
    assert all(torch.equal(b.memory["m"], before[b.name]) for b in again.space)
    for t in range(4, 7):
        straight.step(batch(4, t))
        again.step(batch(4, t))
    assert digest(model) == digest(resumed)


@pytest.mark.parametrize(
    "options", [{"angle": 0.0}, {"angle": 1.6}, {"b1": 1.0}, {"b1": -0.1}, {"narrow": -1}]
)
def test_what_it_cannot_do_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="want"):
        methods.get("conmezo", **options)
