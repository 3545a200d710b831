"""Folding a per-channel transform into neighbours changes no output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.quant.calibrate.folding import Fold, Folding, fold_, folded, folding

SIZES = {
    "vocab_size": toys.VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32,
}  # fmt: skip


def opt(**options: Any) -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        **{**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, **options}
    )
    return toys.fill_(OPTForCausalLM(config))


def decoder(family: str, **options: Any) -> nn.Module:
    """A causal model with grouped-query attention."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family, **{**SIZES, "num_key_value_heads": 2, "head_dim": 8, **options}
    )
    return toys.fill_(AutoModelForCausalLM.from_config(config))


MODELS = {
    "llama": lambda: decoder("llama"),
    "llama with biases": lambda: decoder("llama", attention_bias=True, mlp_bias=True),
    "llama with wide heads": lambda: decoder("llama", head_dim=16),
    "mistral": lambda: decoder("mistral"),
    "qwen2": lambda: decoder("qwen2"),
    "qwen3": lambda: decoder("qwen3"),
    "opt": opt,
    "opt with norms behind": lambda: opt(do_layer_norm_before=False),
    "opt with gelu": lambda: opt(activation_function="gelu"),
    "gpt2": toys.gpt2,
    "bert": toys.bert,
}


def output(model: nn.Module) -> Tensor:
    ids = torch.randint(1, toys.VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    return logits


def drawn(fold: Fold) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(len(fold.source))
    scale = torch.rand(fold.channels, generator=generator, dtype=torch.float64) * 3 + 0.2
    shift = torch.randn(fold.channels, generator=generator, dtype=torch.float64)
    return scale, shift if fold.shifts else None


@pytest.mark.parametrize("name", MODELS)
def test_every_fold_of_every_architecture_is_exact(name: str) -> None:
    model = MODELS[name]().double()
    before, found = output(model), folding(model)
    assert found.folds
    for fold in found.folds:
        fold_(model, fold, *drawn(fold))
        torch.testing.assert_close(output(model), before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_layer_is_folded_or_refused_with_a_reason(name: str) -> None:
    model = MODELS[name]()
    found = folding(model)
    absorbed = [target for fold in found.folds for target in fold.targets]
    linears = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    assert sorted([*absorbed, *found.refused]) == sorted(linears)
    assert all(found.refused.values())


def test_a_fold_really_changes_the_inputs_of_its_targets() -> None:
    model = opt().double()
    fold = folding(model).folds[0]
    scale, shift = drawn(fold)
    assert shift is not None
    seen: list[Tensor] = []
    model.get_submodule(fold.targets[0]).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    output(model)
    fold_(model, fold, scale, shift)
    output(model)
    torch.testing.assert_close(seen[1], (seen[0] - fold.expand(shift)) / fold.expand(scale))


def test_what_cannot_absorb_says_why() -> None:
    refused = folding(toys.bert()).refused
    assert "residual" in refused["bert.encoder.layer.0.attention.self.query"]
    assert "activation" in refused["bert.encoder.layer.1.output.dense"]
    assert "classifier" in refused
    assert (
        "residual" in folding(opt(do_layer_norm_before=False)).refused["model.decoder.layers.0.fc1"]
    )


def test_an_unknown_architecture_has_no_folds_and_says_which_are_known() -> None:
    found = folding(toys.small())
    assert found.folds == ()
    assert "known: llama" in found.refused["up"]


def test_computing_new_parameters_writes_none() -> None:
    model = toys.llama()
    fold = folding(model).folds[0]
    before = {n: p.clone() for n, p in model.named_parameters()}
    new = folded(model, fold, torch.full((fold.channels,), 2.0))
    assert set(new) == {f"{fold.source}.weight", *(f"{t}.weight" for t in fold.targets)}
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_cannot_be_undone_is_refused(bad: float) -> None:
    model = toys.llama()
    fold = folding(model).folds[0]
    scale = torch.ones(fold.channels)
    scale[3] = bad
    with pytest.raises(BadInput, match="scale of"):
        folded(model, fold, scale)


def test_a_shift_without_a_bias_and_a_wrong_shape_are_refused() -> None:
    model = toys.llama()
    fold = folding(model).folds[0]
    with pytest.raises(BadInput, match="no bias"):
        folded(model, fold, torch.ones(fold.channels), torch.ones(fold.channels))
    with pytest.raises(BadInput, match="wanted"):
        folded(model, fold, torch.ones(3))


def test_records_are_rebuilt_from_their_repr() -> None:
    found = folding(toys.gpt2())
    assert eval(repr(found), {"Fold": Fold, "Folding": Folding}) == found
