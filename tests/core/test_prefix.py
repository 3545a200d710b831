"""What no probe changes is computed once, and nothing else is.

Run: pytest tests/core/test_prefix.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import HIDDEN, LENGTH, Small, batch, bert, cross_entropy, gpt2, llama, observe, small

from zotune.core import spaces
from zotune.core.evaluator import TorchEvaluator
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.core.prefix import site_free
from zotune.core.probe import Probe
from zotune.core.sites import sites_of

MODELS: dict[str, Callable[[], Any]] = {"bert": bert, "gpt2": gpt2, "llama": llama}


def probes(lanes: bool = False, queries: int = 2) -> list[Probe]:
    return [Probe(Key(1, query=q), s, lanes) for q in range(queries) for s in (0.3, -0.3)]


def evaluators(model: nn.Module, space: str) -> tuple[TorchEvaluator, TorchEvaluator]:
    """With sharing, and the slow truth: slice by slice, one probe at a time."""
    built = spaces.parse(space).build(model, observe)
    built.bind_(0.3, 1.0, "relative")
    shared = TorchEvaluator(model, built, cross_entropy)
    return shared, TorchEvaluator(model, built, cross_entropy, fast=False, stack=1)


def agree(model: nn.Module, space: str, size: int, lanes: bool, queries: int = 2) -> bool:
    shared, plain = evaluators(model, space)
    a, b = (
        e.losses(probes(lanes, queries), batch(size), Gaussian()).per_example
        for e in (shared, plain)
    )
    assert float((b - b[0]).abs().max()) > 1e-3  # the probes differ
    return torch.allclose(a, b, rtol=0, atol=2e-5)


class Counting(nn.Module):
    """Notes how many rows it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return x


class Counted(Small):
    """`small` with a counter below the embedding, one below `up`, one below the head."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.middle, self.high = Counting(), Counting(), Counting()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(self.low(input_ids))
        x = x + self.down(torch.tanh(self.up(self.middle(self.norm(x)))))
        out: Tensor = self.head(self.high(x.mean(1)))
        return out


def counted(space: str, lanes: bool = False) -> tuple[list[int], list[int], list[int]]:
    model = Counted()
    model.load_state_dict(small().state_dict())
    shared, _ = evaluators(model.eval(), space)
    shared.losses(probes(lanes), batch(5), Gaussian())  # what cannot be shared is found out once
    for counter in (model.low, model.middle, model.high):
        counter.rows.clear()
    shared.losses(probes(lanes), batch(5), Gaussian())
    return model.low.rows, model.middle.rows, model.high.rows


@pytest.mark.parametrize("lanes", [False, True])
def test_below_the_first_site_one_copy_of_the_batch_is_computed(lanes: bool) -> None:
    assert counted("head", lanes) == ([5], [5], [5])
    assert counted("weights(pattern='up')", lanes) == ([5], [5], [20])
    assert counted("norms", lanes) == ([5], [20], [20])
    assert counted("weights", lanes) == ([5], [20], [20])


@pytest.mark.parametrize("lanes", [False, True], ids=["shared", "lanes"])
@pytest.mark.parametrize("size", [1, 2, LENGTH])
@pytest.mark.parametrize("space", ["head", "norms", "weights(pattern='[.]1[.]')", "adapter"])
@pytest.mark.parametrize("name", MODELS)
def test_sharing_changes_no_loss(name: str, space: str, size: int, lanes: bool) -> None:
    """As many examples as tokens, or a single one, are where rows could be mistaken."""
    assert agree(MODELS[name](), space, size, lanes)


def test_sharing_changes_no_loss_with_a_cache_of_keys_and_values() -> None:
    model = llama()
    model.config.use_cache = True
    assert agree(model, "weights(pattern='layers.1')", 3, False)


@settings(max_examples=25)
@given(size=st.integers(1, 2 * HIDDEN), queries=st.integers(1, 3), lanes=st.booleans())
def test_sharing_changes_no_loss_at_any_batch_size(size: int, queries: int, lanes: bool) -> None:
    assert agree(small(), "head", size, lanes, queries)


class Table(nn.Module):
    """A table of positions (tokens, width), from a batched input."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linspace(0, 1, x.shape[1]).unsqueeze(1).expand(-1, x.shape[2])


