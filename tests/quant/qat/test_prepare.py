"""Transforms change nothing but the rounding, and the modules before take them up exactly."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.quant import QuantLinear
from zotune.quant.calibrate.folding import Fold, folding
from zotune.quant.qat import (
    attach_,
    fake_layers,
    fake_quantize_,
    folds_on,
    freeze_,
    quantize_,
    search,
)

OUTSIDE = ("lm_head", "classifier")


def grouped_llama() -> nn.Module:
    return toys.llama()  # two query heads share one key-value head


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=toys.VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        ffn_dim=32, max_position_embeddings=32, word_embed_proj_dim=16, dropout=0.0,
    )  # fmt: skip
    return toys._built(lambda: OPTForCausalLM(config), 0)


MODELS = [grouped_llama, opt, toys.gpt2, toys.bert]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=toys.batch()["input_ids"]).logits
    return found


def moved_(model: nn.Module, scheme: str) -> tuple[Fold, ...]:
    """Fake-quantize, and move every transform and threshold away from where it starts."""
    found = folding(model)
    fake_quantize_(model, scheme, OUTSIDE)
    folds = attach_(model, found.folds)
    generator = torch.Generator().manual_seed(1)
    for fold in folds:
        first = fake_layers(model)[fold.targets[0]]
        for values in (first.log_scale, first.shift):
            if values is not None:
                values.copy_(torch.randn(values.shape, generator=generator) * 0.4)
    for layer in fake_layers(model).values():
        layer.upper.sub_(0.2)
    return folds


@pytest.mark.parametrize("make", MODELS)
def test_without_rounding_transforms_change_no_output(make: Callable[[], nn.Module]) -> None:
    model = make().double()
    before = logits(model)
    assert len(moved_(model, "int4-channel")) >= 2
    with search.exact(model):
        assert float((logits(model) - before).abs().max()) <= 1e-10
    assert float((logits(model) - before).abs().max()) > 1e-3


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("scheme", ["int2-g8-asym", "int4-channel-a8", "int8-channel-a8"])
def test_the_quantized_model_computes_the_same(make: Callable[[], nn.Module], scheme: str) -> None:
    """Not with fewer bits for activations, where a row's largest number lies between two codes and
    its last bit, which folding changes, decides; the layer alone is tested with those."""
    model = make().double()
    moved_(model, scheme)
    before, names = logits(model), set(fake_layers(model))
    assert set(quantize_(model)) == names
    assert not fake_layers(model)
    assert float((logits(model) - before).abs().max()) <= 3e-5 * float(before.abs().max())


@pytest.mark.parametrize("freeze", [False, True])
def test_a_model_that_was_wrapped_since_is_quantized_as_it_was_alone(freeze: bool) -> None:
    found = []
    for wrap in (lambda model: model, lambda model: nn.ModuleDict({"deep": nn.Sequential(model)})):
        model = toys.bert()
        moved_(model, "int4-channel-a8")
        outer = wrap(model)
        done = freeze_(outer, []) if freeze else quantize_(outer)
        assert len(done) == sum(isinstance(m, QuantLinear) for m in model.modules())
        found.append(logits(model))
    assert torch.equal(*found)


def test_a_shift_needs_biases_and_a_scale_does_not() -> None:
    llama, wide = toys.llama(), opt()
    assert not any(fold.shifts for fold in moved_(llama, "int4-channel"))
    shifted = {fold.source.split(".")[-1] for fold in moved_(wide, "int4-channel") if fold.shifts}
    assert shifted == {"self_attn_layer_norm", "final_layer_norm", "v_proj"}


def test_what_cannot_be_transformed_is_left_alone_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = toys.llama()
    found = folding(model)
    fake_quantize_(model, "int8-tensor", (*OUTSIDE, "k_proj"))
    with caplog.at_level(logging.WARNING, "zotune"):
        done = attach_(model, found.folds)
    sources = {fold.source.split(".")[-1] for fold in done}
    assert sources == {"post_attention_layernorm"}  # one scale for all rows; one reader is float
    assert caplog.text.count("not transformed") == 6


def test_frozen_layers_keep_their_codes_and_the_model_its_outputs() -> None:
    model = toys.llama().double()
    moved_(model, "int4-channel")
    before = logits(model)
    kept = [name for name in fake_layers(model) if name.endswith(("q_proj", "v_proj"))]
    frozen = freeze_(model, kept)
    assert set(fake_layers(model)) == set(kept)
    assert not folds_on(model)
    assert all(isinstance(model.get_submodule(name), QuantLinear) for name in frozen)
    # The thresholds are shares of a group's extremes, which the transform of columns has moved with
    # the weights, and so nothing is rounded otherwise; only ties may fall to the other side.
    assert float((logits(model) - before).abs().mean()) <= 1e-4 * float(before.abs().max())


def searched(scheme: str, **options: Any) -> tuple[nn.Module, float, float]:
    """A model with outlier channels, and its error against the float model before and after."""
    model = toys.llama()
    for name, module in model.named_modules():
        if name.endswith("layernorm"):
            module.get_parameter("weight")[:2] *= 20
    wanted, found = logits(model), folding(model)
    fake_quantize_(model, scheme, OUTSIDE)
    attach_(model, found.folds)
    before = float((logits(model) - wanted).square().mean())
    search.search_(model, lambda: float((logits(model) - wanted).square().mean()), **options)
    return model, before, float((logits(model) - wanted).square().mean())


@pytest.mark.parametrize("scheme", ["int2-g8-asym", "int4-channel-a4", "int3-channel"])
def test_the_search_lowers_the_error(scheme: str) -> None:
    _, before, after = searched(scheme)
    assert after < 0.9 * before


def test_smoothing_tames_channels_with_outliers_and_stays_only_where_the_loss_falls() -> None:
    model = toys.small()
    model.norm.weight[:2] *= 20
    fake_quantize_(model, "int8-channel-a4", exclude=("head", "down"))
    attach_(model, [Fold("norm", ("up",), (0, toys.HIDDEN), shifts=True)])
    layer, x = fake_layers(model)["up"], drawn_outliers()
    wanted = search.layer_output(layer, x, False)

    def error() -> float:
        return float((layer(x) - wanted).square().sum())

    before = error()
    search.smooth_(model, {"up": x}, error)
    assert error() < 0.3 * before
    assert layer.log_scale is not None
    assert float(layer.log_scale[:2].min()) > float(layer.log_scale[2:].max())
    search.smooth_(model, {"up": x}, lambda: 1.0)
    assert not layer.log_scale.any()


def drawn_outliers() -> Tensor:
    x = torch.randn(50, toys.HIDDEN, generator=torch.Generator().manual_seed(0))
    x[:, :2] *= 20
    return x


def test_compensation_keeps_the_grid_and_lowers_the_layers_error() -> None:
    model = toys.llama()
    fake_quantize_(model, "int3-channel-asym", OUTSIDE)
    with search.recording(model) as seen:
        logits(model)
    for name, layer in fake_layers(model).items():
        with torch.no_grad():
            wanted = search.layer_output(layer, seen[name], False)
            before, steps = (layer(seen[name]) - wanted).square().sum(), layer.steps()
            search.compensate_(layer, seen[name], name)
            after = (layer(seen[name]) - wanted).square().sum()
        assert float(after) < float(before)
        assert torch.allclose(layer.steps(), steps, rtol=1e-4)


def test_weights_make_up_for_a_part_of_what_rounded_activations_lose() -> None:
    layers = []
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 16)
    away = x + 0.3 * torch.randn(400, 16, generator=torch.Generator().manual_seed(1))
    for known in (None, x):
        model = toys.small()
        fake_quantize_(model, "int8-channel-a4", exclude=("head", "down"))
        layer = fake_layers(model)["up"]
        wanted = search.layer_output(layer, x, False)
        search.compensate_(layer, away, "up", known)
        layers.append(float((layer(away) - wanted).square().sum()))
    assert layers[1] < 0.95 * layers[0]


def test_silent_channels_are_left_alone() -> None:
    model = toys.small()
    fake_quantize_(model, "int4-channel-a8", exclude=("head", "down"))
    attach_(model, [Fold("norm", ("up",), (0, toys.HIDDEN), shifts=True)])
    layer = fake_layers(model)["up"]
    x = drawn_outliers()
    x[:, 3] = 0
    wanted = search.layer_output(layer, x, False)
    search.smooth_(model, {"up": x}, lambda: float((layer(x) - wanted).square().sum()))
    assert layer.log_scale is not None
    assert bool(layer.log_scale.any())
    assert float(layer.log_scale[3]) == 0
    assert bool(layer.log_scale.isfinite().all())


def ran(model: toys.Small, x: Tensor) -> Callable[[], float]:
    return lambda: float(model.up(x).sum())


def test_layers_that_are_never_run_are_named() -> None:
    model = toys.small()
    fake_quantize_(model, "int4-g8")
    assert search.search_(model, ran(model, torch.ones(2, toys.HIDDEN))) == ["down", "head"]


def test_infinite_activations_are_an_error_that_names_the_channels() -> None:
    model = toys.small()
    fake_quantize_(model, "int4-g8")
    x = torch.ones(2, toys.HIDDEN)
    x[0, 5] = torch.inf
    with pytest.raises(BadInput, match=r"layer 'up' are not finite in channels \[5\]"):
        search.search_(model, ran(model, x))
