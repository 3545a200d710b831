"""DiZO: MeZO, and runs of steps on each layer's distance from where it started.

Run: pytest tests/methods/test_dizo.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from restated import Restated, exact
from toys import batch, bert, cross_entropy, gpt2, llama, small

from zotune import methods
from zotune.core import spaces
from zotune.core.evaluator import TorchEvaluator
from zotune.core.noise import draw
from zotune.core.perturbation import Gaussian
from zotune.core.step import Tuner
from zotune.errors import BadInput
from zotune.methods.dizo import Distances

PAPER = {"lr": 0.05, "eps": 1e-3, "every": 4, "steps": 3, "ratio_eps": 0.1, "tau": 0.15}


def tuner_of(model: torch.nn.Module, dtype: Any = torch.float32, **options: Any) -> Tuner:
    model.to(dtype)
    space = spaces.get("weights").build(model)
    method = methods.get("dizo", **{**PAPER, **options})
    evaluator = TorchEvaluator(model, space, cross_entropy)
    return Tuner(space, method, 3, evaluator=evaluator, total=20)  # type: ignore[arg-type]


def opt() -> torch.nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=29, hidden_size=16, num_hidden_layers=2, ffn_dim=32, num_attention_heads=2,
        max_position_embeddings=16, word_embed_proj_dim=16,
    )  # fmt: skip
    return OPTForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "wanted"),
    [(opt, ("k_proj", "v_proj")), (llama, ("k_proj", "v_proj")), (gpt2, ("c_attn",)),
     (bert, ("self.key", "self.value"))],
)  # fmt: skip
def test_keys_and_values_are_projected_whatever_the_model_calls_them(
    make: Any, wanted: tuple[str, ...]
) -> None:
    model = make()
    space = spaces.get("weights").build(model)
    chosen = Distances().chosen(space)
    assert len(chosen) == 2 * len(wanted)
    assert all(any(f".{w}.weight" in name for w in wanted) for name in chosen)


@pytest.mark.parametrize("queries", [1, 2])
def test_dizo_restated(queries: int) -> None:
    """Ratios of the two layers that `targets` names, from anchors, with z clipped."""
    paper, projected = Restated(), ("up.weight", "down.weight")
    every, steps, reps, tau = PAPER["every"], PAPER["steps"], PAPER["ratio_eps"], PAPER["tau"]
    rlr, bounds = 20.0, 0
    began, rho = paper.start, dict.fromkeys(projected, 1.0)
    for t in range(20):
        keys = [paper.key(t, j) for j in range(queries)]
        if t % (every + steps) < every:
            g = {n: torch.zeros_like(p) for n, p in paper.theta.items()}
            for key in keys:
                u = paper.direction(Gaussian(), key)
                c = (paper.loss(t, u, PAPER["eps"]) - paper.loss(t, u, -PAPER["eps"])) / 2
                for n in g:
                    g[n] += c / PAPER["eps"] * u[n] / queries
            paper.move_(g, -PAPER["lr"])
            began, rho = None, dict.fromkeys(projected, 1.0)
            continue
        if began is None:
            began = {n: p.clone() for n, p in paper.theta.items()}
        g = dict.fromkeys(projected, 0.0)
        for key in keys:
            z = {n: float(draw("gaussian", key, f"{n}#z", 0, 1).clamp(-tau / reps, tau / reps))
                 for n in projected}  # fmt: skip
            u = {n: torch.zeros_like(p) for n, p in paper.theta.items()}
            u |= {n: z[n] * (paper.theta[n] - paper.start[n]) for n in projected}
            c = (paper.loss(t, u, reps) - paper.loss(t, u, -reps)) / (2 * reps)
            for n in projected:
                g[n] += c * z[n] / queries
        for n in projected:
            rho[n] = min(max(rho[n] * (1 - rlr * g[n]), 1 - tau), 1 + tau)
            bounds += abs(abs(rho[n] - 1) - tau) < 1e-9
            paper.theta[n].copy_(paper.start[n] + rho[n] * (began[n] - paper.start[n]))
    assert 0 < bounds < 16
    options = {**PAPER, "targets": "up.weight|down.weight", "ratio_lr": rlr, "queries": queries}
    tuner = paper.tune(methods.get("dizo", **options), 20)  # type: ignore[arg-type]
    assert paper.apart() < 1e-4
    for n in projected:
        held = tuner.state["dizo-distances"][n]["ratio"]
        assert float(held) == pytest.approx(rho[n], abs=1e-5)


def test_a_ratio_of_one_moves_nothing() -> None:
    tuner = tuner_of(small(), ratio_lr=0.0, targets="up")
    for t in range(7):
        before = {b.name: b.value().clone() for b in tuner.space}
        tuner.step(batch(6, t))
        same = [torch.equal(b.value(), before[b.name]) for b in tuner.space]
        assert all(same) if t >= 4 else not any(same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ratios_are_bounded_and_rounding_does_not_pile_up(dtype: torch.dtype) -> None:
    """Behind many steps that throw the ratio from bound to bound, theta is anchor + ratio D."""
    tuner = tuner_of(small(), dtype, steps=40, ratio_lr=1e4, targets="up.weight")
    block = next(b for b in tuner.space if b.name == "up.weight")
    for t in range(4):
        tuner.step(batch(6, t))
    anchor, began = block.memory["anchor"].double(), block.value().double()
    seen = set()
    for t in range(4, 44):
        tuner.step(batch(6, t))
        ratio = float(tuner.state["dizo-distances"]["up.weight"]["ratio"])
        assert 1 - 0.15 - 1e-6 <= ratio <= 1 + 0.15 + 1e-6
        seen.add(round(ratio, 2))
    assert {0.85, 1.15} <= seen
    wanted = anchor + ratio * (began - anchor)
    ulp = torch.finfo(dtype).eps * float(anchor.abs().max())
    error = (block.value().double() - wanted).square().mean().sqrt()
    assert float(error) < 3 * ulp  # a walk of 40 roundings of at most half an ulp or one


def test_only_what_is_projected_moves_and_has_a_copy() -> None:
    tuner = tuner_of(llama(), every=1, ratio_lr=0.5)
    chosen = Distances().chosen(tuner.space)
    size = sum(b.numel for b in tuner.space if b.name in chosen)
    assert tuner.kept_bytes == 4 * size + 4 * len(chosen)
    tuner.step(batch(4, 0))
    before = {b.name: b.value().clone() for b in tuner.space}
    tuner.step(batch(4, 1))
    moved = {b.name for b in tuner.space if not torch.equal(b.value(), before[b.name])}
    assert moved == set(chosen)


def test_resume_in_the_middle_of_an_interlude_is_bitwise() -> None:
    tuner = tuner_of(small(), ratio_lr=5.0)
    log = []
    tuner.record = lambda t, e: log.append(e)
    for t in range(6):
        tuner.step(batch(6, t))
    saved = {k: v.clone() for k, v in tuner.state_tensors().items()}
    again = tuner_of(small(), ratio_lr=5.0)
    again.load_(saved, 6, 6)
    again.remember_(log[-1])
    for each in (tuner, again):
        for t in range(6, 13):
            each.step(batch(6, t))
    for a, b in zip(tuner.space, again.space, strict=True):
        assert torch.equal(a.value(), b.value())
    replayed = tuner_of(small(), ratio_lr=5.0)
    for estimate in log:
        replayed.apply_(estimate)
    for a, b in zip(tuner.space, replayed.space, strict=True):
        assert torch.equal(a.value(), b.value())


def test_a_blocks_own_eps_and_lr_do_not_change_its_ratio() -> None:
    def run(text: str) -> float:
        model = small()
        space = spaces.parse(text).build(model)
        method = methods.get("dizo", **{**PAPER, "every": 1, "steps": 1, "targets": "up.weight"})
        tuner = Tuner(space, method, 3, evaluator=TorchEvaluator(model, space, exact))  # type: ignore[arg-type]
        (block,) = space
        tuner.load_({**tuner.state_tensors(), f"block/{block.name}": block.value() + 0.1}, 1, 1)
        tuner.step(batch(6, 1))
        return float(tuner.state["dizo-distances"]["up.weight"]["ratio"])

    plain = run("weights(pattern='up.weight')")
    assert plain != 1.0
    assert run("weights(pattern='up.weight', eps=0.01, lr=0.3)") == pytest.approx(plain, rel=1e-4)


def test_refusals() -> None:
    model = small()
    with pytest.raises(BadInput, match="matches no block"):
        tuner_of(model, targets="k_proj")
    space = spaces.parse("weights(pattern='up') + head(exact=True)").build(model)
    with pytest.raises(BadInput, match="exact"):
        Tuner(space, methods.get("dizo"), 3)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="use 'weights', or mezo"):
        Tuner(spaces.get("norms").build(model), methods.get("dizo"), 3)  # type: ignore[arg-type]
    for bad in ({"tau": 1.5}, {"every": 0}, {"ratio_eps": 0.0}):
        with pytest.raises(BadInput, match=next(iter(bad)).removeprefix("ratio_")):
            methods.get("dizo", **bad)
