"""Papers restated: a dozen lines of float64 each, against the tuner.

Run: pytest tests/methods/test_papers.py

The restatements take their directions from the same noise, and write the parameters in place as
the papers do; only the coefficients, the signs and the updates are theirs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import batch, small

from zotune import methods
from zotune.core import noise, spaces
from zotune.core.evaluator import TorchEvaluator
from zotune.core.grid import Grid, Rounded
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.core.space import Space, tensors
from zotune.core.step import Tuner
from zotune.quant import QuantLinear
from zotune.tasks.batch import Batch

STEPS, SEED = 20, 11


def objective(model: nn.Module, here: Batch) -> tuple[Tensor, Tensor]:
    """Cross entropy in the model's own precision, float64 here."""
    loss = F.cross_entropy(model(here["input_ids"]), here["label"], reduction="none")
    return loss, torch.ones_like(loss)


def mean_loss(model: nn.Module, here: Batch) -> float:
    with torch.no_grad():
        return float(objective(model, here)[0].double().mean())


def tuned(model: nn.Module, space: Space, method: Any) -> None:
    evaluator = TorchEvaluator(model, space, objective)
    tuner = Tuner(space, method, SEED, evaluator=evaluator, total=STEPS)
    for t in range(STEPS):
        assert tuner.step(batch(6, t)).applied


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """Distance between two runs, relative to how far they went."""
    error = sum(float((ours[n].double() - theirs[n].double()).square().sum()) for n in start)
    length = sum(float((theirs[n].double() - start[n].double()).square().sum()) for n in start)
    return math.sqrt(error / length)


@pytest.mark.parametrize(("queries", "decay"), [(1, 0.0), (3, 0.1)])
def test_mezo_is_the_papers_four_sweeps_in_place(queries: int, decay: float) -> None:
    lr, eps = 0.05, 1e-3
    model, restated = small().double(), small().double()
    space = spaces.get("weights").build(model)
    theta = dict(restated.named_parameters())
    start = {n: p.detach().clone() for n, p in theta.items()}
    blocks = {b.name: b for b in space}

    def perturb(key: Key, amount: float) -> None:
        for name, p in theta.items():
            p.add_(amount * Gaussian().draw(key, blocks[name]).double())

    with torch.no_grad():
        for t in range(STEPS):
            keys = [Key(SEED, step=t, query=j) for j in range(queries)]
            c = []
            for key in keys:
                perturb(key, eps)
                plus = mean_loss(restated, batch(6, t))
                perturb(key, -2 * eps)
                minus = mean_loss(restated, batch(6, t))
                perturb(key, eps)
                c.append((plus - minus) / (2 * eps))
            for name, p in theta.items():
                if blocks[name].decay:
                    p.sub_(lr * decay * p)
            for key, cj in zip(keys, c, strict=True):
                perturb(key, -lr / queries * cj)
    tuned(model, space, methods.get("mezo", lr=lr, eps=eps, queries=queries, weight_decay=decay))
    assert apart(dict(model.named_parameters()), theta, start) < 1e-5


@pytest.mark.parametrize("units", ["relative", "absolute"])
def test_qzo_is_clipped_spsa_on_the_scales_with_codes_frozen(units: Any) -> None:
    lr, eps, limit = (0.05, 0.05, 0.2) if units == "relative" else (1e-3, 2e-3, 1.0)
    model = small(0, "int4-channel").double()
    restated = copy.deepcopy(model)
    space = spaces.get("scales").build(model)
    layers = {f"{n}.scale": m for n, m in restated.named_modules() if isinstance(m, QuantLinear)}
    S = {n: m.scale.double() for n, m in layers.items()}
    start = {n: s.clone() for n, s in S.items()}
    unit = {n: s.clone() if units == "relative" else torch.ones_like(s) for n, s in S.items()}
    codes = {n: m.codes.clone() for n, m in model.named_modules() if isinstance(m, QuantLinear)}

    def loss_at(moved: dict[str, Tensor], t: int) -> float:
        for name, layer in layers.items():
            layer.scale.copy_(moved[name])
        return mean_loss(restated, batch(6, t))

    clipped = 0
    for t in range(STEPS):
        u = {b.name: Gaussian().draw(Key(SEED, step=t), b).double() * unit[b.name] for b in space}
        plus = loss_at({n: S[n] + eps * u[n] for n in S}, t)
        minus = loss_at({n: S[n] - eps * u[n] for n in S}, t)
        c = (plus - minus) / (2 * eps)
        clipped += abs(c) > limit
        c = min(max(c, -limit), limit)
        S = {n: (S[n] - lr * c * u[n]).clamp_min(0) for n in S}
    assert 0 < clipped < STEPS
    tuned(model, space, methods.get("qzo", lr=lr, eps=eps, clip=limit, units=units))
    assert apart({b.name: b.value() for b in space}, S, start) < 1e-5
    for name, before in codes.items():
        assert torch.equal(model.get_submodule(name).codes, before)


