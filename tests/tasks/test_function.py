from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from zotune.errors import BadInput
from zotune.models import Loaded
from zotune.tasks import FunctionTask


def score(model: nn.Module, examples: list[Any]) -> float:
    """Not differentiable: counts."""
    return float(sum(e > float(model(torch.zeros(1))) for e in examples))


def test_any_function_is_an_objective() -> None:
    task = FunctionTask(score, [1.0, -1.0, 2.0], test=[3.0])
    model = nn.Identity()
    loss, weight = task.losses(model, task.batch(task.split("train")))
    assert loss.dtype == torch.float32
    assert loss.tolist() == [-2.0]
    assert weight.tolist() == [1.0]
    assert not task.per_example
    assert not task.stackable
    assert task.splits == ("train", "test")
    assert task.evaluate(model, task.split("train"), 2) == {
        "loss": pytest.approx(-1.0),
        "score": pytest.approx(1.0),
    }


def test_scores_per_example() -> None:
    task = FunctionTask(lambda model, xs: [2.0 * x for x in xs], [1.0, 5.0], per_example=True)
    loss, _ = task.losses(nn.Identity(), task.batch(task.split("train")))
    assert loss.tolist() == [-2.0, -10.0]


def test_parts_of_a_batch_score_their_own_examples() -> None:
    task = FunctionTask(lambda model, xs: [float(x) for x in xs], [1, 2, 3], per_example=True)
    batch = task.batch(task.split("train"))
    assert task.losses(nn.Identity(), batch.select(1, 3))[0].tolist() == [-2.0, -3.0]


def test_bind_chooses_the_module(tiny_llama: Loaded) -> None:
    task = FunctionTask(score, [1.0], bind=lambda found: found.model.lm_head)
    assert task.prepare(tiny_llama) is tiny_llama.model.lm_head
    assert FunctionTask(score, [1.0]).prepare(tiny_llama) is tiny_llama.model


def test_misuse_is_explained() -> None:
    with pytest.raises(BadInput, match="needs examples"):
        FunctionTask(score)
    with pytest.raises(BadInput, match="must be a function"):
        FunctionTask(3, [1])  # type: ignore[arg-type]
    task = FunctionTask(lambda model, xs: [1.0, 2.0], [1, 2, 3])
    batch = task.batch(task.split("train"))
    with pytest.raises(BadInput, match="returned 2 numbers, wanted 1"):
        task.losses(nn.Identity(), batch)
    with pytest.raises(BadInput, match="cannot run 2 stacked copies"):
        task.losses(nn.Identity(), batch.repeat(2))
    with pytest.raises(BadInput, match="not an example of this task"):
        task.encode({"row": 9})
