"""Batch norms between the statistics they came with and those of the images at hand.

Run: pytest tests/core/test_shift.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from zotune.core import spaces
from zotune.core.space import Space
from zotune.errors import BadInput
from zotune.models.shift import Shift, fold_shifts_, measuring, norms_of, shifts

CHANNELS = 4


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Sequential:
    """Two batch norms that do not know the images they will see, and a head."""
    model = nn.Sequential(
        nn.Conv2d(3, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU(),
        nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.Flatten(), nn.LazyLinear(2),
    )  # fmt: skip
    model(torch.zeros(1, 3, 2, 2))
    for place, tensor in enumerate((*model.parameters(), *model.buffers())):
        if tensor.is_floating_point():
            tensor.detach().copy_(numbers(*tensor.shape, seed=place).abs() + 0.2)
    return model.eval().requires_grad_(False)


def observer(batches: list[Tensor]) -> Callable[..., None]:
    def observe(model: nn.Module, after: Any = None, examples: int | None = None) -> None:
        for seen in batches:
            model(seen)

    return observe


BATCHES = [2 + 3 * numbers(8, 3, 2, 2, seed=k) for k in range(3)]


def built(model: nn.Module, options: str = "", batches: list[Tensor] = BATCHES) -> Space:
    return spaces.parse(f"norms(basis='shift'{options})").build(model, observer(batches))


@settings(max_examples=40)
@given(
    a=st.floats(-1, 2), c=st.floats(-1, 2), flat=st.booleans(), seed=st.integers(0, 1000)
)  # fmt: skip
def test_a_share_replaces_the_statistics_by_those_between(
    a: float, c: float, flat: bool, seed: int
) -> None:
    """Restated: gain (x - m) / s + bias, m = m0 + a (m1 - m0), s = s0 (s1 / s0)^c."""
    norm = (nn.BatchNorm1d if flat else nn.BatchNorm2d)(CHANNELS).double().eval()
    for k, tensor in enumerate((norm.weight, norm.bias, norm.running_mean, norm.running_var)):
        assert tensor is not None
        tensor.detach().copy_(numbers(CHANNELS, seed=seed + k).abs() + 0.1)
    m0, v0 = (t.clone() for t in (norm.running_mean, norm.running_var) if t is not None)
    m1, v1 = numbers(CHANNELS, seed=seed + 5).double(), numbers(CHANNELS, seed=seed + 6).exp()
    model = nn.Sequential(norm).requires_grad_(False)
    x = numbers(3, CHANNELS, *(() if flat else (2, 5)), seed=seed).double()
    shift = Shift.of(norm, m1, v1, 0.0)
    shift.share.copy_(torch.tensor([a, c]))
    found = shift(norm(x))
    s0, s1 = (v0 + norm.eps).sqrt(), (v1.double() + norm.eps).sqrt()
    mean, wide = m0 + shift.share[0].double() * (m1 - m0), s0 * (s1 / s0) ** shift.share[1].double()
    sized = (1, CHANNELS, *[1] * (x.dim() - 2))
    truth = (x - mean.view(sized)) / wide.view(sized) * norm.weight.view(sized)
    truth = truth + norm.bias.view(sized)
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-4)
    assert list(norms_of(model)) == [("0", norm)]


def test_all_of_the_way_is_what_training_mode_sees() -> None:
    """AdaBN on one batch: the statistics are those that training would take from it."""
    model = network()
    truth = copy.deepcopy(model).train()
    batch = BATCHES[0]
    built(model, ", share=1.0", [batch])
    for m in truth.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
            m.reset_running_stats()
    truth(batch)
    torch.testing.assert_close(model(batch), truth.eval()(batch), rtol=1e-4, atol=1e-4)


def test_none_of_the_way_changes_nothing() -> None:
    model, batch = network(), BATCHES[0]
    before = model(batch)
    built(model, ", share=0.0")
    torch.testing.assert_close(model(batch), before, rtol=1e-5, atol=1e-5)


def test_folding_keeps_what_the_network_gives_and_leaves_plain_norms() -> None:
    model, batch = network(), BATCHES[1]
    names = list(model.state_dict())
    for block in built(model):
        block.move_(0, 2, torch.tensor([0.3, -0.2]), None)  # type: ignore[arg-type]
    before = model(batch)
    assert len(list(shifts(model))) == 2
    fold_shifts_(model)
    torch.testing.assert_close(model(batch), before, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == names
    assert not list(shifts(model))


def test_measuring_leaves_the_norms_as_they_were_even_when_it_breaks() -> None:
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    momenta = [norm.momentum for _, norm in norms_of(model)]
    norms = [norm for _, norm in norms_of(model)]

    def broken() -> None:
        with measuring(norms):
            model(BATCHES[0])
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    with measuring(norms) as found:
        model(BATCHES[0])
    assert len(found) == 2
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [norm.momentum for norm in norms] == momenta
    assert not any(norm.training for norm in norms)


def test_two_numbers_a_layer_are_tuned_and_patterns_choose_layers() -> None:
    assert [(b.name, b.shape) for b in built(network())] == [("1.share", (2,)), ("4.share", (2,))]
    model = network()
    text = "norms(basis='shift', pattern='1') + norms(basis='shift', pattern='4', lr=0.5)"
    space = spaces.parse(text).build(model, observer(BATCHES))
    assert [(b.name, b.lr) for b in space] == [("1.share", None), ("4.share", 0.5)]


@pytest.mark.parametrize(
    ("model", "text", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "norms(basis='shift')", "has none"),
        (network(), "norms(basis='classes')", "want 'shift'"),
        (network(), "norms(basis='shift', share=7)", "share=7"),
        (network(), "norms(basis='shift', pattern='nowhere')", "matches no block"),
    ],
    ids=["no batch norm", "basis", "share", "pattern"],
)
def test_what_cannot_be_moved_is_refused(model: nn.Module, text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        spaces.parse(text).build(model, observer(BATCHES))


@pytest.mark.parametrize("batches", [[], [BATCHES[0] * float("nan")]], ids=["none", "nan"])
def test_statistics_that_say_nothing_are_refused(batches: list[Tensor]) -> None:
    model = network()
    with pytest.raises(BadInput, match="could not be measured"):
        built(model, "", batches)
    assert not list(shifts(model))
    assert all(t.isfinite().all() for t in model.state_dict().values())
