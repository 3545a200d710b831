"""Methods on whole models: what is measured, what is folded, what is listed, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.quant import QuantLinear, quantize_model_
from zotune.quant.calibrate import Recipe, calibrate_, methods, recipe
from zotune.quant.calibrate.awq import Awq
from zotune.quant.calibrate.chain import stages
from zotune.quant.calibrate.folding import folding
from zotune.quant.calibrate.method import Grid, Moments
from zotune.quant.calibrate.smoothquant import SmoothQuant
from zotune.quant.model import choose
from zotune.quant.scheme import Scheme

MODELS = {"llama": toys.llama, "gpt2": toys.gpt2, "bert": toys.bert, "small": toys.small}


def batches(count: int = 3) -> list[Tensor]:
    return [toys.batch(4, seed)["input_ids"] for seed in range(count)]


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(ids)
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize("name", MODELS)
def test_rtn_is_what_quantize_model_does(name: str) -> None:
    one, other = MODELS[name](), MODELS[name]()
    names = quantize_model_(one, "int4-g8")
    assert list(calibrate_(other, "int4-g8", Recipe()).layers) == names
    assert torch.equal(logits(one, batches()[0]), logits(other, batches()[0]))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", sorted(methods()))
def test_every_method_quantizes_every_layer_of_every_shape(name: str, method: str) -> None:
    model = MODELS[name]()
    names = list(choose(model, Scheme.parse("int4-g8")))
    report = calibrate_(model, "int4-g8", recipe([(method, {})]), batches())
    held = [n for n, m in model.named_modules() if isinstance(m, QuantLinear)]
    assert sorted(held) == sorted(names) == sorted(report.layers)
    assert torch.isfinite(logits(model, batches()[0])).all()
    assert report.nearest == {}


@pytest.mark.parametrize("name", MODELS)
def test_what_a_stage_shows_is_what_the_quantized_model_feeds_its_layers(name: str) -> None:
    model = MODELS[name]()
    layers: dict[str, nn.Module] = dict(choose(model, Scheme.parse("int4-g8")))
    seen: dict[str, Tensor] = {}
    for stage in stages(model, layers, batches()):
        for names in stage.groups():
            for layer in names:
                seen[layer] = stage.moments(layer, gram=False).mean
            for layer in names:  # stands for quantizing: what follows must see it
                stage.layers[layer].get_parameter("weight").mul_(1.5)
    wanted: dict[str, Moments] = {n: Moments(gram=False) for n in layers}
    for n, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, x, n=n: wanted[n].add(x[0]))
    for ids in batches():
        logits(model, ids)
    assert set(seen) == set(layers)
    for n in layers:
        torch.testing.assert_close(seen[n], wanted[n].mean, rtol=1e-5, atol=1e-6)


def test_blocks_are_measured_alone_and_layers_of_one_input_together() -> None:
    model = toys.llama()
    found = list(stages(model, dict(choose(model, Scheme.parse("int4-g8"))), batches()))
    assert len(found) == 2
    start = "model.layers.1."
    assert found[1].groups() == [
        [start + f"self_attn.{k}_proj" for k in "qkv"],
        [start + "self_attn.o_proj"],
        [start + "mlp.gate_proj", start + "mlp.up_proj"],
        [start + "mlp.down_proj"],
    ]


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_smoothing_alone_changes_no_output(name: str, method: str) -> None:
    model = MODELS[name]().double()
    before = logits(model, batches()[0])
    found = folding(model)
    from zotune.quant import calibrate

    for stage in stages(model, dict(choose(model, Scheme.parse("int4-g8"))), batches()):
        how = recipe([(method, {})])
        calibrate._smooth_(model, stage, how.smoother, found, Grid(Scheme.parse("int4-g8")))
    torch.testing.assert_close(logits(model, batches()[0]), before, rtol=1e-10, atol=1e-10)


def test_smoothquant_scales_are_the_papers() -> None:
    x = torch.tensor([[4.0, -0.5, 0.0], [-1.0, 2.0, 0.0]])
    moments = Moments(gram=False)
    moments.add(x)
    one, other = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[-0.25, 0.5, 1.0]])
    scale = SmoothQuant(alpha=0.75).scale([one, other], Grid(Scheme()), moments)
    wanted = [4.0**0.75 / 1.0**0.25, 2.0**0.75 / 2.0**0.25, 1.0]
    torch.testing.assert_close(scale, torch.tensor(wanted))


def test_awq_finds_the_power_of_least_error_and_never_does_worse_than_none() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 32, generator=generator) * torch.logspace(-1, 1, 32)
    weight = torch.randn(16, 32, generator=generator)
    moments, grid = Moments(gram=True), Grid(Scheme.parse("int3-g16"))
    moments.add(x)

    def error(scale: Tensor) -> float:
        new = grid.rounded(weight * scale) / scale
        return float((x @ (new - weight).t()).square().sum())

    mean = x.abs().mean(0)
    candidates = [mean.pow(k / 20) for k in range(20)]
    candidates = [s / (s.max() * s.min()).sqrt() for s in candidates]
    found = Awq().scale([weight], grid, moments)
    assert error(found) == pytest.approx(min(map(error, candidates)), rel=1e-4)
    assert error(found) < 0.8 * error(torch.ones(32))


def test_layers_without_a_neighbour_and_silent_channels_are_listed() -> None:
    model = toys.bert()
    with torch.no_grad():  # a channel of the embedding's norm that is always zero
        model.get_parameter("bert.embeddings.LayerNorm.weight")[3] = 0.0
        model.get_parameter("bert.embeddings.LayerNorm.bias")[3] = 0.0
    report = calibrate_(model, "int4-g8", recipe([("awq", {}), ("gptq", {})]), batches())
    assert "residual" in report.unfolded["bert.encoder.layer.0.attention.self.query"]
    assert report.silent["bert.encoder.layer.0.attention.self.query"] == 1


def test_a_layer_that_never_runs_is_rounded_and_listed() -> None:
    model = toys.small()
    model.unused = nn.Linear(16, 8)
    report = calibrate_(model, "int4-g8", recipe([("gptq", {})]), batches())
    assert list(report.nearest) == ["unused"]
    assert isinstance(model.unused, QuantLinear)


def test_a_layer_that_runs_twice_sees_both_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    model = Twice()
    (stage,) = stages(model, {"layer": model.layer}, [torch.ones(2, 8)])
    assert stage.groups() == [["layer"]]
    assert stage.moments("layer", gram=False).tokens == 4


def test_inputs_that_overflow_are_named() -> None:
    model = toys.llama()
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1e38)
        model.get_parameter("model.layers.0.mlp.gate_proj.weight").mul_(1e38)
    with pytest.raises(BadInput, match=r"layers\.0\.mlp\.down_proj.*NaN or infinity"):
        calibrate_(model, "int8-channel", recipe([("smoothquant", {})]), batches())


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([("gptqq", {})], "unknown"),
        ([("gptq", {"actorder": True})], "takes the options"),
        ([("rtn", {}), ("gptq", {})], "second rounder"),
        ([("smoothquant", {"alpha": 2.0})], "alpha"),
        ([("awq", {"powers": 0})], "powers"),
    ],
)
def test_recipes_that_do_not_exist_are_refused(terms: list[Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        recipe(terms)


def test_what_cannot_be_done_is_said_before_anything_is_changed() -> None:
    model = toys.llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BadInput, match="give --data"):
        calibrate_(model, "int4-g8", recipe([("gptq", {})]))
    with pytest.raises(BadInput, match="does not divide"):
        calibrate_(model, "int4-g12", recipe([("gptq", {})]), batches())
    with pytest.raises(BadInput, match="bits=9"):
        calibrate_(model, "int9-g8", recipe([("gptq", {})]), batches())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_every_method_is_rebuilt_from_its_repr() -> None:
    for kind in methods().values():
        assert eval(repr(kind()), {kind.__name__: kind}) == kind()
