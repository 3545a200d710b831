"""Bases measured by forward passes. Run: pytest tests/core/test_adapter_basis.py"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import batch, bert, gpt2, llama, logits_of, observe, small

from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.core.spaces import Adapter, Head
from zotune.errors import BadInput
from zotune.models.adapter import adapters
from zotune.tasks.batch import Batch


def data(tokens: int, width: int, dimension: int, seed: int = 0) -> Tensor:
    """Inputs near a subspace, with a spectrum that falls by half from direction to direction."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(99))).Q
    sizes = 0.5 ** torch.arange(width, dtype=torch.float32)
    sizes[dimension:] = 1e-3
    return torch.randn(tokens, width, generator=generator) * sizes @ axes.mT


def built(inputs: list[Tensor], outputs: int, rank: int) -> tuple[nn.Linear, Any]:
    """A linear layer with an adapter measured on these batches, and its block."""
    layer = nn.Linear(inputs[0].shape[-1], outputs)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    model = nn.Sequential(layer)

    def look(model: nn.Module, after: Any = None, examples: Any = None) -> None:
        for x in inputs:
            model(x)

    (block,) = Adapter(rank=rank).build(model, look)
    return layer, block


def basis_of(layer: nn.Module) -> Tensor:
    ((_, _, adapter),) = adapters(layer)
    return adapter.A.detach()


@settings(max_examples=25)
@given(width=st.integers(1, 24), outputs=st.integers(1, 24), rank=st.integers(1, 6),
       batches=st.lists(st.integers(1, 40), min_size=1, max_size=4))  # fmt: skip
def test_the_rows_of_a_basis_are_orthonormal(
    width: int, outputs: int, rank: int, batches: list[int]
) -> None:
    rank = min(rank, width, outputs)
    layer, block = built([data(n, width, 3, i) for i, n in enumerate(batches)], outputs, rank)
    a = basis_of(layer)
    assert a.shape == (rank, width)
    assert torch.allclose(a @ a.mT, torch.eye(rank), rtol=0, atol=1e-5)
    assert block.shape == (outputs, rank)
    assert 0 < block.unit < float("inf")


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_basis_holds_as_much_of_the_inputs_as_their_exact_singular_vectors(rank: int) -> None:
    inputs = [data(30, 20, 20, i) for i in range(6)]
    layer, _ = built(inputs, 20, rank)
    whole = torch.cat(inputs)
    exact = torch.linalg.svd(whole, full_matrices=False).Vh[:rank]
    held, best = ((whole @ a.mT).square().sum() for a in (basis_of(layer), exact))
    assert float(held / best) > 0.999
    angles = torch.linalg.svdvals(exact @ basis_of(layer).mT)
    assert float(angles.min()) > 0.99


def test_one_basis_comes_from_one_stream_of_data_whatever_the_global_generator_does() -> None:
    inputs = [data(30, 20, 20, i) for i in range(3)]
    first = basis_of(built(inputs, 8, 3)[0])
    with torch.random.fork_rng():
        torch.rand(7)
        assert torch.equal(basis_of(built(inputs, 8, 3)[0]), first)


def test_the_unit_is_output_std_over_coefficient_rms() -> None:
    inputs = [data(200, 12, 12)]
    layer, block = built(inputs, 9, 2)
    x = inputs[0]
    with torch.no_grad():
        y = nn.functional.linear(x, layer.weight, layer.bias)
        wanted = float(y.std(correction=0) / (x @ basis_of(layer).mT).square().mean().sqrt())
    assert block.unit == pytest.approx(wanted, rel=1e-4)
    # So eps counts in the layer's own output: a probe moves it by about eps x its std.
    block.bind_(0.1, 1.0, "relative")
    u = Gaussian().draw(Key(1), block)
    change = (x @ basis_of(layer).mT) @ block.at(u, 0.1).mT
    assert float(change.square().mean().sqrt() / y.std()) == pytest.approx(0.1 * 2**0.5, rel=0.5)


def test_identity_3_the_gain_of_the_basis_over_dense_directions() -> None:
    """E[cos^2] = ||G A^T||^2 / (||G||^2 m r) for u = U A, against 1 / (m n) for dense noise."""
    m, n, r, draws = 6, 20, 2, 20_000
    inputs = [data(50, n, 4)]
    layer, block = built(inputs, m, r)
    a = basis_of(layer)
    weight = layer.weight.detach().clone().requires_grad_()
    target = torch.randn(50, m, generator=torch.Generator().manual_seed(3))
    (inputs[0] @ weight.mT - target).square().mean().backward()
    g = weight.grad
    assert g is not None
    residual = g - g @ torch.linalg.pinv(inputs[0]) @ inputs[0]
    assert float(residual.norm() / g.norm()) < 1e-4  # gradient rows lie in the span of the inputs
    inside = float((g @ a.mT).square().sum() / g.square().sum())
    keys = [Key(1, lane=i) for i in range(draws)]
    u = (Gaussian().draw_lanes(keys, block) @ a).flatten(1).double()
    cosines = (u @ g.double().flatten()) / (u.norm(dim=1) * g.double().norm())
    measured = float(cosines.square().mean())
    assert measured == pytest.approx(inside / (m * r), rel=0.05)
    dense = 1 / (m * n)
    assert measured / dense == pytest.approx(inside * n / r, rel=0.05)
    assert measured / dense > 5


