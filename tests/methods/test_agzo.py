"""AGZO: bases from activations, probes and steps in their span, restated.

Run: pytest tests/methods/test_agzo.py
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import toys
from restated import Restated
from torch import Tensor, nn
from toys import batch, cross_entropy, gpt2, llama, small

from zotune import methods
from zotune.core import spaces
from zotune.core.block import Block
from zotune.core.evaluator import TorchEvaluator
from zotune.core.noise import Key, draw
from zotune.core.perturbation import Gaussian, Perturbation
from zotune.core.space import Space
from zotune.core.step import Tuner
from zotune.errors import BadInput
from zotune.methods.agzo import ActivationGuided
from zotune.tasks.batch import Batch

SEED, STEPS = 11, 20


def observed(model: nn.Module, law: ActivationGuided, **options: Any) -> Space:
    """A space over the model whose blocks know the bases of one batch."""
    space = spaces.get("weights").build(model)
    method = methods.get("agzo", lr=0.0).but(perturbation=law)  # type: ignore[union-attr]
    evaluator = TorchEvaluator(model, space, cross_entropy, **options)
    Tuner(space, method, SEED, evaluator=evaluator).step(batch(16, 0))
    return space


def guided(space: Space, law: ActivationGuided) -> list[Block]:
    return [b for b in space if law.inner(b) is not None]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    for p in parameters.values():
        p.requires_grad_(True)
    found = torch.autograd.grad(cross_entropy(model, batch(16, 0))[0].mean(), parameters.values())
    for p in parameters.values():
        p.requires_grad_(False)
    return dict(zip(parameters, found, strict=True))


def inputs_of(model: nn.Module, path: str, here: Batch | None = None) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    with torch.no_grad():
        cross_entropy(model, here or batch(16, 0))
    handle.remove()
    return seen[0].flatten(0, -2)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("rank", [1, 4])
def test_bases_are_orthonormal_and_those_of_layers_that_read_one_tensor_are_one(
    make: Any, rank: int
) -> None:
    law, model = ActivationGuided(rank, power=30), make()
    space = observed(model, law)
    bases = {b.name: law.basis(b) for b in guided(space, law)}
    assert len(bases) >= 8
    for name, a in bases.items():
        x = inputs_of(model, name.removesuffix(".weight"))
        assert a.shape == (x.shape[1], rank)
        torch.testing.assert_close(a.mT @ a, torch.eye(rank), atol=1e-5, rtol=0)
        best = torch.linalg.svdvals(x)[:rank].square().sum()
        assert float((x @ a).square().sum()) > 0.98 * float(best)
    if make is llama:
        q, k, v = (bases[f"model.layers.0.self_attn.{p}_proj.weight"] for p in "qkv")
        assert torch.equal(q, k)
        assert torch.equal(q, v)
        assert not torch.equal(q, bases["model.layers.0.self_attn.o_proj.weight"])


def test_the_gradients_rows_lie_in_the_span_of_the_inputs_and_u_in_that_of_the_basis() -> None:
    law, model = ActivationGuided(rank=2), gpt2()
    space = observed(model, law)
    g = gradients(model)
    for block in guided(space, law):
        x = inputs_of(model, block.name.removesuffix(".weight"))  # Conv1D: (in, out)
        span = torch.linalg.svd(x.double(), full_matrices=False).Vh
        span = span[: torch.linalg.matrix_rank(x)]
        u = law.draw(Key(SEED), block)
        for matrix, basis in ((g[block.name], span.mT), (u, law.basis(block)), (u, span.mT)):
            inside = basis.double() @ (basis.double().mT @ matrix.double())
            assert float((matrix - inside).norm() / matrix.norm()) < 1e-4


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_the_gain_in_squared_cosine_is_the_share_of_the_gradient_inside_times_in_over_rank(
    rank: int,
) -> None:
    """Identity 3 with 4000 draws: std of the mean of cos^2 is sqrt(2 / 4000) = 2.2 % of it."""
    law, draws = ActivationGuided(rank), 4000
    layer = nn.Linear(64, 8, bias=False).requires_grad_(False)
    space = spaces.get("weights").build(layer)
    (block,) = space
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    block.memory.update(law.state(block))
    law.observe_(block, torch.cat([x] * 20))
    g = torch.randn(8, 5, generator=torch.Generator().manual_seed(2)) @ x
    u = law.draw_lanes([Key(SEED, step=t) for t in range(draws)], block)
    cos = (u * g).sum((1, 2)).square() / u.square().sum((1, 2)) / g.square().sum()
    inside = float((g @ law.basis(block)).square().sum() / g.square().sum())
    assert float(cos.mean()) == pytest.approx(inside / (8 * rank), rel=0.1)
    if rank == 64:
        assert inside == pytest.approx(1.0, rel=1e-4)  # and that is dense noise's 1 / d


def rms_cosine(law: Perturbation, blocks: Any, g: dict[str, Tensor], draws: int = 150) -> float:
    total = 0.0
    for t in range(draws):
        u = {b.name: law.draw(Key(SEED, step=t), b) for b in blocks}
        dot = sum(float((u[n] * g[n]).sum()) for n in u)
        norms = sum(float(u[n].square().sum()) for n in u)
        total += dot**2 / norms / sum(float(g[n].square().sum()) for n in u)
    return math.sqrt(total / draws)


def test_the_cosine_with_the_gradient_is_five_times_that_of_dense_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the linear layers of a transformer of width 64; on all its weights it gains as well, and
    more where an embedding does not dominate u."""
    monkeypatch.setattr(toys, "HIDDEN", 64)
    model, law = toys.bert(), ActivationGuided()
    space = observed(model, law)
    g = gradients(model)
    linear = guided(space, law)
    assert rms_cosine(law, linear, g) > 5 * rms_cosine(Gaussian(), linear, g)
    dense = rms_cosine(Gaussian(), space, g)
    paper = rms_cosine(ActivationGuided(others="gaussian"), space, g)
    assert rms_cosine(law, space, g) > 1.2 * paper > 1.2 * 1.2 * dense


