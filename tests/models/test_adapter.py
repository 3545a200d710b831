"""Adapters and PEFT's folder, both ways. Run: pytest tests/models/test_adapter.py"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toys import batch, bert, cross_entropy, digest, gpt2, llama, observe, small

from zotune import methods
from zotune.core import spaces
from zotune.core.evaluator import TorchEvaluator
from zotune.core.step import Tuner
from zotune.errors import BadInput, FormatError
from zotune.models.adapter import (
    CHILD,
    LowRank,
    adapters,
    attach,
    detach,
    fold_,
    load_peft,
    save_peft,
)

peft = pytest.importorskip("peft")
MODELS: dict[str, tuple[Callable[[], Any], str, list[str]]] = {
    "llama": (llama, "q_proj|v_proj", ["q_proj", "v_proj"]),
    "gpt2": (gpt2, "c_attn|mlp.c_fc", ["c_attn", "c_fc"]),
    "bert": (bert, "query|value|intermediate", ["query", "value"]),
}
IDS = batch(4)["input_ids"]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS).logits
    return out


def train_(model: nn.Module, space: str) -> None:
    """A few steps, so that neither factor is zero."""
    built = spaces.parse(space).build(model, observe)
    method = methods.get("mezo", lr=3.0, eps=0.05, units="relative")
    tuner = Tuner(built, method, 1, evaluator=TorchEvaluator(model, built, cross_entropy))
    for t in range(4):
        tuner.step(batch(8, t))


def with_peft(base: nn.Module, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, str(folder)).eval()


def written_by_peft(folder: Path, name: str, **options: Any) -> Any:
    """A folder that the peft library wrote, with random factors, and the model in its hands."""
    make, _, targets = MODELS[name]
    settings = {"r": 3, "lora_alpha": 5, "target_modules": targets, **options}
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(make(), peft.LoraConfig(**settings))
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(3))
        model.save_pretrained(str(folder))
    return model.eval()


@pytest.mark.parametrize("kind", ["lora(rank=2, targets='{}')", "adapter(rank=2, targets='{}')"])
@pytest.mark.parametrize("name", MODELS)
def test_peft_reads_what_we_wrote_and_gives_the_same_logits(
    name: str, kind: str, tmp_path: Path
) -> None:
    make, targets, _ = MODELS[name]
    model = make()
    plain = logits(model)
    train_(model, kind.format(targets))
    ours = logits(model)
    assert float((ours - plain).abs().max()) > 1e-3
    save_peft(model, tmp_path, base="somewhere/base")
    assert torch.allclose(logits(with_peft(make(), tmp_path)), ours, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somewhere/base"
    # ... and so do we.
    again = make()
    load_peft(again, tmp_path)
    assert torch.equal(logits(again), ours)


@pytest.mark.parametrize("options", [
    {}, {"use_rslora": True}, {"r": 2, "lora_alpha": 7},
    {"rank_pattern": {"q_proj": 5, "c_attn": 5, "query": 5}},
], ids=["plain", "rslora", "alpha", "ranks"])  # fmt: skip
@pytest.mark.parametrize("name", MODELS)
def test_we_read_what_peft_wrote_and_give_the_same_logits(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    theirs = logits(written_by_peft(tmp_path, name, **options))
    model = MODELS[name][0]()
    assert float((theirs - logits(model)).abs().max()) > 1e-3
    load_peft(model, tmp_path)
    assert torch.allclose(logits(model), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("options", "message"), [
    ({"use_dora": True}, "only plain LoRA"),
    ({"modules_to_save": ["lm_head"]}, "lm_head"),
    ({"alpha_pattern": {"q_proj": 9}}, "alpha_pattern"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
    ({"lora_bias": True}, "bias"),
], ids=["dora", "saved modules", "alphas", "embedding", "lora bias"])  # fmt: skip
def test_what_we_do_not_read_is_refused_and_leaves_the_model_alone(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    written_by_peft(tmp_path, "llama", **options)
    model = llama()
    before = digest(model)
    with pytest.raises(FormatError, match=message):
        load_peft(model, tmp_path)
    assert digest(model) == before
    assert not list(adapters(model))


def test_biases_that_peft_trained_are_refused(tmp_path: Path) -> None:
    written_by_peft(tmp_path, "bert", bias="lora_only")
    model = bert()
    with pytest.raises(FormatError, match="bias"):
        load_peft(model, tmp_path)
    assert not list(adapters(model))


def damage(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def shrink(end: str, rows: bool) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        name = sorted(k for k in tensors if k.endswith(end))[-1]
        tensors[name] = (tensors[name][:-1] if rows else tensors[name][:, :-1]).contiguous()

    return change


def drop(end: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[sorted(k for k in tensors if k.endswith(end))[-1]]

    return change


@pytest.mark.parametrize("change", [
    shrink("lora_A.weight", False), shrink("lora_B.weight", True), shrink("lora_A.weight", True),
    drop("lora_B.weight"), drop("lora_A.weight"), lambda t: t.clear(),
], ids=["inputs", "outputs", "rank", "no B", "no A", "nothing"])  # fmt: skip
def test_factors_that_do_not_fit_are_refused_before_any_is_attached(
    change: Callable[[dict[str, Tensor]], None], tmp_path: Path
) -> None:
    written_by_peft(tmp_path, "llama")
    damage(tmp_path, change)
    model = llama()
    with pytest.raises(FormatError, match="adapter"):
        load_peft(model, tmp_path)
    assert not list(adapters(model))


def test_folders_that_are_no_lora_or_of_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not a readable PEFT adapter folder"):
        load_peft(llama(), tmp_path / "nowhere")
    written_by_peft(tmp_path, "gpt2")
    with pytest.raises(FormatError, match="not in this model"):
        load_peft(llama(), tmp_path)
    config = tmp_path / "adapter_config.json"
    whole = config.read_text()
    config.write_text(whole.replace('"LORA"', '"IA3"'))
    with pytest.raises(FormatError, match="IA3"):
        load_peft(gpt2(), tmp_path)
    config.write_text("{}")
    with pytest.raises(FormatError, match="peft_type"):
        load_peft(gpt2(), tmp_path)
    config.write_text('{"peft_type": "LORA"}')
    with pytest.raises(FormatError, match="lora_alpha"):
        load_peft(gpt2(), tmp_path)
    config.write_text("[")
    with pytest.raises(FormatError, match="not a readable"):
        load_peft(gpt2(), tmp_path)
    config.write_text(whole)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(FormatError, match="safetensors"):
        load_peft(gpt2(), tmp_path)


def test_a_prefix_takes_the_layers_of_an_inner_model(tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = llama()

    outer = Wrapped()
    train_(outer.encoder, "lora(rank=2)")
    save_peft(outer, tmp_path, base="", prefix="encoder.")
    wanted = logits(outer.encoder)
    assert torch.allclose(logits(with_peft(llama(), tmp_path)), wanted, rtol=0, atol=1e-5)
    fresh = Wrapped()
    load_peft(fresh, tmp_path, prefix="encoder.")
    assert torch.equal(logits(fresh.encoder), wanted)


def test_layers_in_more_than_one_size_or_none_are_refused_when_saving(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no adapters"):
        save_peft(llama(), tmp_path, "")
    model = small()
    attach(model.up, LowRank(torch.ones(2, 16), torch.ones(32, 2)))
    attach(model.down, LowRank(torch.ones(3, 32), torch.ones(16, 3)))
    with pytest.raises(BadInput, match="wants one each"):
        save_peft(model, tmp_path, "")


# ---- attach, detach, fold ------------------------------------------------------------


@pytest.mark.parametrize("scheme", [None, "int4-g8", "int8-channel-a8"])
def test_detaching_restores_outputs_and_names_exactly(scheme: str | None) -> None:
    model = small(0, scheme)
    before, plain = digest(model), model(IDS)
    train_(model, "lora(rank=2, targets='up|down')")
    assert not torch.equal(model(IDS), plain)
    assert [p for p, _, _ in adapters(model)] == ["up", "down"]
    detach(model)
    assert torch.equal(model(IDS), plain)
    assert digest(model) == before
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_that_starts_at_zero_changes_no_bit(dtype: torch.dtype) -> None:
    model = small().to(dtype)
    plain = model(IDS)
    for space in ("adapter(rank=2)", "lora(rank=2, targets='up|down')"):
        spaces.parse(space).build(model, observe)
        assert torch.equal(model(IDS), plain)
        detach(model)


def test_a_layer_takes_one_adapter_of_fitting_factors() -> None:
    layer = nn.Linear(4, 3)
    attach(layer, LowRank(torch.ones(2, 4), torch.ones(3, 2)))
    with pytest.raises(BadInput, match="has an adapter already"):
        attach(layer, LowRank(torch.ones(2, 4), torch.ones(3, 2)))
    for a, b in ((torch.ones(2, 4), torch.ones(3, 3)), (torch.ones(4), torch.ones(3, 4))):
        with pytest.raises(BadInput, match=r"want \(rank, in\)"):
            LowRank(a, b)


@pytest.mark.parametrize("make", [lambda: small().up, lambda: gpt2().transformer.h[0].attn.c_attn])  # type: ignore[union-attr]
def test_folding_an_adapter_into_a_float_layer_keeps_the_outputs(make: Callable[[], Any]) -> None:
    layer = make()
    inputs, outputs = (
        (layer.in_features, layer.out_features)
        if isinstance(layer, nn.Linear)
        else (layer.nx, layer.nf)
    )
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(s, generator=generator) * 0.3 for s in ((2, inputs), (outputs, 2))]
    attach(layer, LowRank(*factors, scaling=2.0))
    x = torch.randn(5, inputs, generator=generator)
    wanted = layer(x)
    fold_(layer)
    assert torch.allclose(layer(x), wanted, rtol=0, atol=1e-5)
    assert CHILD not in layer._modules
    assert not layer._forward_hooks


def test_adapters_of_a_16_bit_model_compute_in_its_dtype_and_stay_float32() -> None:
    model = small().bfloat16()
    space = spaces.parse("lora(rank=2, targets='up|down')").build(model)
    assert model(IDS).dtype == torch.bfloat16
    assert all(b.value().dtype == torch.float32 for b in space)


@pytest.mark.parametrize("name", MODELS)
def test_adapters_that_peft_trained_are_tuned_further(name: str, tmp_path: Path) -> None:
    written_by_peft(tmp_path, name)
    model = MODELS[name][0]()
    load_peft(model, tmp_path)
    count = len(list(adapters(model)))
    space = spaces.get("lora").build(model)
    assert len(space.blocks) == 2 * count
    assert all(s.unit > 0 for s in space)  # type: ignore[operator]
    kept = spaces.get("adapter").build(model, observe)
    assert {b.name.removesuffix(".lora_B") for b in kept} == {p for p, _, _ in adapters(model)}
