"""What probes of fake-quantized layers see, and what they leave alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import toys
from torch import Tensor, nn

from zotune import methods
from zotune.core import spaces
from zotune.core.evaluator import TorchEvaluator
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.core.probe import Probe
from zotune.core.space import Space
from zotune.core.step import Tuner
from zotune.errors import BadInput
from zotune.quant import quantize_model_
from zotune.quant.calibrate.folding import folding
from zotune.quant.qat import attach_, fake_layers, fake_quantize_, freeze_, search

KEY = Key(3)


def loss_of(model: nn.Module) -> float:
    with torch.no_grad():
        return float(toys.cross_entropy(model, toys.batch())[0].double().mean())


def bound(model: nn.Module, text: str) -> Space:
    space = spaces.parse(text).build(model)
    space.bind_(1.0, 1.0, "relative")
    return space


@pytest.mark.parametrize("scheme", ["int2-g8-asym", "int4-channel"])
@pytest.mark.parametrize("step", [0.6, -0.6])
def test_a_probe_sees_the_loss_of_rounded_moved_weights(scheme: str, step: float) -> None:
    """L(Q(W + eps u)) of a plain model whose float weights were moved before it was quantized; a
    straight-through shortcut, L(W + eps u) or L(Q(W) + eps u), is another number."""
    model = toys.small()
    fake_quantize_(model, scheme, exclude=("head",))
    space = bound(model, "latents")
    evaluator = TorchEvaluator(model, space, toys.cross_entropy)
    seen = evaluator.losses([Probe(KEY, step)], toys.batch(), Gaussian()).mean[0]

    def moved(base: nn.Module) -> nn.Module:
        for block in space:
            away = step * block.unit * Gaussian().draw(KEY, block)
            base.get_parameter(block.name).add_(away)
        return base

    rounded = moved(toys.small())
    quantize_model_(rounded, scheme, exclude=("head",))
    assert abs(float(seen) - loss_of(rounded)) <= 1e-6
    through = loss_of(moved(toys.small()))
    grid_then_moved = toys.small()
    with torch.no_grad():
        for name, layer in fake_layers(model).items():
            grid_then_moved.get_parameter(f"{name}.weight").copy_(layer.weight_seen()[0])
    shortcut = loss_of(moved(grid_then_moved))
    assert min(abs(through - float(seen)), abs(shortcut - float(seen))) > 1e-4


@pytest.mark.parametrize("case", [c for c in toys.CASES if c.fake], ids=str)
def test_stacked_points_are_each_what_the_model_gives_alone(case: toys.Case) -> None:
    model = case.model()
    space = case.build(model)
    space.bind_(1.0, 1.0, "relative")
    probes = [Probe(KEY, 0.05), Probe(KEY, -0.05), Probe(KEY, 0.0)]
    fast = TorchEvaluator(model, space, toys.cross_entropy)
    slow = TorchEvaluator(model, space, toys.cross_entropy, stack=1, fast=False)
    found = [e.losses(probes, toys.batch(), Gaussian()).per_example for e in (fast, slow)]
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.parametrize("text", ["latents", "clipping", "transforms", "activations"])
def test_each_space_moves_its_own_tensors_and_no_others(text: str) -> None:
    model = toys.faked(scheme="int3-g8-a4")
    for layer in fake_layers(model).values():
        layer.input_clip.fill_(math.log(0.4))  # type: ignore[union-attr]
    space = spaces.parse(text).build(model)
    own = {id(owner.tensor) for block in space for owner in block.owners}
    before = {name: tensor.clone() for name, tensor in toys.tensors_of(model).items()}
    evaluator = TorchEvaluator(model, space, toys.cross_entropy)
    method = methods.get("mezo", lr=0.02, eps=0.05, units="relative", queries=8)
    tuner = Tuner(space, method, 0, evaluator=evaluator, total=3)
    for _ in range(3):
        tuner.step(toys.batch())
    changed = {
        id(tensor)
        for name, tensor in toys.tensors_of(model).items()
        if not torch.equal(tensor, before[name])
    }
    assert changed == own


def test_layers_that_share_an_input_share_one_transform() -> None:
    model = toys.llama()
    found = folding(model)
    fake_quantize_(model, "int4-channel")
    attach_(model, found.folds)
    space = spaces.parse("transforms(pattern='q_proj')").build(model)
    assert [block.name for block in space] == [
        f"model.layers.{k}.self_attn.q_proj.log_scale" for k in range(2)
    ]
    names = [owner.path.split(".")[-1] for owner in space.blocks[0].owners]
    assert names == ["q_proj", "k_proj", "v_proj"]


def test_the_light_variant_leaves_all_other_codes_as_they_are() -> None:
    model = toys.llama()
    fake_quantize_(model, "int3-channel-asym")
    chosen = spaces.parse(r"latents(pattern='(q_proj|v_proj)\.weight')").build(model)
    kept = [block.owners[0].path for block in chosen]
    frozen = freeze_(model, kept)
    codes = {name: model.get_submodule(name).codes.clone() for name in frozen}  # type: ignore[union-attr,operator]
    before = {name: copy.deepcopy(layer.weight) for name, layer in fake_layers(model).items()}
    space = spaces.parse("latents + clipping").build(model)
    tuner = Tuner(
        space, methods.get("mezo", lr=0.05, eps=0.1, units="relative"), 0, total=5,
        evaluator=TorchEvaluator(model, space, toys.cross_entropy),
    )  # fmt: skip
    for _ in range(5):
        tuner.step(toys.batch())
    now = {name: model.get_submodule(name).codes for name in frozen}
    assert all(torch.equal(codes[name], now[name]) for name in codes)  # type: ignore[arg-type]
    after = {name: layer.weight for name, layer in fake_layers(model).items()}
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert len(kept) == 4


def test_thresholds_stay_within_their_bounds_however_far_they_are_probed() -> None:
    model = toys.faked(scheme="int3-channel")
    space = bound(model, "clipping")
    evaluator = TorchEvaluator(model, space, toys.cross_entropy)
    losses = evaluator.losses([Probe(KEY, 1e3), Probe(KEY, -1e3)], toys.batch(), Gaussian())
    assert bool(losses.mean.isfinite().all())


def test_models_without_such_blocks_are_refused_in_words() -> None:
    for name in ("latents", "clipping", "transforms", "activations"):
        with pytest.raises(BadInput, match="prepare it with `zotune quantize --method zeroqat`"):
            spaces.parse(name).build(toys.small())
    model = toys.small()
    fake_quantize_(model, "int4-g8")
    with pytest.raises(BadInput, match="shares a transform"):
        spaces.parse("transforms").build(model)
    with pytest.raises(BadInput, match="no rounded activations to tune; use a scheme"):
        spaces.parse("activations").build(toys.faked(scheme="int4-g8"))


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return toys.logits_of(model, toys.batch()["input_ids"])


def test_without_rounding_the_tuned_transforms_still_change_nothing() -> None:
    model = toys.faked().double()
    wanted = outputs(toys.small().double())
    space = spaces.parse("transforms").build(model)
    tuner = Tuner(
        space, methods.get("mezo", lr=0.3, eps=0.1, units="relative"), 0, total=5,
        evaluator=TorchEvaluator(model, space, toys.cross_entropy),
    )  # fmt: skip
    for _ in range(5):
        tuner.step(toys.batch())
    assert bool(fake_layers(model)["up"].log_scale.any())  # type: ignore[union-attr]
    with search.exact(model):
        assert float((outputs(model) - wanted).abs().max()) <= 1e-10