class Folded(nn.Module):
    """Takes what has heads folded into its rows, as ALiBi biases have."""

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + bias.view(len(x), 2, -1).mean((1, 2)).view(-1, 1, 1)


class Odd(Small):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.folded = Table(), Folded()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = x + self.table(x)
        bias = input_ids.float().repeat_interleave(2, 0).unsqueeze(1) / 30
        x = self.folded(x, bias)
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        out: Tensor = self.head(x.mean(1))
        return out


@pytest.mark.parametrize("lanes", [False, True], ids=["shared", "lanes"])
@pytest.mark.parametrize("size", [1, 2, 3, LENGTH, HIDDEN])
def test_outputs_without_rows_and_rows_with_heads_are_told_apart(size: int, lanes: bool) -> None:
    model = Odd()
    model.load_state_dict(small().state_dict())
    assert agree(model.eval().requires_grad_(False), "head", size, lanes)


class Blocks(nn.Module):
    """Calls the blocks of a Sequential one by one, works between them, and keeps every state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(29, HIDDEN)
        self.stage = nn.Sequential(*(nn.Linear(HIDDEN, HIDDEN) for _ in range(3)))
        self.head = nn.Linear(4 * HIDDEN, 3)
        self.between: list[int] = []

    def forward(self, input_ids: Tensor) -> Tensor:
        states = [self.embed(input_ids)]
        for block in self.stage:
            states.append(torch.relu(block(states[-1]) + states[-1]))
            self.between.append(len(states[-1]))
        out: Tensor = self.head(torch.cat([s.mean(1) for s in states], 1))
        return out


@pytest.mark.parametrize(
    "space", ["head", "head(basis='classes')", "head(exact=True)", "weights(pattern='head.bias')"]
)
def test_what_a_model_does_between_its_children_runs_on_one_copy_too(space: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Blocks().eval().requires_grad_(False)
    shared, plain = evaluators(model, space)
    blocks, counts = [model.embed, *model.stage], list[int]()
    handles = [
        b.register_forward_hook(lambda m, args, out: counts.append(len(out))) for b in blocks
    ]
    model.between.clear()
    a = shared.losses(probes(), batch(5), Gaussian())
    assert model.between == [5, 5, 5]
    assert counts == [5, 5, 5, 5]
    for handle in handles:
        handle.remove()
    b = plain.losses(probes(), batch(5), Gaussian())
    torch.testing.assert_close(a.per_example, b.per_example, rtol=0, atol=2e-5)
    assert a.exact.keys() == b.exact.keys()
    for name, g in a.exact.items():
        torch.testing.assert_close(g, b.exact[name], rtol=0, atol=2e-6)


def test_blocks_of_a_sequential_that_are_called_one_by_one_are_shared_below_a_site() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Blocks().eval().requires_grad_(False)
    shared, _ = evaluators(model, "weights(pattern='stage.2|head')")
    counts: list[int] = []
    computed = [type(m).forward for m in model.stage]
    assert len(computed) == 3
    own = nn.functional.linear

    def counted(x: Tensor, *args: Any) -> Tensor:
        counts.append(len(x))
        return own(x, *args)

    nn.functional.linear = counted
    try:
        shared.losses(probes(), batch(5), Gaussian())
    finally:
        nn.functional.linear = own
    assert counts[:2] == [5, 5]


class Remembers(Small):
    """Looks at the batch size before its head and uses it behind."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, input_ids: Tensor) -> Tensor:
        size = len(input_ids)
        x = self.embed(input_ids)
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        out: Tensor = self.head(x)
        if self.how == "pick":
            return out[torch.arange(size), -1]
        if self.how == "view":
            return out.reshape(size, -1)[:, :3]
        if self.how == "tuple":
            return (out[:, -1], x)[0] + x.mean((1, 2)).unsqueeze(1)
        return out[:, -1]


@pytest.mark.parametrize("how", ["pick", "view", "tuple", "none"])
@pytest.mark.parametrize("size", [1, 3])
def test_a_model_that_remembers_its_batch_size_gets_its_rows(how: str, size: int) -> None:
    """It is run a second time with all its rows, and from then on at once."""
    model = Remembers(how)
    model.load_state_dict(small().state_dict())
    shared, plain = evaluators(model.eval().requires_grad_(False), "head")
    for _ in range(2):
        a, b = (e.losses(probes(), batch(size), Gaussian()).per_example for e in (shared, plain))
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
    kept = shared.prefix.top is not None
    assert kept == (how == "none" or (size == 1 and how == "tuple"))


