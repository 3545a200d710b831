"""EGGROLL: directions inside the product equal directions in the weights.

Run: pytest tests/methods/test_eggroll.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from restated import Restated
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys import batch, cross_entropy, gpt2, keys, small

from zotune import methods
from zotune.core import spaces
from zotune.core.block import FloatBlock, Owner
from zotune.core.evaluator import TorchEvaluator
from zotune.core.low_rank import LowRank
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.core.probe import Losses, Probe
from zotune.core.sites import View, probing, sites_of
from zotune.methods.eggroll import Fitness


def layer(kind: type[nn.Module], *sizes: int, **options: Any) -> tuple[nn.Module, list[Any]]:
    """A layer with weights of std 0.3, and its blocks in units of 0.3."""
    module = kind(*sizes, **options).requires_grad_(False)
    blocks = []
    for name, p in module.named_parameters():
        block = FloatBlock.of(f"m.{name}", p, [Owner("m", module, name)], unit=0.3)
        p.copy_(0.3 * Gaussian().draw(Key(4), block))
        block.bind_(0.1, 1.0, "relative")
        blocks.append(block)
    return module, blocks


def seen(module: nn.Module, blocks: list[Any], view: View, x: Tensor, fast: bool = True) -> Tensor:
    with torch.no_grad(), probing(sites_of(blocks), view, fast):
        out: Tensor = module(x)
    return out


shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 5), st.integers(1, 17),
                   st.integers(1, 19))  # fmt: skip


@given(shape=shapes, rank=st.integers(1, 4), lanes=st.booleans(), tuned=st.integers(1, 2),
       steps=st.lists(st.sampled_from((0.1, -0.1, 0.0, 3.0)), min_size=1, max_size=4))  # fmt: skip
def test_the_product_beside_the_weight_equals_the_perturbed_weights(
    shape: Any, rank: int, lanes: bool, tuned: int, steps: list[float]
) -> None:
    examples, each, tokens, width, out = shape
    module, blocks = layer(nn.Linear, width, out)
    probes = [Probe(Key(1, query=q // 2), step, lanes) for q, step in enumerate(steps)]
    view = View(probes, examples, LowRank(rank), 2, len(probes) * examples * each)
    x = torch.randn(view.rows, tokens, width, generator=torch.Generator().manual_seed(2))
    fast, slow = (seen(module, blocks[:tuned], view, x, fast) for fast in (True, False))
    assert fast.shape == slow.shape
    assert torch.allclose(fast, slow, rtol=1e-5, atol=1e-5)


@given(rank=st.integers(1, 3), steps=st.permutations((0.1, -0.1, 0.0)))
def test_an_embedding_looks_up_low_rank_rows_per_example(rank: int, steps: list[float]) -> None:
    module, blocks = layer(nn.Embedding, 23, 6)
    probes = [Probe(Key(1), step, per_example=True) for step in steps]
    view = View(probes, 4, LowRank(rank), 0, 12)
    ids = torch.randint(0, 23, (12, 5), generator=torch.Generator().manual_seed(rank))
    fast, slow = (seen(module, blocks, view, ids, fast) for fast in (True, False))
    assert torch.allclose(fast, slow, rtol=1e-6, atol=1e-6)


class Sizes(TorchDispatchMode):
    """The numbers of elements of all tensors that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and func not in (torch.ops.aten.detach.default,
                                                    torch.ops.aten.t.default):  # fmt: skip
            self.found.append(out.numel())
        return out


@pytest.mark.parametrize("lanes", [False, True])
def test_nothing_as_large_as_a_weight_is_made(lanes: bool) -> None:
    module, blocks = layer(nn.Linear, 64, 96)
    probes = [Probe(Key(1), step, lanes) for step in (0.1, -0.1)]
    view = View(probes, 3, LowRank(2), 0, 6)
    x = torch.randn(6, 4, 64, generator=torch.Generator().manual_seed(2))
    for fast in (True, False):
        with Sizes() as sizes:
            seen(module, blocks[:1], view, x, fast)
        assert (max(sizes.found) < 64 * 96) == fast


def test_directions_are_products_of_their_factors_summed_without_being_made() -> None:
    (block, _) = layer(nn.Linear, 7, 9)[1]
    law, drawn = LowRank(3), keys(5)
    left, right = law.factors(drawn, block, 2, 8)  # type: ignore[misc]
    assert left.shape == (5, 6, 3)
    assert right.shape == (5, 3, 7)
    c = [0.5, -2.0, 1.0, 3.0, 0.0]
    u = torch.stack([law.draw(key, block, 2, 8) for key in drawn])
    assert torch.allclose(left @ right, u, atol=1e-6)
    g = law.combine(drawn, c, block, 2, 8)
    assert torch.allclose(g, torch.einsum("k,kij->ij", torch.tensor(c), u), atol=1e-5)
    assert law.factors(drawn, layer(nn.Linear, 2, 9)[1][0]) is None
    assert Gaussian().factors(drawn, block) is None


@pytest.mark.parametrize("make", [small, gpt2])
@pytest.mark.parametrize("directions", ["batch", "example"])
def test_whole_models_have_the_losses_of_perturbed_weights(make: Any, directions: str) -> None:
    model = make()
    space = spaces.get("weights").build(model)
    method = methods.get("eggroll", eps=0.1, rank=2, queries=2, directions=directions)
    space.bind_(0.1, 1.0, "relative")
    found = []
    for fast in (True, False):
        evaluator = TorchEvaluator(model, space, cross_entropy, fast=fast)
        probes = method.estimator.ask(Key(3))
        found.append(evaluator.losses(probes, batch(5), method.perturbation).per_example)
    assert float((found[0] - found[0].mean(0)).abs().max()) > 0.01
    assert torch.allclose(*found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("zscore", [True, False])
def test_twenty_steps_are_the_formula_in_float64(zscore: bool) -> None:
    lr, eps, rank, queries = 5e-3, 1e-2, 2, 4
    paper = Restated("weights")
    for t in range(20):
        us = []
        for key in (paper.key(t, j) for j in range(queries)):
            u = paper.direction(Gaussian(), key)  # of vectors
            for name, block in paper.blocks.items():
                if len(block.shape) == 2:
                    a, b = LowRank(rank).factors([key], block)  # type: ignore[misc]
                    u[name] = a[0].double() @ b[0].double()
            us.append(u)
        members = torch.tensor([[paper.loss(t, u, s * eps) for s in (1, -1)] for u in us])
        fitness = -members.double()
        scale = 2 * eps
        if zscore:
            fitness, scale = (fitness - fitness.mean()) / fitness.std(correction=0), 2.0
        for u, (plus, minus) in zip(us, fitness, strict=True):
            paper.move_(u, lr / queries * float(plus - minus) / scale)
    method = methods.get("eggroll", lr=lr, eps=eps, rank=rank, queries=queries, zscore=zscore,
                         units="absolute")  # fmt: skip
    assert paper.tune(method, 20).kept_bytes == 0
    assert paper.apart() < 1e-4


def test_fitness_ignores_the_losss_scale_and_equal_losses_give_no_step() -> None:
    values = [1.0, 1.2, 0.9, 1.5]
    told = Fitness(1e-3, 2).tell(Key(0), Losses.of(values)).coefficients
    scaled = Fitness(0.1, 2).tell(Key(0), Losses.of([50 * v - 3 for v in values])).coefficients
    assert told == pytest.approx(scaled)
    assert Fitness(1e-3, 2).tell(Key(0), Losses.of([1.0] * 4)).coefficients == (0.0, 0.0)
