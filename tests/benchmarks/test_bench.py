"""`zotune.bench` at tiny shapes: what is measured, of whom, and that peers' steps are theirs.

Nothing timed is judged. Run: pytest tests/benchmarks/test_bench.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from schema import conforms
from torch import nn

from zotune.bench import apart, contenders, memory, models, noise, peaks, process, step
from zotune.bench.dequantizing import Dequantizing, dequantizing_
from zotune.bench.models import RandomLlama, Shape, random_llama
from zotune.bench.restated import QZO, MeZO
from zotune.bench.rows import Row
from zotune.bench.run import run
from zotune.bench.settings import BenchConfig
from zotune.bench.timing import Rounds
from zotune.bench.workload import Workload
from zotune.errors import BadInput
from zotune.models.load import set_compute_dtype_
from zotune.quant import QuantLinear, Scheme, quantize_model_

TINY = RandomLlama(2, 64, 128, 2, 1, vocabulary=96, shape=Shape(2, 8, 2, 1))
QUICK: dict[str, Any] = {
    "batch": 2, "length": 8, "rounds": 2, "calls": 1, "warmup": 1, "threads": 1, "memory_steps": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Llama of two small layers under a name of its own, and peaks that take no time."""
    monkeypatch.setitem(models.LLAMAS, "llama-tiny", TINY)
    measure = peaks.measure
    monkeypatch.setattr(peaks, "measure", lambda: measure(((8, 8, 8),), 1 << 10))


