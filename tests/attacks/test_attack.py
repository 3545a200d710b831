"""What an attack promises, whatever the method. Run: pytest tests/attacks/test_attack.py"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from attacks.classifiers import Spy, pictures
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import zotune
from zotune import methods
from zotune.attacks import AttackConfig, Outcome
from zotune.core.block import FloatBlock
from zotune.core.grid import Grid
from zotune.core.inputs import Budget
from zotune.core.noise import Key
from zotune.errors import BadInput

METHODS = ["zoqo", "zo-sign", "zo-adam", "zo-sgd", "zoqo(queries=2)", "zo-adam(moments='rebuilt')"]
PATTERNS = ["pixels", "square", "tiles(side=2)", "square(share=0.3, halving=5)"]


def same(one: Outcome, other: Outcome) -> bool:
    fields = ("adversarial", "success", "queries", "correct", "broken")
    return all(torch.equal(getattr(one, f), getattr(other, f)) for f in fields)


@given(
    method=st.sampled_from(METHODS),
    pattern=st.sampled_from(PATTERNS),
    norm=st.sampled_from(["linf", "l2"]),
    levels=st.integers(1, 200),
    shape=st.tuples(st.sampled_from([1, 3]), st.integers(1, 6), st.integers(1, 6)),
    queries=st.integers(6, 30),
    targeted=st.booleans(),
    batch_size=st.sampled_from([2, 256]),
)
def test_every_query_is_a_uint8_image_inside_the_budget_and_is_counted(
    method: str, pattern: str, norm: Any, levels: int, shape: tuple[int, ...], queries: int,
    targeted: bool, batch_size: int,
) -> None:  # fmt: skip
    images, spy = pictures(3, *shape), Spy(shape)
    labels = spy.labels(images)
    budget = min(levels, int(255 * torch.Size(shape).numel() ** 0.5))
    found = zotune.attack(
        spy, images, labels, targets=(labels + 1) % 3 if targeted else None, method=method,
        pattern=pattern, norm=norm, budget=f"{budget}/255", queries=queries, batch_size=batch_size,
    )  # fmt: skip
    shown = spy.shown
    assert shown.dtype == torch.uint8
    assert len(shown) == int(found.queries.sum())
    assert int(found.queries.max()) <= queries
    sizes = Budget(norm, budget).sizes
    away = torch.stack([sizes(i.expand_as(shown), shown) for i in images]).amin(0)
    assert float(away.max()) <= budget
    assert found.adversarial.dtype == torch.uint8
    assert float(sizes(images, found.adversarial).max()) <= budget
    after = spy.labels(found.adversarial)
    fooled = after == (labels + 1) % 3 if targeted else after != labels
    assert torch.equal(fooled & found.correct, found.success)


@pytest.mark.parametrize("method", METHODS)
def test_attacks_fool_and_one_seed_is_one_result(method: str) -> None:
    images, spy = pictures(8, 3, 6, 6), Spy((3, 6, 6), classes=6)
    options = {"method": method, "budget": "6/255", "queries": 60}
    one, again, other = (
        zotune.attack(spy, images, spy.labels(images), seed=seed, **options) for seed in (0, 0, 1)
    )
    assert one.success_rate
    assert same(one, again)
    assert not torch.equal(one.adversarial, other.adversarial)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_batch_is_its_images_one_by_one(method: str, norm: str) -> None:
    images, spy = pictures(7, 1, 6, 6), Spy((1, 6, 6), classes=4)
    labels = spy.labels(images)
    labels[2] = (labels[2] + 1) % 4  # one that is wrong before
    budget = "9/255" if norm == "linf" else "40/255"
    whole, single, pairs = (
        zotune.attack(spy, images, labels, method=method, norm=norm, budget=budget, queries=40,
                      batch_size=size)
        for size in (256, 1, 2)
    )  # fmt: skip
    assert same(whole, single)
    assert same(whole, pairs)
    assert 0 < int(whole.success.sum()) < 7
    assert whole.correct.tolist() == [True, True, False, True, True, True, True]
    assert int(whole.queries[2]) == 1


def test_zoqo_is_the_papers_update_on_images() -> None:
    """arXiv 2501.06736 restated in float64: x+- = clamp(x +- u), x <- clamp(x - lr_q s sign(u))."""
    image, spy = pictures(1, 2, 5, 5, seed=3), Spy((2, 5, 5), classes=2)
    label = spy.labels(image)
    eps, lr, radius, steps = 3.7, 2.4, 5.0, 12
    found = zotune.attack(
        spy, image, label, method=f"zoqo(eps={eps}, lr={lr})", budget="5/255", pattern="pixels",
        queries=2 * steps + 2, seed=9,
    )  # fmt: skip
    assert not bool(found.success), "an image that leaves has no last step to compare"

    def loss(x: Tensor) -> float:
        scores = x.flatten() @ spy.weights
        return float(scores[label] - scores[1 - label])

    x0 = image[0].double()
    low, high = (x0 - radius).clamp_min(0), (x0 + radius).clamp_max(255)
    x, moved = x0.clone(), FloatBlock.of("images", torch.empty(2, 5, 5))
    for step in range(steps):
        u = Grid(max(eps // 1, 1)).draw(Key(9, step=step), moved).double()
        plus, minus = (x + u).clamp(low, high), (x - u).clamp(low, high)
        sign = torch.tensor(loss(plus) - loss(minus)).sign()
        x = (x - max(lr // 1, 1) * sign * u.sign()).clamp(low, high)
    assert torch.equal(found.adversarial[0].double(), x)
    assert not torch.equal(x, x0)


def test_a_method_attacks_or_says_what_to_use_instead() -> None:
    images, spy = pictures(2, 1, 4, 4), Spy((1, 4, 4))
    labels, ran = spy.labels(images), {"zoqo", "zo-sign", "zo-adam", "mezo"}
    for name in methods.entries():
        if name in ran:
            zotune.attack(spy, images, labels, method=name, queries=4)
            continue
        with pytest.raises(BadInput, match="use zoqo, zo-sign, zo-adam or zo-sgd"):
            zotune.attack(spy, images, labels, method=name)
    found = zotune.attack(spy, images, spy.labels(images), method="qzo(eps=4.0, lr=9.0)")
    assert int(found.queries.max()) > 2
    with pytest.raises(BadInput, match="an image by itself"):
        zotune.attack(spy, images, spy.labels(images), method="conmezo(eps=4.0, lr=9.0)")


def test_an_image_leaves_at_its_first_success() -> None:
    image = torch.full((2, 1, 2, 2), 50, dtype=torch.uint8)
    image[1] = 200

    def edge(shown: Tensor) -> Tensor:
        gap = (shown.double() - 50).abs().amax((1, 2, 3))
        return torch.stack([1 - gap, gap - 1], 1)  # any change fools, for the first image

    found = zotune.attack(edge, image, [0, 1], method="zoqo(eps=8.0)", pattern="tiles(side=2)",
                          queries=20)  # fmt: skip
    assert found.success.tolist() == [True, False]
    assert int(found.queries[0]) < 10
    assert int(found.queries[1]) == 20


def test_answers_that_are_not_finite_end_their_image_alone(caplog: Any) -> None:
    images, spy = pictures(4, 1, 5, 5), Spy((1, 5, 5))
    labels = spy.labels(images)
    images[1, 0, 0, 0], images[3, 0, 0, 0] = 255, 7

    def broken(shown: Tensor) -> Tensor:
        scores = spy(shown)
        scores[shown[:, 0, 0, 0] == 255] = torch.nan  # image 1 from the start
        scores[(shown[:, 0, 0, 0] - 7.0).abs() == 6] = torch.inf  # image 3 on the way
        return scores

    options: dict[str, Any] = {"budget": "6/255", "queries": 40, "pattern": "pixels"}
    labels = spy.labels(images)
    with caplog.at_level(logging.WARNING, "zotune"):
        logging.getLogger("zotune").propagate = True
        found = zotune.attack(broken, images, labels, **options)
    assert found.broken.tolist() == [False, True, False, True]
    assert "2 images were left where the classifier's answer was not finite: 1, 3" in caplog.text
    assert not bool(found.success[found.broken].any())
    assert found.as_dict()["not_finite"] == [1, 3]
    whole = zotune.attack(spy, images, labels, **options)
    for number in (0, 2):
        assert torch.equal(found.adversarial[number], whole.adversarial[number])
    with pytest.raises(BadInput, match="not finite for any image"):
        zotune.attack(lambda shown: spy(shown) * torch.nan, images, labels)


def test_numbers_of_an_outcome_are_those_of_its_images(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    images, spy = pictures(6, 3, 6, 6), Spy((3, 6, 6), classes=5)
    labels = spy.labels(images)
    labels[0] = (labels[0] + 1) % 5
    found = zotune.attack(spy, images, labels, budget="60/255", queries=50)
    assert bool(found.success.any())
    found.save(tmp_path / "run")
    told = json.loads((tmp_path / "run/result.json").read_text())
    after = spy.labels(found.adversarial)
    assert told["accuracy"] == pytest.approx(5 / 6)
    assert told["robust_accuracy"] == pytest.approx(float((after == labels).double().mean()))
    assert told["success_rate"] == pytest.approx(int(found.success.sum()) / 5)
    change = (found.adversarial.double() - images.double()) / 255
    fooled = change[found.success].flatten(1)
    assert told["l2"] == pytest.approx(float(fooled.norm(dim=1).mean()))
    assert told["linf"] == pytest.approx(float(fooled.abs().amax(1).mean()))
    assert eval(told["config"], {"AttackConfig": AttackConfig}) == found.config
    kept = load_file(tmp_path / "run/images.safetensors")
    assert torch.equal(kept["adversarial"], found.adversarial)
    assert (tmp_path / "run/pictures.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_attack_is_a_result_too(tmp_path: Path) -> None:
    images, spy = pictures(2, 1, 3, 3), Spy((1, 3, 3))
    found = zotune.attack(spy, images, (spy.labels(images) + 1) % 3)
    assert (found.accuracy, found.success_rate, found.queries.tolist()) == (0.0, None, [1, 1])
    found.save(tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["success_rate"] is None


LABELS = [0, 1]


@pytest.mark.parametrize(("changes", "told"), [
    ({"budget": 0}, "holds no image but the original"),
    ({"budget": "0.5/255"}, "cannot|is no number"),
    ({"budget": 0.001}, "holds no image but the original"),
    ({"budget": -1}, "holds no image but the original"),
    ({"budget": "300/255"}, "can change at all"),
    ({"budget": 4, "norm": "l2"}, "can change at all, 3"),
    ({"budget": float("nan")}, "is no number"), ({"budget": float("inf")}, "is no number"),
    ({"budget": "much"}, "is no number"), ({"budget": "1/0"}, "is no number"),
    ({"norm": "l1"}, "want 'linf' or 'l2'"),
    ({"queries": 3}, "want at least 4"),
    ({"queries": 10, "method": "zoqo(queries=5)"}, "want at least 12"),
    ({"method": "zoko"}, "did you mean zoqo"), ({"method": "zoqo + mezo"}, "use zoqo"),
    ({"method": "adamw"}, "use zoqo"), ({"method": "mezo(directions='one-sided')"}, "use zoqo"),
    ({"pattern": "circles"}, "unknown pattern"), ({"pattern": "square(size=3)"}, "cannot read"),
    ({"pattern": "pixels(side=3)"}, "cannot read"),
    ({"batch_size": 0}, "want at least 1"), ({"seed": -1}, "want 0 <= seed"),
    ({"method": "zo-sign(weight_decay=0.1)"}, "weight_decay"),
    ({"labels": [0, 3]}, "label 3 of image 1 is no class"),
    ({"labels": [0, -1]}, "label -1 of image 1"), ({"labels": [0]}, "want one whole number each"),
    ({"labels": [0.0, 1.0]}, "want one whole number each"),
    ({"targets": [0, 7]}, "target 7 of image 1 is no class"),
    ({"probabilities": True}, "are not probabilities"),
])  # fmt: skip
def test_what_allows_no_attack_is_refused(changes: dict[str, Any], told: str) -> None:
    images, spy = pictures(2, 1, 3, 3), Spy((1, 3, 3))
    given = {"labels": LABELS, **changes}
    with pytest.raises(BadInput, match=told):
        zotune.attack(spy, images, given.pop("labels"), **given)
    assert len(spy.seen) <= 1, "errors come before the attack"
