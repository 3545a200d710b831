"""What every method on a low-rank subspace promises. Run: pytest tests/methods/test_subspaces.py"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from restated import Restated, exact
from torch import Tensor
from toys import batch, bert, cosine, cross_entropy, digest, float_block, gpt2, small

from zotune import methods
from zotune.core import spaces
from zotune.core.evaluator import TorchEvaluator
from zotune.core.method import Method
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.core.step import Tuner
from zotune.core.subspace import Factored
from zotune.errors import BadInput

OPTIONS: dict[str, dict[str, Any]] = {
    "lozo": {"rank": 3, "refresh": 3},
    "subzero": {"rank": 3, "refresh": 3},
    "tezo": {"rank": 3, "rule": "sgd"},
    "zo-muon": {"rank": 3, "refresh": 3},
}
REFRESHED = [n for n, options in OPTIONS.items() if "refresh" in options]


def method_of(name: str, **options: Any) -> Method:
    method = methods.get(name, **{"lr": 0.01, "eps": 0.01, **OPTIONS[name], **options})
    assert isinstance(method, Method)
    return method


def law_of(name: str) -> Factored:
    law = method_of(name).perturbation
    assert isinstance(law, Factored)
    return law


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (12, 5, 3), (7, 7), (700, 800)])
def test_any_rows_are_rows_of_the_whole_bit_for_bit(name: str, shape: tuple[int, ...]) -> None:
    law, block, key = law_of(name), float_block("w", *shape), Key(1, step=8, query=1, lane=2)
    whole = law.draw(key, block)
    assert whole.shape == shape
    assert whole.dtype == torch.float32
    for cut in (0, 1, shape[0] // 2):
        parts = [law.draw(key, block, 0, cut), law.draw(key, block, cut)]
        assert torch.equal(torch.cat(parts), whole)
    rows = [shape[0] - 1, 0, 3]
    assert torch.equal(law.draw_rows(key, block, rows), whole[rows])
    lanes = law.draw_lanes([key, key.fold(lane=3)], block)
    assert torch.equal(lanes[0], whole)
    assert not torch.equal(lanes[1], whole)


@pytest.mark.parametrize("name", OPTIONS)
def test_names_steps_queries_and_seeds_draw_unequal_directions(name: str) -> None:
    law, a, b = law_of(name), float_block("a", 60, 70), float_block("b", 60, 70)
    u = law.draw(Key(0), a)
    others = [law.draw(k, a) for k in (Key(0, step=1), Key(0, query=1), Key(1))]
    for other in (*others, law.draw(Key(0), b)):
        assert abs(cosine(u, other)) < 0.7  # a product of few factors varies a lot
        assert not torch.equal(u, other)


@pytest.mark.parametrize("name", OPTIONS)
def test_vectors_and_thin_matrices_are_drawn_whole(name: str) -> None:
    law = law_of(name)
    for shape in ((), (9,), (1, 9), (9, 1)):
        block = float_block("w", *shape)
        assert law.inner(block) is None
        assert torch.equal(law.draw(Key(1), block), Gaussian().draw(Key(1), block))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_space_without_matrices_is_refused(name: str) -> None:
    space = spaces.get("norms").build(small())
    with pytest.raises(BadInput, match="use method='mezo'"):
        Tuner(space, method_of(name), 0)


class Spy:
    """Keeps every direction that the forwards saw."""

    def __init__(self, law: Factored) -> None:
        self.seen: dict[tuple[str, Key], Tensor] = {}
        draw, draw_rows, factors = law.draw, law.draw_rows, law.factors

        def noted(key: Key, block: Any, start: int = 0, stop: int | None = None) -> Tensor:
            self.seen[block.name, key] = draw(key, block, start, stop)
            return self.seen[block.name, key]

        def noted_rows(key: Key, block: Any, rows: Any) -> Tensor:
            noted(key, block)
            return draw_rows(key, block, rows)

        def noted_factors(keys: Any, block: Any) -> Any:
            for key in keys:
                noted(key, block)
            return factors(keys, block)

        object.__setattr__(law, "factors", noted_factors)
        object.__setattr__(law, "draw", noted)
        object.__setattr__(law, "draw_rows", noted_rows)


@pytest.mark.parametrize("name", [n for n in OPTIONS if n != "zo-muon"])
@pytest.mark.parametrize("queries", [1, 3])
def test_what_was_probed_is_what_is_stepped_along_on_refresh_steps_too(
    name: str, queries: int
) -> None:
    method, paper = method_of(name, queries=queries), Restated("weights")
    assert isinstance(method.perturbation, Factored)
    spy = Spy(method.perturbation)
    evaluator = TorchEvaluator(paper.tuned, paper.space, exact)
    tuner = Tuner(paper.space, method, 4, evaluator=evaluator)
    for t in range(7):
        spy.seen.clear()
        before = {b.name: b.value().clone() for b in paper.space}
        estimate = tuner.step(batch(4, t)).estimate
        assert estimate is not None
        assert len(estimate.keys) == queries
        for block in paper.space:
            pairs = zip(estimate.keys, estimate.coefficients, strict=True)
            g = sum(c * spy.seen[block.name, k].double() for k, c in pairs)
            assert isinstance(g, Tensor)
            assert cosine(before[block.name] - block.value(), g) > 1 - 1e-9


@pytest.mark.parametrize("name", REFRESHED)
def test_the_subspace_changes_with_its_epoch_and_only_then(name: str) -> None:
    law, block = law_of(name), float_block("w", 60, 60)
    spans = []
    for t in range(7):
        u = torch.stack([law.draw(Key(1, step=t, query=j), block) for j in range(2)])
        side = u.flatten(0, 1) if name == "lozo" else u.transpose(1, 2).flatten(0, 1)
        spans.append(torch.linalg.svd(side.double(), full_matrices=False)[2][:3])
    shared = [float((a @ b.mT).square().sum()) / 3 for a, b in pairwise(spans)]
    assert [s > 0.999 for s in shared] == [True, True, False, True, True, False]


@pytest.mark.parametrize("name", OPTIONS)
def test_it_resumes_bitwise_within_an_epoch_and_at_its_end(name: str) -> None:
    extra = {"lozo": {"momentum": 0.9}, "tezo": {"rule": "adam"}}.get(name, {})
    method = method_of(name, **extra)

    def tuner() -> tuple[Any, Tuner]:
        model = small()
        space = spaces.get("weights").build(model)
        return model, Tuner(space, method, 1, evaluator=TorchEvaluator(model, space, exact))

    for stop in (2, 3):
        (model, straight), (resumed, again) = tuner(), tuner()
        for t in range(stop):
            estimate = straight.step(batch(4, t)).estimate
        again.load_({k: v.clone() for k, v in straight.state_tensors().items()}, stop, stop)
        assert estimate is not None
        again.remember_(estimate)
        for t in range(stop, 5):
            straight.step(batch(4, t))
            again.step(batch(4, t))
        assert digest(model) == digest(resumed)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("make", [bert, gpt2])
def test_embeddings_probed_by_rows_give_a_transformer_the_losses_of_whole_ones(
    name: str, make: Any
) -> None:
    found = []
    for fast in (True, False):
        model = make()
        space = spaces.get("weights").build(model)
        evaluator = TorchEvaluator(model, space, cross_entropy, fast=fast)
        method = method_of(name, queries=2, eps=0.1)
        estimate = Tuner(space, method, 1, evaluator=evaluator).step(batch(4)).estimate
        assert estimate is not None
        found.append(estimate.coefficients)
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-4)