@pytest.mark.parametrize("scheme", ["int8-channel", "int4-g8"])
@pytest.mark.parametrize("options", [{}, {"lr": 2.0, "eps": 3.0, "density": 0.3},
                                     {"lr": 0.02, "eps": 0.01, "relative": False}])  # fmt: skip
def test_zoqo_moves_codes_against_the_sign_of_the_loss_difference(
    scheme: str, options: dict[str, Any]
) -> None:
    method = methods.get("zoqo", **options)
    lr, eps = options.get("lr", 1.0), options.get("eps", 1.0)
    model = small(0, scheme)
    restated = copy.deepcopy(model)
    space = spaces.get("codes").build(model)
    layers = {f"{n}.codes": m for n, m in restated.named_modules() if isinstance(m, QuantLinear)}
    x = {n: m.unpacked().double() for n, m in layers.items()}
    start = {n: v.clone() for n, v in x.items()}

    def loss_at(codes: dict[str, Tensor], t: int) -> float:
        for name, layer in layers.items():
            layer.set_codes_(codes[name].to(torch.int8))
        return mean_loss(restated, batch(6, t))

    def clamp(name: str, codes: Tensor) -> Tensor:
        return codes.clamp(layers[name].scheme.lowest, layers[name].scheme.highest)

    relative = options.get("relative", True)
    for t in range(STEPS):
        law = Grid(eps, relative, options.get("density", 1.0))
        u = {b.name: law.draw(Key(SEED, step=t), b).double() for b in space}
        plus = loss_at({n: clamp(n, x[n] + u[n]) for n in x}, t)
        minus = loss_at({n: clamp(n, x[n] - u[n]) for n in x}, t)
        sign = (plus > minus) - (plus < minus)
        for block in space:
            s = torch.ones(1) if relative else block.grid
            assert s is not None
            step = (lr / s.double()).floor().clamp_min(1)
            x[block.name] = clamp(block.name, x[block.name] - step * sign * u[block.name].sign())
    tuned(model, space, method)
    for block in space:
        assert torch.equal(block.value().double(), x[block.name])
        assert not torch.equal(x[block.name], start[block.name])
        if options == {}:  # a step changes each coordinate by 0 or one code
            assert float((x[block.name] - start[block.name]).abs().max()) <= STEPS


def test_quzo_probes_one_rounding_and_steps_along_another_onto_the_grid() -> None:
    lr, eps, queries = 0.4, 0.5, 2
    model = small(0, "int8-channel")
    restated = copy.deepcopy(model)
    space = spaces.get("codes").build(model)
    layers = {b.name: restated.get_submodule(b.name.removesuffix(".codes")) for b in space}
    W = {b.name: b.value().double() for b in space}
    start = {n: w.clone() for n, w in W.items()}
    law = Rounded(4)

    def loss_at(codes: dict[str, Tensor], t: int) -> float:
        for name, layer in layers.items():
            layer.codes = codes[name].clamp(-128, 127).float()  # fractions included
        return mean_loss(restated, batch(6, t))

    for t in range(STEPS):
        keys = [Key(SEED, step=t, query=j) for j in range(queries)]
        c = []
        for key in keys:
            u1 = {b.name: law.draw(key, b).double() for b in space}
            plus = loss_at({n: W[n] + eps * u1[n] for n in W}, t)
            minus = loss_at({n: W[n] - eps * u1[n] for n in W}, t)
            c.append((plus - minus) / (2 * eps))
        for b in space:
            u2 = [law.combine([key], [1.0], b, 0, b.rows).double() for key in keys]
            step = lr * (1 - t / STEPS) * (c[0] * u2[0] + c[1] * u2[1]) / queries
            chance = noise.draw("uniform", keys[0], f"{b.name}#round", 0, b.numel).view(b.shape)
            up = (chance.double() + 1) / 2 < step - step.floor()
            W[b.name] = (W[b.name] - step.floor() - up.double()).clamp(-128, 127)
    tuned(model, space, methods.get("quzo", lr=lr, eps=eps, queries=queries))
    for block in space:
        assert not torch.equal(W[block.name], start[block.name])
        # A chance within float32 rounding of the fraction may fall on either side of it.
        assert float((block.value().double() != W[block.name]).double().mean()) < 1e-3


