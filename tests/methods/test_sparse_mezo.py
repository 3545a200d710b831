"""Sparse-MeZO restated: one mask for both probes and the step.

Run: pytest tests/methods/test_sparse_mezo.py
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from restated import Restated
from torch import Tensor
from toys import batch, cross_entropy, float_block, small

from zotune import methods
from zotune.core import spaces
from zotune.core.evaluator import TorchEvaluator
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.core.step import Tuner
from zotune.errors import BadInput
from zotune.methods.sparse_mezo import Small


def block_of(values: Tensor, share: float) -> Any:
    block = float_block("w", *values.shape)
    block.master.copy_(values)
    block.memory.update(Small(share).state(block))
    return block


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_the_smallest_share_of_a_block_is_probed_and_moved_however_it_is_drawn(
    share: float,
) -> None:
    values = Gaussian().draw(Key(8), float_block("v", 20, 15))
    block, law, key = block_of(values, share), Small(share), Key(1, step=2)
    u = law.draw(key, block)
    assert torch.equal(u != 0, values.abs() <= values.abs().quantile(share) + 1e-6)
    assert int((u != 0).sum()) == round(share * 300)
    assert torch.equal(u[u != 0], Gaussian().draw(key, block)[u != 0])  # not normalised
    assert torch.equal(torch.cat([law.draw(key, block, 0, 7), law.draw(key, block, 7)]), u)
    assert torch.equal(law.draw_rows(key, block, [3, 19]), u[[3, 19]])
    assert torch.equal(law.draw_lanes([key], block)[0], u)
    assert torch.allclose(law.combine([key], [2.0], block, 5, 20), 2 * u[5:])


@pytest.mark.parametrize("rows_at_once", [1 << 20, 1])
def test_both_probes_and_the_step_have_the_mask_of_the_unperturbed_weights(
    monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    """With an eps that carries most weights beyond the threshold, and row by row."""
    monkeypatch.setattr("zotune.core.moves.RUN", rows_at_once)
    model = small()
    space = spaces.parse("weights").build(model)
    method = methods.get("sparse-mezo", lr=1e-2, eps=3.0, share=0.5)
    tuner = Tuner(space, method, 3, evaluator=TorchEvaluator(model, space, cross_entropy))
    for t in range(3):
        before = {b.name: b.value().clone() for b in space}
        masks = {b.name: before[b.name].abs() <= b.memory["threshold"] for b in space}
        seen: dict[str, list[Tensor]] = {b.name: [] for b in space}
        for block in space:
            for step in (3.0, -3.0):
                moved = block.at(method.perturbation.draw(Key(3, step=t), block), step)
                seen[block.name].append(moved != before[block.name])
        assert tuner.step(batch(5, t)).applied
        for block in space:
            for changed in seen[block.name]:
                assert torch.equal(changed, masks[block.name])
            stepped = block.value() != before[block.name]
            assert not (stepped & ~masks[block.name]).any()
            assert int(stepped.sum()) > 0.9 * int(masks[block.name].sum())


def test_twenty_steps_are_the_papers_in_float64() -> None:
    lr, eps, share = 5e-3, 1e-3, 0.5
    paper = Restated("weights")
    h = {n: p.float().abs().flatten().sort().values[math.ceil(share * p.numel()) - 1]
         for n, p in paper.theta.items()}  # fmt: skip
    for t in range(20):
        z = paper.direction(Gaussian(), paper.key(t))
        u = {n: z[n] * (p.float().abs() <= h[n]) for n, p in paper.theta.items()}
        c = (paper.loss(t, u, eps) - paper.loss(t, u, -eps)) / (2 * eps)
        paper.move_(u, -lr * c)
    tuner = paper.tune(methods.get("sparse-mezo", lr=lr, eps=eps, share=share), 20)
    assert paper.apart() < 1e-5
    assert tuner.kept_bytes == 4 * len(paper.blocks)


def test_the_threshold_is_that_of_the_start_also_after_a_resume() -> None:
    method = methods.get("sparse-mezo", lr=0.1, eps=0.01, share=0.5)

    def tuner() -> Any:
        model = small()
        space = spaces.parse("weights").build(model)
        return Tuner(space, method, 3, evaluator=TorchEvaluator(model, space, cross_entropy))

    straight, resumed = tuner(), tuner()
    for t in range(4):
        straight.step(batch(4, t))
    for block in resumed.space:  # where a resumed run may stand when it is built
        block.load_(block.value() * 3)
    resumed = Tuner(resumed.space, method, 3, evaluator=resumed.evaluator)
    resumed.load_({k: v.clone() for k, v in straight.state_tensors().items()}, 4, 4)
    straight.step(batch(4, 4))
    resumed.step(batch(4, 4))
    for a, b in zip(straight.space, resumed.space, strict=True):
        assert torch.equal(a.value(), b.value())


def test_a_tensor_of_zeros_is_tuned_as_a_whole_and_that_is_said() -> None:
    model = small()
    model.head.bias.zero_()
    space = spaces.parse("head").build(model)
    tuner = Tuner(space, methods.get("sparse-mezo"), 3)
    assert tuner.notes == ["tuned as a whole, being zero: head.bias"]
    block = next(b for b in space if b.name == "head.bias")
    block.move_(0, 3, torch.ones(3), Key(0))
    assert bool((Small().draw(Key(0), block) != 0).all())


def test_codes_and_shares_beyond_one_are_refused() -> None:
    model = small(0, "int8-channel")
    with pytest.raises(BadInput, match="integer codes"):
        Small().check(spaces.parse("codes").build(model))
    for share in (0.0, 1.1):
        with pytest.raises(BadInput, match="0 < share <= 1"):
            methods.get("sparse-mezo", share=share)