def test_a_layer_that_is_used_below_and_above_a_site_is_shared_only_below() -> None:
    class Twice(Counted):
        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.middle(self.embed(input_ids))
            x = self.middle(x + self.down(torch.tanh(self.up(x))))
            out: Tensor = self.head(x.mean(1))
            return out

    model = Twice()
    model.load_state_dict(small().state_dict())
    model.eval().requires_grad_(False)
    assert agree(model, "weights(pattern='up')", 3, False)
    shared, _ = evaluators(model, "weights(pattern='up')")
    shared.losses(probes(), batch(5), Gaussian())
    model.middle.rows.clear()
    shared.losses(probes(), batch(5), Gaussian())
    assert model.middle.rows == [5, 20]


def test_an_objective_that_runs_the_model_twice_gets_two_right_answers() -> None:
    model = small()
    built = spaces.get("head").build(model)
    built.bind_(0.3, 1.0, "relative")

    def twice(model: nn.Module, here: Any) -> tuple[Tensor, Tensor]:
        first, weight = cross_entropy(model, here)
        second, _ = cross_entropy(model, here)
        assert torch.equal(first, second)
        return first + second, weight

    shared = TorchEvaluator(model, built, twice)
    plain = TorchEvaluator(model, built, twice, fast=False, stack=1)
    a, b = (e.losses(probes(), batch(4), Gaussian()).per_example for e in (shared, plain))
    assert torch.allclose(a, b, rtol=0, atol=2e-5)


def test_copies_of_one_batch_are_told_from_different_rows() -> None:
    """An objective may give the model rows of its own making."""
    model = small()
    built = spaces.get("head").build(model)
    built.bind_(0.3, 1.0, "relative")

    def shifted(model: nn.Module, here: Any) -> tuple[Tensor, Tensor]:
        ids = here["input_ids"]
        rows = torch.arange(len(ids)).unsqueeze(1)
        loss, weight = cross_entropy(
            model, type(here)({**here.tensors, "input_ids": (ids + rows) % 29}, here.size)
        )
        return loss, weight

    shared = TorchEvaluator(model, built, shifted)
    plain = TorchEvaluator(model, built, shifted, fast=False)
    a, b = (e.losses(probes(), batch(4), Gaussian()).per_example for e in (shared, plain))
    assert torch.allclose(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("space", ["head", "head + norms"])
def test_hooks_see_what_is_computed_and_forwards_come_back(space: str) -> None:
    model = small()
    shared, _ = evaluators(model, space)
    rows: list[int] = []
    handle = model.up.register_forward_hook(lambda m, a, out: rows.extend((len(a[0]), len(out))))
    wrapped: Callable[[Tensor], Tensor] = lambda x: nn.LayerNorm.forward(model.norm, x)  # noqa: E731
    model.norm.forward = wrapped  # type: ignore[method-assign]
    shared.losses(probes(), batch(5), Gaussian())
    handle.remove()
    assert rows == ([5, 5] if space == "head" else [20, 20])
    assert [n for n, m in model.named_modules() if "forward" in vars(m)] == ["norm"]
    assert model.norm.forward is wrapped

    def breaks(*_: Any) -> None:
        raise KeyError

    model.head.register_forward_pre_hook(breaks)
    with pytest.raises(KeyError):
        shared.losses(probes(), batch(5), Gaussian())
    assert [n for n, m in model.named_modules() if "forward" in vars(m)] == ["norm"]


def test_the_largest_modules_without_sites_are_found_once() -> None:
    model = bert()
    built = spaces.parse("weights(pattern='layer.1.output')").build(model)
    sites = sites_of(built.blocks)
    found = site_free(model, sites)
    names = {n for n, m in model.named_modules() if any(m is f for f in found)}
    assert "bert.embeddings" in names
    assert "bert.encoder.layer.0" in names
    assert not any(n.startswith("bert.encoder.layer.0.") for n in names)
    owners = {s.path for s in sites}
    assert not any(owner == n or owner.startswith(f"{n}.") for owner in owners for n in names)
    assert len({id(m) for m in found}) == len(found)
