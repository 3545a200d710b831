"""ZO-Act: coefficients from zero on frozen bases, stepped by SGD or Adam.

Run: pytest tests/methods/test_zo_act.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from restated import exact
from torch import Tensor
from torch.nn import functional as F
from toys import Case, batch, digest, logits_of, small

from zotune import methods
from zotune.core.evaluator import TorchEvaluator
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.core.step import Tuner
from zotune.errors import BadInput

SEED, STEPS = 11, 20


@pytest.mark.parametrize("scheme", [None, "int4-g8"])
def test_coefficients_of_zero_leave_the_outputs_as_they_are_bit_for_bit(scheme: str | None) -> None:
    model = small(0, scheme)
    before = logits_of(model, batch()["input_ids"])
    Case("adapter(rank=3)").build(model)
    assert torch.equal(logits_of(model, batch()["input_ids"]), before)


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_zo_act_is_spsa_on_coefficients_of_bases_that_stay(rule: Any) -> None:
    lr, eps = 0.02, 1e-2
    model = small().double()
    space = Case("adapter(rank=2)").build(model)
    owner = {b.name: b.owners[0].module for b in space}
    bases = {n: m.A.clone() for n, m in owner.items()}
    weights = {n: h for n, h in digest(model).items() if not n.endswith(".B")}
    unit = {b.name: b.unit for b in space}
    C = {b.name: torch.zeros(b.shape, dtype=torch.float64) for b in space}
    optimizer = (torch.optim.SGD if rule == "sgd" else torch.optim.Adam)(C.values(), lr=lr)
    state = {n: p.double() for n, p in small().named_parameters()}

    def loss(at: dict[str, Tensor], t: int) -> float:
        def linear(path: str, x: Tensor) -> Tensor:
            name = f"{path}.lora_B"
            out = F.linear(x, state[f"{path}.weight"], state[f"{path}.bias"])
            if name not in at:
                return out
            return out + unit[name] * (x @ bases[name].double().mT) @ at[name].mT

        here = batch(6, t)
        x = state["embed.weight"][here["input_ids"]]
        y = F.layer_norm(x, (16,), state["norm.weight"], state["norm.bias"])
        x = x + linear("down", torch.tanh(linear("up", y)))
        return float(F.cross_entropy(linear("head", x.mean(1)), here["label"]))

    for t in range(STEPS):
        u = {b.name: Gaussian().draw(Key(SEED, step=t), b).double() for b in space}
        plus = loss({n: C[n] + eps * u[n] for n in C}, t)
        minus = loss({n: C[n] - eps * u[n] for n in C}, t)
        for n, c in C.items():
            c.grad = (plus - minus) / (2 * eps) * u[n]
        optimizer.step()
    method = methods.get("zo-act", lr=lr, eps=eps, rule=rule, schedule="constant")
    evaluator = TorchEvaluator(model, space, exact)
    tuner = Tuner(space, method, SEED, evaluator=evaluator)  # type: ignore[arg-type]
    for t in range(STEPS):
        tuner.step(batch(6, t))
    for block in space:
        wanted = unit[block.name] * C[block.name]
        error = (block.value() - wanted).norm() / wanted.norm()
        assert float(error) < 1e-3
        assert torch.equal(owner[block.name].A, bases[block.name])
    assert {n: h for n, h in digest(model).items() if not n.endswith(".B")} == weights
    assert tuner.kept_bytes == (0 if rule == "sgd" else 8 * space.numel)
    assert tuner.replayable


def test_what_is_no_rule_is_refused() -> None:
    with pytest.raises(BadInput, match="want 'sgd' or 'adam'"):
        methods.get("zo-act", rule="muon")
