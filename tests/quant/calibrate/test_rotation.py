"""Rotations that neighbours absorb change no output, and what takes none is listed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from hypothesis import given
from hypothesis import strategies as st
from quant.calibrate.test_folding import MODELS, decoder, opt, output
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.quant.calibrate import calibrate_, recipe
from zotune.quant.calibrate.folding import fold_, folding
from zotune.quant.calibrate.rotate import Rotate
from zotune.quant.calibrate.rotation import Stream, rotate_stream_, rotation, stream
from zotune.quant.model import replace_

BEHIND = ("opt with norms behind", "bert")


def exact(name: str) -> nn.Module:
    """A model in float64; transformers' RMSNorms compute in float32 whatever they get."""
    model = MODELS[name]().double()
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(len(module.weight), module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            replace_(model, path, norm)
    return model.requires_grad_(False)


@given(size=st.integers(1, 40), seed=st.integers(0, 9), keeps=st.booleans())
def test_matrices_are_orthogonal_and_keep_the_ones_where_they_have_to(
    size: int, seed: int, keeps: bool
) -> None:
    turn = rotation(size, seed, keeps)
    eye = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(turn @ turn.t(), eye, rtol=0, atol=1e-12)
    if keeps:
        torch.testing.assert_close(turn.sum(0), torch.ones(size).double(), rtol=0, atol=1e-12)
    assert torch.equal(turn, rotation(size, seed, keeps))
    if size > 8:
        assert not torch.allclose(turn, rotation(size, seed + 1, keeps))


@pytest.mark.parametrize("size", [2, 16, 64])
def test_powers_of_two_are_hadamard_matrices_with_signs(size: int) -> None:
    assert torch.allclose(rotation(size).abs(), torch.full((1,), size**-0.5).double())


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_every_rotation_of_every_architecture_is_exact(name: str, residual: bool) -> None:
    model = exact(name)
    before, weights = output(model), toys.digest(model)
    Rotate(residual=residual, seed=1).rotate_(model)
    torch.testing.assert_close(output(model), before, rtol=1e-10, atol=1e-10)
    assert toys.digest(model) != weights
    for fold in folding(model).folds:  # transforms still find their neighbours
        scale = torch.rand(fold.channels, generator=torch.Generator().manual_seed(0)).double() + 0.5
        fold_(model, fold, scale)
    torch.testing.assert_close(output(model), before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_layer_reads_turned_inputs_or_is_listed(name: str) -> None:
    model, left = MODELS[name](), {}
    seen: dict[str, list[Tensor]] = {}
    linears = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    for n in linears:
        model.get_submodule(n).register_forward_pre_hook(
            lambda _, x, n=n: seen.setdefault(n, []).append(x[0])
        )
    output(model)
    left = Rotate().rotate_(model)
    output(model)
    for n in linears:
        if n in left:
            assert left[n]
        same = torch.allclose(seen[n][0], seen[n][1], rtol=1e-3, atol=1e-3)
        assert same == (n in left), n
    if name in BEHIND:
        assert all("behind the sums" in why for why in left.values())
    else:
        assert {n.split(".")[-1] for n in left} <= {"down_proj", "fc2", "c_proj"}


def test_a_tied_head_is_untied_and_the_folder_says_so(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = toys.llama(tied=True)
    before = output(model)
    Rotate().rotate_(model)
    assert torch.allclose(output(model), before, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(output(loaded), before, atol=1e-4)
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight


def planted(model: nn.Module) -> nn.Module:
    """The same function with two channels of every norm's output thirty times as large."""
    for fold in folding(model).folds:
        if "norm" in fold.source:
            scale = torch.ones(fold.channels)
            scale[:2] = 1 / 30
            fold_(model, fold, scale)
    return model


@pytest.mark.parametrize("make", [lambda: decoder("llama"), lambda: opt()])
def test_rotation_tames_channels_with_outliers(make: Any) -> None:
    def error(method: str) -> float:
        model = planted(make())
        wanted = output(model)
        calibrate_(model, "int8-channel-a4", recipe([(name, {}) for name in method.split("+")]))
        return float((output(model) - wanted).square().mean())

    assert error("rotate") < 0.5 * error("rtn")


def test_rotation_goes_with_a_smoother_and_a_rounder_and_is_reported() -> None:
    ids = [toys.batch(4, seed)["input_ids"] for seed in range(3)]
    how = recipe([("rotate", {"seed": 2}), ("awq", {}), ("gptq", {})])
    assert how.rotation == Rotate(seed=2)
    report = calibrate_(toys.llama(), "int4-g8", how, ids)
    assert {n.split(".")[-1] for n in report.unrotated} == {"down_proj"}
    assert calibrate_(toys.small(), "int4-g8", how, ids).unrotated.keys() == {"up", "down", "head"}
    assert not recipe([("rotate", {})]).needs_data
    with pytest.raises(BadInput, match="second rotation"):
        recipe([("rotate", {}), ("rotate", {})])
    with pytest.raises(BadInput, match="turns nothing"):
        Rotate(residual=False, values=False)
    with pytest.raises(BadInput, match="seed=-1"):
        Rotate(seed=-1)


def test_a_stream_with_unknown_neighbours_is_left_alone_and_says_why() -> None:
    model: Any = toys.llama()
    model.extra = nn.Linear(toys.HIDDEN, 2)
    before = toys.digest(model)
    assert "'extra' is no float layer of a known place" in str(stream(model))
    left = Rotate(values=False).rotate_(model)
    assert set(left) == {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert toys.digest(model) == before
    lonely: Any = opt()
    lonely.model.decoder.final_layer_norm.weight[3] = 0.0
    assert "a bias where its gain is 0" in str(stream(lonely))
    assert "no neighbours are known" in str(stream(toys.small()))
    spoiled = toys.llama()
    spoiled.get_parameter("model.layers.1.mlp.up_proj.weight")[2, 3] = torch.inf
    with pytest.raises(BadInput, match=r"model\.layers\.1\.mlp\.up_proj"):
        calibrate_(spoiled, "int4-g8", recipe([("rotate", {})]))


def test_a_channel_that_is_always_zero_is_turned_exactly() -> None:
    model = exact("gpt2")
    model.get_parameter("transformer.h.0.ln_1.weight")[3] = 0.0
    model.get_parameter("transformer.h.0.ln_1.bias")[3] = 0.0
    before, found = output(model), stream(model)
    assert isinstance(found, Stream)
    rotate_stream_(model, found, rotation(toys.HIDDEN, 1, found.centred))
    torch.testing.assert_close(output(model), before, rtol=1e-10, atol=1e-10)
