"""P-RGE: one batched forward equals forwards one at a time, and only B is tuned.

Run: pytest tests/methods/test_p_rge.py
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import batch, bert, cross_entropy, llama, observe, small

from zotune import methods
from zotune.core import spaces
from zotune.core.evaluator import TorchEvaluator
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.core.space import Space
from zotune.core.spaces import Lora
from zotune.core.step import Tuner
from zotune.models.adapter import adapters

LINEARS = {"small": "up|down", "bert": "query|dense", "llama": "_proj"}
FROZEN = "lora(freeze_a=True, rank=2, targets={})"


def built(make: Any, text: str) -> tuple[Any, Space]:
    """A model and a space over it, its B moved off zero."""
    model = make()
    space = spaces.parse(text.format(f"'{LINEARS[make.__name__]}'")).build(model, observe)
    space.bind_(1e-2, 1.0, "relative")
    for block in space:
        if block.name.endswith("lora_B"):
            block.load_(0.1 * Gaussian().draw(Key(9), block))
    return model, space


@pytest.mark.parametrize("make", [small, bert, llama])
@pytest.mark.parametrize(
    "text", [FROZEN, "lora(rank=2, targets={})", "adapter(rank=2, targets={})"]
)
@pytest.mark.parametrize(("directions", "queries"), [("batch", 4), ("example", 2)])
def test_batched_losses_are_the_losses_of_forwards_one_at_a_time(
    make: Any, text: str, directions: str, queries: int
) -> None:
    model, space = built(make, text)
    method = methods.get("p-rge", eps=0.3, directions=directions, queries=queries)
    probes = method.estimator.ask(Key(3))
    together = TorchEvaluator(model, space, cross_entropy)
    apart = TorchEvaluator(model, space, cross_entropy, stack=1, micro_batch=1, fast=False)
    found = together.losses(probes, batch(5), Gaussian()).per_example
    wanted = apart.losses(probes, batch(5), Gaussian()).per_example
    assert found.shape == (2 * queries, 5)
    assert float((wanted - wanted.mean(0)).abs().max()) > 1e-3
    assert torch.allclose(found, wanted, rtol=0, atol=1e-5)


def test_the_model_runs_once_a_step() -> None:
    model, space = built(small, FROZEN)
    rows: list[int] = []
    model.register_forward_pre_hook(lambda m, args, kwargs: rows.append(len(kwargs["input_ids"])),
                                    with_kwargs=True)  # fmt: skip
    for directions, wanted in (("batch", 5 * 6), ("example", 5 * 6)):
        method = methods.get("p-rge", directions=directions, queries=3)
        tuner = Tuner(space, method, 1, evaluator=TorchEvaluator(model, space, cross_entropy))
        tuner.step(batch(5))
        assert rows == [wanted]
        assert tuner.kept_bytes == 0
        rows.clear()


def test_with_a_frozen_a_only_b_is_tuned() -> None:
    model, space = built(small, FROZEN)
    assert [b.name for b in space] == ["up.lora_B", "down.lora_B"]
    assert eval(repr(Lora(freeze_a=True)), {"Lora": Lora}) == Lora(freeze_a=True)
    _, both = built(small, "lora(rank=2, targets={})")
    units = {b.name: b.unit for b in both}
    assert all(b.unit == units[b.name] for b in space)
    before = {path: (a.A.clone(), a.B.clone()) for path, _, a in adapters(model)}
    method = methods.get("p-rge", lr=1.0)
    tuner = Tuner(space, method, 1, evaluator=TorchEvaluator(model, space, cross_entropy))
    assert tuner.step(batch(5)).applied
    for path, _, adapter in adapters(model):
        assert torch.equal(adapter.A, before[path][0])
        assert not torch.equal(adapter.B, before[path][1])


@pytest.mark.parametrize("directions", ["batch", "example"])
def test_twenty_steps_are_the_formula_in_float64(directions: str) -> None:
    lr, eps, queries, examples = 0.05, 1e-2, 2, 4
    model, space = built(small, FROZEN)
    twin, _ = built(small, FROZEN)
    held = {f"{path}.lora_B": adapter for path, _, adapter in adapters(twin)}
    B = {n: a.B.double().clone() for n, a in held.items()}
    start = {n: b.clone() for n, b in B.items()}

    def losses(values: dict[str, Tensor], t: int) -> Tensor:
        for name, adapter in held.items():
            adapter.B.copy_(values[name])
        with torch.no_grad():
            return cross_entropy(twin, batch(examples, t))[0].double()

    for t in range(20):
        step = {n: torch.zeros_like(b) for n, b in B.items()}
        for j in range(queries):
            lanes = range(examples) if directions == "example" else [None]
            for lane in lanes:
                key = Key(1, step=t, query=j, lane=lane or 0)
                u = {b.name: Gaussian().draw(key, b).double() for b in space}
                pair = [losses({n: B[n] + s * eps * u[n] for n in B}, t) for s in (1, -1)]
                each = (pair[0] - pair[1]) / (2 * eps)
                c = float(each.mean() if lane is None else each[lane])
                for n in B:
                    step[n] += c * u[n] / (queries * len(lanes))
        B = {n: B[n] - lr * step[n] for n in B}
    method = methods.get("p-rge", lr=lr, eps=eps, queries=queries, directions=directions,
                         units="absolute")  # fmt: skip
    tuner = Tuner(space, method, 1, evaluator=TorchEvaluator(model, space, cross_entropy))
    for t in range(20):
        tuner.step(batch(examples, t))
    error = sum(float((b.value() - B[b.name]).square().sum()) for b in space)
    length = sum(float((B[n] - start[n]).square().sum()) for n in B)
    assert math.sqrt(error / length) < 1e-3  # the losses are float32