def test_zo_adam_is_adam_on_the_estimates() -> None:
    lr, eps = 0.01, 1e-3
    model, restated = small().double(), small().double()
    space = spaces.get("weights").build(model)
    theta = dict(restated.named_parameters())
    start = {n: p.detach().clone() for n, p in theta.items()}
    optimizer = torch.optim.Adam(theta.values(), lr=lr)
    for t in range(STEPS):
        key = Key(SEED, step=t)
        u = {b.name: Gaussian().draw(key, b).double() for b in space}
        losses = []
        for sign in (1, -1):
            point = copy.deepcopy(restated)
            for n, p in point.named_parameters():
                p.add_(sign * eps * u[n])
            losses.append(mean_loss(point, batch(6, t)))
        c = (losses[0] - losses[1]) / (2 * eps)
        for n, p in theta.items():
            p.grad = c * u[n]
        optimizer.step()
    tuned(model, space, methods.get("zo-adam", lr=lr, eps=eps, units="absolute"))
    assert apart(dict(model.named_parameters()), theta, start) < 1e-5


def test_zo_sign_moves_every_weight_by_lr_against_its_estimate() -> None:
    model = small()
    space = spaces.get("weights").build(model)
    before = {b.name: b.value().clone() for b in space}
    evaluator = TorchEvaluator(model, space, objective)
    method = methods.get("zo-sign", lr=2.0**-6, eps=1e-3)
    report = Tuner(space, method, SEED, evaluator=evaluator, total=9).step(batch(6))
    assert report.estimate is not None
    sign = math.copysign(1, report.estimate.coefficients[0])
    for b in space:
        u = Gaussian().draw(Key(SEED), b)
        assert torch.allclose(
            b.value(), before[b.name] - 2.0**-6 * sign * u.sign(), rtol=0, atol=1e-7
        )


# ---- QuZO's bias, and that two independent roundings have none -----------------------


@contextmanager
def one_gaussian(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every key draws the same u, so that only the roundings differ."""
    own: Callable[..., Tensor] = noise.draw

    def draw(law: Any, key: Key, *args: Any, **kwargs: Any) -> Tensor:
        return own(law, Key(1) if law == "gaussian" else key, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(noise, "draw", draw)
        yield


def test_two_independent_roundings_have_no_bias_and_one_shared_rounding_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    law, draws, k = Rounded(4), 8000, 2.0
    (block,) = tensors({"w": torch.zeros(8)})
    g = torch.linspace(-1, 1, 8, dtype=torch.float64)
    u = Gaussian().draw(Key(1), block).double()
    assert float((u * k).abs().max()) < 7  # inside the range, where rounding is unbiased
    with one_gaussian(monkeypatch):
        keys = [Key(2, step=t) for t in range(draws)]
        u1 = torch.stack([law.draw(key, block) for key in keys]).double()
        u2 = torch.stack([law.combine([key], [1.0], block, 0, 8) for key in keys]).double()
    assert (u1 != u2).any(1).double().mean() > 0.5
    for rounded in (u1, u2):
        assert within_errors(rounded, u)
    wanted = (u @ g) * u
    f = u * k - (u * k).floor()
    bias = f * (1 - f) * g / k**2
    assert within_errors((u1 @ g).unsqueeze(1) * u2, wanted)
    shared = (u1 @ g).unsqueeze(1) * u1
    assert within_errors(shared, wanted + bias)
    assert not within_errors(shared, wanted)  # so this test could fail


def within_errors(samples: Tensor, mean: Tensor) -> bool:
    """Every element of the samples' mean within four of its standard errors."""
    error = samples.std(0) / math.sqrt(len(samples))
    return bool(((samples.mean(0) - mean).abs() <= 4 * error + 1e-9).all())
