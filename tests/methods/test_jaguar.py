"""JAGUAR: patches, the momentum of what was probed, both updates restated.

Run: pytest tests/methods/test_jaguar.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from restated import Restated, exact
from torch import Tensor
from toys import batch, digest, float_block, small

from zotune import methods
from zotune.core import spaces
from zotune.core.evaluator import TorchEvaluator
from zotune.core.method import Method
from zotune.core.noise import Key
from zotune.core.step import Tuner
from zotune.errors import BadInput
from zotune.methods.jaguar import Patch, PatchMomentum

STEPS = 20


@given(shape=st.lists(st.integers(1, 40), max_size=3).map(tuple), share=st.floats(0.01, 1))
def test_a_patch_is_a_share_of_rows_times_a_share_of_columns(
    shape: tuple[int, ...], share: float
) -> None:
    law, block, key = Patch(share), float_block("w", *shape), Key(3, step=1)
    u = law.draw(key, block)
    assert u.shape == shape
    assert set(u.unique().tolist()) <= {0.0, 1.0}
    flat = u.reshape(block.rows, -1)
    sizes = [max(1, int(share * n)) for n in flat.shape]
    assert [int((flat.sum(d) > 0).sum()) for d in (1, 0)] == sizes
    assert int(u.sum()) == sizes[0] * sizes[1]  # so it is their product, every entry of it
    if shape:
        cut = block.rows // 2
        parts = [law.draw(key, block, 0, cut), law.draw(key, block, cut)]
        assert torch.equal(torch.cat(parts), u)
        rows = [block.rows - 1, 0]
        assert torch.equal(law.draw_rows(key, block, rows), u[rows])


def test_every_entry_is_probed_equally_often_and_patches_change() -> None:
    block, draws = float_block("w", 10, 20), 4000
    u = torch.stack([Patch(0.2).draw(Key(1, step=t), block) for t in range(draws)])
    error = (0.04 * 0.96 / draws) ** 0.5
    assert float((u.mean(0) - 0.04).abs().max()) < 5 * error
    other = torch.stack([Patch(0.2).draw(Key(1, step=t), float_block("v", 10, 20))
                         for t in range(draws)])  # fmt: skip
    assert abs(float((u * other).mean()) - 0.04**2) < 5 * 0.04**2  # blocks choose apart
    assert abs(float((u[:-1] * u[1:]).mean()) - 0.04**2) < 5 * 0.04**2


def orthogonal(m: Tensor) -> Tensor:
    """Muon's iteration in float64; zeros stay, a vector is divided by its norm."""
    x = m / max(float(m.norm()), 1e-30)
    for _ in range(5 if m.dim() == 2 else 0):
        x = 3.4445 * x - 4.7750 * x @ x.mT @ x + 2.0315 * x @ x.mT @ x @ x.mT @ x
    return x


@pytest.mark.parametrize("update", ["sign", "muon"])
def test_twenty_steps_are_the_papers_in_float64(update: Any) -> None:
    lr, eps, b1, share = 2e-3 if update == "sign" else 0.05, 1e-3, 0.8, 0.3
    paper, law = Restated("weights"), Patch(share)
    m = {n: torch.zeros(b.shape).double() for n, b in paper.blocks.items()}
    for t in range(STEPS):
        S = {n: u > 0 for n, u in paper.direction(law, paper.key(t)).items()}
        u = {n: s.double() for n, s in S.items()}
        c = (paper.loss(t, u, eps) - paper.loss(t, u, -eps)) / (2 * eps)
        for n, s in S.items():
            m[n][s] = b1 * m[n][s] + (1 - b1) * c
        paper.move_({n: m[n].sign() if update == "sign" else orthogonal(m[n]) for n in m}, -lr)
    assert any(bool((x == 0).any()) for x in m.values())  # some entries were never probed
    method = methods.get(
        "jaguar", lr=lr, eps=eps, b1=b1, share=share, update=update, schedule="constant"
    )
    tuner = paper.tune(method, STEPS)
    assert paper.apart() < (1e-6 if update == "sign" else 1e-4)
    assert tuner.kept_bytes == 4 * paper.space.numel


def test_what_is_not_probed_keeps_its_momentum_and_moves_by_it() -> None:
    block, rule = float_block("w", 4), PatchMomentum(b1=0.5)
    state = rule.state(block, block.shape)
    steps = []
    for g in ([8.0, 0.0, -4.0, 0.0], [0.0, 0.0, 12.0, 2.0]):
        steps.append(rule.step(lambda k, g=g: torch.tensor(g), state, 1, 0.1, block, 0))
    assert state["m"].tolist() == [4.0, 0.0, 5.0, 1.0]
    assert torch.equal(torch.stack(steps).sign(), torch.tensor([[1.0, 0, -1, 0], [1, 0, 1, 1]]))
    assert torch.equal(steps[1].abs(), 0.1 * torch.tensor([1.0, 0, 1, 1]))


@pytest.mark.parametrize("update", ["sign", "muon"])
def test_it_resumes_bitwise_in_the_middle(update: Any) -> None:
    method = methods.get("jaguar", lr=0.01, eps=0.01, update=update, queries=2)
    assert isinstance(method, Method)

    def tuner() -> tuple[Any, Tuner]:
        model = small()
        space = spaces.get("weights").build(model)
        return model, Tuner(space, method, 1, evaluator=TorchEvaluator(model, space, exact))

    (model, straight), (resumed, again) = tuner(), tuner()
    for t in range(3):
        straight.step(batch(4, t))
    again.load_({k: v.clone() for k, v in straight.state_tensors().items()}, 3, 3)
    for t in range(3, 6):
        straight.step(batch(4, t))
        again.step(batch(4, t))
    assert digest(model) == digest(resumed)


@pytest.mark.parametrize("options", [{"share": 0.0}, {"share": 1.1}, {"b1": 1.0},
                                     {"update": "adam"}])  # fmt: skip
def test_what_it_cannot_do_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="want"):
        methods.get("jaguar", **options)