def measured(what: str, out: Path, **settings: Any) -> dict[str, Any]:
    """The result file of one benchmark."""
    made = run(what, BenchConfig(**{**QUICK, **settings, "output_dir": str(out)}))
    found: dict[str, Any] = json.loads(Path(made["written"]).read_text())
    conforms(found)
    assert found == {k: v for k, v in made.items() if k not in ("written", "plot")}
    assert Path(made["plot"]).read_bytes().startswith(b"\x89PNG")
    return found


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A layer of the same random values each time."""
    generator = torch.Generator().manual_seed(5)
    layer = nn.Linear(inputs, outputs, device="meta")
    layer.weight = nn.Parameter(torch.randn(outputs, inputs, generator=generator) / inputs**0.5)
    layer.bias = nn.Parameter(torch.randn(outputs, generator=generator))
    return layer.requires_grad_(False)


def names(found: dict[str, Any]) -> list[str]:
    return [row["name"] for row in found["rows"]]


@pytest.mark.parametrize("model", ["encoder", "llama-tiny"])
def test_a_step_is_timed_beside_its_floor_and_all_peers(
    model: str, encoder: str, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    model = encoder if model == "encoder" else model
    found = measured("step", tmp_path, model_name_or_path=model)
    config = BenchConfig(model_name_or_path=model)
    everybody = [n for n in contenders.all_contenders(config) if contenders.ONE_BY_ONE not in n]
    assert {f"{n}, seconds" for n in everybody} <= set(names(found))
    assert found["details"]["left_out"] == {}
    judged = {row["name"]: row["target"] for row in found["rows"] if row["target"] is not None}
    assert judged["qzo int8 / two forwards"] == 1.05
    assert judged["MeZO restated / qzo int8"] == judged["MeZO restated / zoqo int8"] == 10
    assert judged["MeZO restated / qzo int4"] == judged["LoRA backprop / qzo int8"] == 6
    assert judged["MeZO restated / mezo fp32"] == 2
    assert None not in [row["met"] for row in found["rows"] if row["name"] in judged]
    assert all(len(s) == 2 for s in found["details"]["seconds_per_round"].values())
    assert {"peak: fp32 products", "peak: memory read"} <= set(names(found))


def test_a_lower_bound_is_met_from_above_and_said_to_be_one() -> None:
    config = BenchConfig(only="qzo int8,MeZO")
    rounds = Rounds({"qzo int8": [1.0], "two forwards int8": [1.0], contenders.MEZO: [9.0]})
    forwards, peer = step.ratio_rows(contenders.all_contenders(config), rounds)
    assert (forwards.met, peer.met) == (True, False)
    assert peer.as_dict()["at_least"] is True
    assert "at_least" not in forwards.as_dict()


def test_only_takes_names_or_parts_of_them_and_their_floors() -> None:
    exact = contenders.all_contenders(BenchConfig(only="qzo int4"))
    assert set(exact) == {"qzo int4", "qzo int4, one probe at a time", "two forwards int4"}
    part = contenders.all_contenders(BenchConfig(only="LoRA"))
    assert set(part) == {contenders.LORA, contenders.QLORA}
    with pytest.raises(BadInput, match=r"only='qqq' .*qzo int4"):
        contenders.all_contenders(BenchConfig(only="qqq"))
    with pytest.raises(BadInput, match="names int4 twice"):
        contenders.all_contenders(BenchConfig(scheme="int4-g64,int4-g32"))


def test_who_does_not_fit_or_cannot_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contenders, "has_peft", lambda: False)
    found = measured(
        "step", tmp_path, model_name_or_path="llama-tiny", scheme="int4-g32-asym",
        only="qzo int4,QZO,QLoRA",
    )  # fmt: skip
    left = found["details"]["left_out"]
    assert "pip install 'zotune[peft]'" in left[contenders.QLORA]
    assert "int4-g32-asym" in left[contenders.QZO_PEER]
    assert "qzo int4, seconds" in names(found)
    whole = contenders.all_contenders(BenchConfig())
    reason = contenders.left_out(whole[contenders.ADAMW], 10**13)
    assert reason is not None
    assert "GB are free" in reason


def test_memory_is_that_of_processes_of_their_own(encoder: str) -> None:
    config = BenchConfig(**QUICK, model_name_or_path=encoder)
    found, failures = apart.found_apart(["qzo int4"], config)
    assert failures == {}
    sizes = found["qzo int4"]
    assert 0 < sizes["before_model"] < sizes["model_loaded"] <= sizes["peak"]


def test_memory_is_judged_against_evaluating_the_same_micro_batch() -> None:
    chosen = contenders.all_contenders(BenchConfig(only="qzo int4"))
    peaks_found = {n: {"peak": k} for n, k in zip(chosen, (110, 104, 100), strict=True)}
    stacked, apart_row = memory.ratio_rows(chosen, peaks_found, {})
    assert (stacked.value, stacked.target, stacked.met) == (1.1, 1.15, True)
    assert (apart_row.value, apart_row.target, apart_row.met) == (1.04, 1.03, False)


def test_a_process_that_fails_is_a_row_that_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*words: Any, **options: Any) -> Any:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(process, "measured_apart", fails)
    found = measured("memory", tmp_path, model_name_or_path="llama-tiny", only="qzo int4")
    assert found["details"]["failures"]
    assert [r["met"] for r in found["rows"] if r["target"] is not None] == [False] * 2


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"No module named zotune\.nothing"):
        process.measured_apart("zotune.nothing", [], timeout=60)


def test_memory_follows_a_run_of_the_training_loop(encoder: str) -> None:
    config = BenchConfig(model_name_or_path=encoder, steps=20, length=8, threads=1)
    seen = apart.long_run(config, "qzo int4")
    assert len(seen) == 20
    assert min(seen) > 1e6
    row = memory.growth_row("qzo int4", [100] * 90 + [103] * 10, 5000)
    assert (round(row.value or 0, 6), row.met) == (3.0, False)


def test_noise_is_compared_with_torch_at_every_size(
    encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise, "AT_LEAST", 1)
    found = measured("noise", tmp_path, model_name_or_path=encoder)
    assert "all blocks: gaussian draw" in names(found)
    assert all(row["value"] > 0 for row in found["rows"])


def test_numbers_in_a_random_llama_are_those_of_its_tensors() -> None:
    sizes = models.parameter_sizes("llama-tiny")
    assert sum(n for n in sizes if n > 64) == TINY.weights
    assert sum(sizes) == sum(p.numel() for p in random_llama(TINY).parameters())


def test_a_random_llama_is_the_model_that_transformers_would_quantize() -> None:
    """Made layer by layer, it computes what the whole one does."""
    scheme, ids = Scheme.parse("int4-g32"), torch.arange(12).view(2, 6)
    whole, piecewise = random_llama(TINY), random_llama(TINY, scheme)
    assert whole.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    assert whole.lm_head.weight is whole.model.embed_tokens.weight  # type: ignore[union-attr]
    quantize_model_(whole, scheme)
    set_compute_dtype_(whole)
    with torch.no_grad():
        got, wanted = (m(input_ids=ids).logits for m in (piecewise, whole))
    torch.testing.assert_close(got, wanted)
    assert len([m for m in piecewise.modules() if isinstance(m, QuantLinear)]) == 14


def test_all_tokens_of_the_batch_count(encoder: str) -> None:
    for model in (encoder, "llama-tiny"):
        prepared = Workload(model, 3, 10).prepared()
        assert prepared.batch["input_ids"].shape == (3, 10)
        assert bool(prepared.batch["attention_mask"].all())
        assert prepared.evaluate() > 0


@pytest.mark.parametrize("scheme", ["int4-g32", "int8-channel", "int3-g32", "int8-tensor"])
def test_dequantizing_in_each_forward_gives_output_and_gradient_of_the_float_layer(
    scheme: str,
) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = QuantLinear.from_linear(linear(64, 5), Scheme.parse(scheme))
    weight, peer = layer.dequantize(), Dequantizing(layer)
    x = torch.randn(3, 64, generator=generator).requires_grad_()
    y = peer(x)
    assert layer.bias is not None
    torch.testing.assert_close(y, x @ weight.T + layer.bias)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(grad, 2 * y @ weight)


def test_the_restated_step_is_mezo() -> None:
    """Its four sweeps leave the weights where one merged update would: theta - lr c u."""
    layer = linear(4, 3)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    mezo = MeZO(layer, lambda: layer(x).square().mean(), lr=0.1, eps=1e-3)
    generator = torch.Generator()
    u = {n: torch.randn(p.shape, generator=generator) for n, p in layer.named_parameters()}
    start = {n: p.clone() for n, p in layer.named_parameters()}

    def loss(sign: int) -> float:
        w, b = (start[n] + sign * 1e-3 * u[n] for n in ("weight", "bias"))
        return float((x @ w.T + b).square().mean())

    slope = (loss(1) - loss(-1)) / 2e-3
    mezo.step()
    for name, parameter in layer.named_parameters():
        wanted = start[name] - 0.1 * slope * u[name]
        assert torch.allclose(parameter, wanted, atol=2e-4), name
    moved = layer.weight.clone()
    mezo.step()
    second = (layer.weight - moved) / (moved - start["weight"])
    assert float(second.std()) > 0.1, "the second step has a direction of its own"


def test_the_restated_step_is_qzo() -> None:
    """S - lr clip(c) u, codes untouched, and no scale below the floor."""
    layer = QuantLinear.from_linear(linear(64, 3), Scheme.parse("int4-g32"))
    model = nn.Sequential(layer).requires_grad_(False)
    (peer,) = dequantizing_(model)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    start, codes = peer.scale.clone(), peer.codes.clone()
    u = torch.randn(start.shape, generator=torch.Generator())

    def loss() -> torch.Tensor:
        found: torch.Tensor = model(x).square().mean()
        return found

    def at(scale: torch.Tensor) -> float:
        peer.scale.copy_(scale)
        return float(loss())

    slope = (at(start + 1e-3 * u) - at(start - 1e-3 * u)) / 2e-3
    peer.scale.copy_(start)
    for clip in (100.0, abs(slope) / 2):
        peer.scale.copy_(start)
        QZO([peer.scale], loss, lr=1e-3, clip=clip, floor=1e-7).step()
        wanted = (start - 1e-3 * max(-clip, min(clip, slope)) * u).clamp_min(1e-7)
        torch.testing.assert_close(peer.scale, wanted, atol=1e-5, rtol=0)
    assert torch.equal(peer.codes, codes)
    QZO([peer.scale], loss, lr=1e3).step()
    assert float(peer.scale.min()) >= 1e-7


@pytest.mark.parametrize("name", [contenders.LORA, contenders.QLORA, contenders.ADAMW])
def test_backprop_peers_move_what_they_train_and_nothing_else(name: str) -> None:
    pytest.importorskip("peft")
    contender = contenders.all_contenders(BenchConfig())[name]
    scheme = None if contender.scheme is None else "int4-g32"
    prepared = Workload("llama-tiny", 2, 8).prepared(scheme, contender.dtype)
    work = contender.start(prepared)
    state = {k: v.clone() for k, v in prepared.model.state_dict().items()}
    work()
    moved = {
        k for k, v in prepared.model.state_dict().items() if not torch.equal(v, state[k])
    }  # fmt: skip
    assert moved
    factors = [p for n, p in prepared.model.named_parameters() if "lora_" in n]
    assert all(p.dtype == torch.float32 for p in factors)
    adapters = {k for k in state if "lora_" in k}
    if name == contenders.ADAMW:
        assert not adapters
        assert any("gate_proj" in k for k in moved)
    else:
        assert moved == adapters
        assert {k.split(".")[-4] for k in adapters} == {"q_proj", "v_proj"}


def test_a_row_without_a_value_misses_its_target() -> None:
    assert Row("x", None, "s", target=1.0).met is False
    assert Row("x", None, "s", target=1.0, at_least=True).met is False
    assert Row("x", 3.0, "s").met is None