def test_micro_batches_refine_one_basis_nearly_as_good_as_that_of_the_whole_batch() -> None:
    law, model = ActivationGuided(rank=2, power=30), small()
    energy = {}
    for size in (None, 16, 4, 1):
        space = observed(model, law, micro_batch=size)
        for b in guided(space, law):
            x = inputs_of(model, b.name.removesuffix(".weight"))
            energy[b.name, size] = float((x @ law.basis(b)).square().sum())
    for (name, size), held in energy.items():
        share = held / energy[name, None]
        assert 0.85 < share < 1.001 if size in (4, 1) else share == pytest.approx(1.0)


def test_a_second_pass_over_a_batch_forgets_the_first() -> None:
    law, model = ActivationGuided(rank=2), small()
    space = spaces.get("weights").build(model)
    method = methods.get("agzo", lr=0.0, rank=2).but(perturbation=law)  # type: ignore[union-attr]
    evaluator = TorchEvaluator(model, space, cross_entropy)
    tuner = Tuner(space, method, SEED, evaluator=evaluator)
    for seed in (5, 0):
        tuner.step(batch(16, seed))
    for a, b in zip(guided(space, law), guided(observed(small(), law), law), strict=True):
        assert torch.equal(law.basis(a), law.basis(b))


@pytest.mark.parametrize("queries", [1, 2])
def test_agzo_restated_probes_and_steps_along_the_same_directions(queries: int) -> None:
    lr, eps, rank = 0.05, 1e-3, 2
    paper = Restated()
    for t in range(STEPS):
        basis = {}
        for path in ("up", "down", "head"):
            h = inputs_of(paper.model, path, batch(6, t))
            a = draw("gaussian", Key(0), "basis", 0, h.shape[1] * rank).view(-1, rank).double()
            for _ in range(3):
                a = torch.linalg.qr(h.mT @ (h @ a)).Q
            basis[f"{path}.weight"] = torch.linalg.qr(a @ torch.linalg.qr(h @ a).R.mT).Q
        steps = []
        for j in range(queries):
            key, u = paper.key(t, j), {}
            for name, p in paper.theta.items():
                if name in basis:
                    r = draw("gaussian", key, f"{name}#z", 0, len(p) * rank).view(-1, rank)
                    u[name] = r.double() @ basis[name].mT
                else:
                    z = draw("gaussian", key, name, 0, p.numel()).view(p.shape).double()
                    u[name] = z * math.sqrt(min(1, rank * len(p) / p.numel()))
            steps.append(((paper.loss(t, u, eps) - paper.loss(t)) / eps, u))
        for c, u in steps:
            paper.move_(u, -lr * c / queries)
    method = methods.get("agzo", lr=lr, eps=eps, rank=rank, queries=queries)
    tuner = paper.tune(method, STEPS)  # type: ignore[arg-type]
    assert paper.apart() < 1e-4
    assert tuner.evaluator is not None
    assert tuner.evaluator.forwards == STEPS * (1 + queries) == STEPS * method.forwards


@pytest.mark.parametrize("directions", ["one-sided", "batch", "example"])
@pytest.mark.parametrize("make", [small, llama, gpt2])
def test_factors_beside_the_weights_give_the_losses_of_whole_directions(
    make: Any, directions: str
) -> None:
    losses = []
    for fast in (True, False):
        model = make()
        space = spaces.get("weights").build(model)
        method: Any = methods.get("agzo", lr=0.0, eps=0.05, rank=2, directions=directions)
        evaluator = TorchEvaluator(model, space, cross_entropy, fast=fast)
        tuner = Tuner(space, method, SEED, evaluator=evaluator)
        found = evaluator.losses(tuner.ask(), batch(5, 0), method.perturbation)
        losses.append(found.per_example)
    assert float(losses[0].std(0).min()) > 0  # the probes differ
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


def test_it_keeps_rank_numbers_per_input_of_each_linear_layer() -> None:
    model = small()
    space = spaces.get("weights").build(model)
    tuner = Tuner(space, methods.get("agzo", rank=3), SEED)  # type: ignore[arg-type]
    assert tuner.kept_bytes == 4 * 3 * (16 + 32 + 16)
    assert not tuner.replayable


def test_activations_that_overflow_cost_the_step_and_nothing_else() -> None:
    model = small()
    model.embed.weight[3] = float("inf")
    space = spaces.get("weights").build(model)
    evaluator = TorchEvaluator(model, space, cross_entropy)
    tuner = Tuner(space, methods.get("agzo"), SEED, evaluator=evaluator)  # type: ignore[arg-type]
    assert not tuner.step(batch(16, 0)).applied


def test_what_it_cannot_guide_is_refused() -> None:
    space = spaces.get("norms").build(small())
    with pytest.raises(BadInput, match="use method='mezo'"):
        Tuner(space, methods.get("agzo"), SEED)  # type: ignore[arg-type]
    for bad in ({"rank": 0}, {"power": 0}, {"others": "none"}):
        with pytest.raises(BadInput, match=next(iter(bad))):
            methods.get("agzo", **bad)
