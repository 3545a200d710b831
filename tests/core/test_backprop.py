"""The backprop baseline is torch's own AdamW. Run: pytest tests/core/test_backprop.py"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import CASES, Case, batch, cross_entropy, digest, gpt2, observe, small

from zotune.core import nouns, spaces
from zotune.core.backprop import Backprop, BackpropTuner
from zotune.core.evaluator import TorchEvaluator
from zotune.core.method import Schedule
from zotune.core.spaces import Scales
from zotune.errors import BadInput

FLOAT = [c for c in CASES if "codes" not in c.space]


def tuner_of(
    model: nn.Module, space: str, method: Backprop, total: int = 10, **options: Any
) -> BackpropTuner:
    built = spaces.parse(space).build(model, observe)
    evaluator = TorchEvaluator(model, built, cross_entropy, **options)
    return BackpropTuner(built, method, evaluator, total)


@pytest.mark.parametrize("make", [small, gpt2], ids=["small", "gpt2-tied"])
def test_full_tuning_is_torchs_adamw_step_for_step(make: Any) -> None:
    ours, theirs = make(), make().requires_grad_(True)
    method = Backprop(lr=0.01, weight_decay=0.1, clip=0.5, schedule=Schedule("linear", 1))
    tuner = tuner_of(ours, "weights", method, total=5)
    decays = {b.name: b.decay for b in tuner.gradient.blocks}
    groups = [
        {"params": [p], "weight_decay": 0.1 * decays[n]} for n, p in theirs.named_parameters()
    ]
    truth = torch.optim.AdamW(groups, lr=0.01)
    for t in range(5):
        report = tuner.step(batch(4, t))
        loss, _ = cross_entropy(theirs, batch(4, t))
        for group in truth.param_groups:
            group["lr"] = 0.01 * method.schedule.factor(t, 5)
        truth.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(list(theirs.parameters()), 0.5)
        truth.step()
        assert report.loss == pytest.approx(loss.mean().item(), rel=1e-5)
    for name, parameter in theirs.named_parameters():
        # Adam divides tiny gradients by their own size: compare in units of the learning rate.
        assert torch.allclose(ours.get_parameter(name), parameter, rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("case", FLOAT, ids=str)
def test_the_loss_falls_on_every_float_space(case: Case) -> None:
    model = case.model()
    tuner = tuner_of(model, case.space, Backprop(lr=0.02), total=30)
    losses = [tuner.step(batch(16, 0)).loss for _ in range(30)]
    assert losses[-1] < losses[0] - 0.01


def test_frozen_weights_get_no_gradient_and_only_the_space_moves() -> None:
    model = small().requires_grad_(True)
    before = digest(model)
    tuner = tuner_of(model, "norms", Backprop(lr=0.02))
    tuner.step(batch(4))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    changed = {n for n, d in digest(model).items() if d != before[n]}
    assert changed == {"norm.weight", "norm.bias"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_steps_add_up_in_sixteen_bit_weights(dtype: torch.dtype) -> None:
    model = small().to(dtype)
    nn.init.constant_(model.head.bias, 1.0)
    tuner = tuner_of(
        model, "weights(pattern='head.bias')", Backprop(lr=1e-4, clip=0.0), total=10**9
    )
    for _ in range(100):
        tuner.step(batch(8, 0))
    # Adam moves each element by about lr a step: 1e-2 in all, from steps below the spacing at 1.
    assert float((model.head.bias - 1).abs().max()) > 5e-3


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_give_the_gradient_of_the_whole_batch(micro: int) -> None:
    def weighted(model: nn.Module, here: Any) -> tuple[Tensor, Tensor]:
        loss, _ = cross_entropy(model, here)
        return loss, (here["label"] + 1).float()

    models = [small(), small()]
    losses = []
    for model, size in zip(models, (None, micro), strict=True):
        space = spaces.get("weights").build(model)
        evaluator = TorchEvaluator(model, space, weighted, micro_batch=size)
        tuner = BackpropTuner(space, Backprop(lr=0.01), evaluator, 5)
        losses.append([tuner.step(batch(5, t)).loss for t in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_blocks_with_an_own_lr_move_by_it() -> None:
    model = small()
    before = copy.deepcopy(model)
    tuner = tuner_of(model, "head(lr=0.05) + weights(pattern='up')", Backprop(lr=0.01))
    tuner.step(batch(8))
    assert float((model.head.weight - before.head.weight).abs().max()) == pytest.approx(
        0.05, rel=1e-3
    )
    assert float((model.up.weight - before.up.weight).abs().max()) == pytest.approx(0.01, rel=1e-3)


def test_scales_stay_positive() -> None:
    model = small(0, "int4-g8")
    space = Scales().build(model)
    tuner = BackpropTuner(space, Backprop(lr=1.0), TorchEvaluator(model, space, cross_entropy), 3)
    tuner.step(batch(4))
    assert all(float(b.value().min()) > 0 for b in space)


def test_a_loss_that_is_not_finite_moves_nothing() -> None:
    model = small()
    before = digest(model)
    space = spaces.get("weights").build(model)

    def broken(model: nn.Module, here: Any) -> tuple[Tensor, Tensor]:
        loss, weight = cross_entropy(model, here)
        return loss * math.nan, weight

    tuner = BackpropTuner(space, Backprop(lr=1.0), TorchEvaluator(model, space, broken), 3)
    report = tuner.step(batch(4))
    assert not report.applied
    assert (tuner.done, tuner.applied) == (1, 0)
    assert digest(model) == before


def test_resuming_in_the_middle_is_bitwise() -> None:
    method = Backprop(lr=0.01, schedule=Schedule("linear"))
    straight, broken = small(), small()
    tuner = tuner_of(straight, "weights", method, total=6)
    for t in range(6):
        tuner.step(batch(4, t))
    first = tuner_of(broken, "weights", method, total=6)
    for t in range(3):
        first.step(batch(4, t))
    saved = {k: v.clone() for k, v in first.state_tensors().items()}
    fresh = small(seed=9)
    second = tuner_of(fresh, "weights", method, total=6)
    second.load_(saved, 3, 3)
    for t in range(3, 6):
        second.step(batch(4, t))
    assert digest(fresh) == digest(straight)


def test_what_has_no_gradient_is_refused() -> None:
    model = small(0, "int4-g8")
    with pytest.raises(BadInput, match="integer codes have no gradient"):
        tuner_of(model, "codes", Backprop())

    def score(model: nn.Module, here: Any) -> tuple[Tensor, Tensor]:
        return torch.ones(here.size), torch.ones(here.size)

    space = Scales().build(model)
    tuner = BackpropTuner(space, Backprop(), TorchEvaluator(model, space, score), 3)
    with pytest.raises(BadInput, match="no gradient"):
        tuner.step(batch(4))


def test_the_record_is_rebuilt_from_its_repr() -> None:
    method = Backprop("lora", 1e-3, weight_decay=0.1, schedule=Schedule("cosine", 3))
    assert eval(repr(method), vars(nouns).copy()) == method
    assert method.but(lr=0.5).lr == 0.5