@pytest.mark.parametrize("make", [bert, llama, gpt2, small])
def test_every_layer_that_the_task_calls_gets_an_adapter_and_the_output_layer_none(
    make: Callable[[], nn.Module],
) -> None:
    model = make()
    model.unused = nn.Linear(4, 4)  # type: ignore[assignment]
    space = Adapter(rank=1).build(model, observe)
    names = {b.name.removesuffix(".lora_B") for b in space}
    assert "unused" not in names
    assert not names & {"lm_head", "head", "classifier"}
    assert len(names) == {"Small": 2}.get(type(model).__name__, len(names))
    assert len(names) > 1
    assert names == {p for p, _, _ in adapters(model)}
    assert not any(m._forward_hooks for n, m in model.named_modules() if n not in names)


def test_adapters_of_a_model_are_tuned_further_on_their_own_bases_and_in_like_units() -> None:
    model = small()
    first = {b.name: b.unit for b in Adapter(rank=2).build(model, observe)}
    bases = {p: a.A.clone() for p, _, a in adapters(model)}
    again = {b.name: b.unit for b in Adapter(rank=2).build(model, observe)}
    assert first.keys() == again.keys()
    for name in first:
        assert again[name] == pytest.approx(first[name], rel=0.05)
    assert all(torch.equal(bases[p], a.A) for p, _, a in adapters(model))


# ---- the head on a basis -------------------------------------------------------------


def test_a_head_on_a_basis_starts_where_it_was_and_is_small() -> None:
    model = small()
    ids = batch(6)["input_ids"]
    plain = logits_of(model, ids)
    (block,) = Head(basis="classes").build(model, observe)
    assert torch.equal(logits_of(model, ids), plain)
    assert block.shape[0] == 3
    assert block.shape[1] <= 4
    ((_, layer, adapter),) = adapters(model)
    assert layer is model.head
    assert bool(adapter.A.isfinite().all())
    assert int(torch.linalg.matrix_rank(adapter.A)) == adapter.A.shape[0]


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize(("width", "labels"), [(16, 2), (4, 9), (5, 5)])
def test_a_head_on_a_basis_takes_any_number_of_labels(
    width: int, labels: int, project: bool
) -> None:
    head = nn.Linear(width, labels)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6 * labels, width, generator=generator)
    with torch.no_grad():
        head.weight.copy_(torch.randn(labels, width, generator=generator))
    model = nn.Sequential()
    model.head = head  # type: ignore[assignment]
    plain = head(x).detach()

    def look(model: nn.Module, after: Any = None, examples: Any = None) -> None:
        model(x)
        after(Batch({"label": torch.arange(len(x)) % labels}, len(x)))

    (block,) = Head(basis="classes", project=project).build(model, look)
    ((_, _, adapter),) = adapters(model)
    rank = min(labels, width)
    assert block.shape == (labels, rank)
    a = adapter.A.detach()
    gram = a @ a.mT
    assert torch.allclose(gram, gram.diagonal().diag(), rtol=0, atol=1e-4 * float(gram.max()))
    assert torch.allclose((x @ a.mT).square().mean(0), torch.ones(rank), atol=1e-4)
    if not project:
        assert torch.equal(model(x), plain)
    else:  # least squares: what is left of the logits is orthogonal to every direction
        left = (plain - model(x)).detach()
        assert float(((x @ a.mT).mT @ left).abs().max()) < 1e-2 * len(x)


def test_a_white_head_starts_where_it_was_and_sees_uncorrelated_inputs_of_size_one() -> None:
    model = nn.Sequential()
    model.head = nn.Linear(6, 3)  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 2
    plain = model(x)
    # No label is looked at: `after` is not given.
    (block,) = Head(basis="white").build(model, lambda model, after, examples: model(x))
    ((_, _, adapter),) = adapters(model)
    assert torch.equal(model(x), plain)
    assert block.shape == (3, 6)
    moments = x.double().mT @ x.double() / len(x)
    moments += 0.01 * moments.diagonal().mean() * torch.eye(6)
    a = adapter.A.double()
    assert torch.allclose(a, a.mT, atol=1e-6)
    assert torch.allclose(a @ moments @ a, torch.eye(6, dtype=torch.double), atol=1e-4)


def test_a_head_on_a_basis_wants_labels_activations_and_a_linear_head() -> None:
    with pytest.raises(BadInput, match="observe"):
        Head(basis="classes").build(small())
    with pytest.raises(BadInput, match="one of classes, white"):
        Head(basis="fisher")
    for basis in (None, "white"):
        with pytest.raises(BadInput, match="needs a smaller basis"):
            Head(basis=basis, project=True)
    with pytest.raises(BadInput, match="linear head"):
        Head(basis="classes").build(nn.Sequential(nn.ReLU()), observe)

    def unlabelled(model: nn.Module, after: Any = None, examples: Any = None) -> None:
        here = batch(6)
        logits_of(model, here["input_ids"])
        if after is not None:
            after(type(here)({"input_ids": here["input_ids"]}, 6))

    with pytest.raises(BadInput, match="label"):
        Head(basis="classes").build(small(), unlabelled)
