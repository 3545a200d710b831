from __future__ import annotations

from typing import Any

import pytest
import torch
from tasks.tiny import check_gradient, check_stacking

from zotune import tasks
from zotune.errors import BadInput, DataError
from zotune.models import Loaded
from zotune.tasks.choice import check_choices

ROWS = [
    {
        "prompt": "the film was dull so",
        "choices": ["I left", "I liked it", "it was fun"],
        "label": 0,
    },
    {"prompt": "a man eats because", "choices": ["he liked apples", "he left"], "label": 1},
    {"prompt": "It was", "choices": ["great", "terrible"], "label": 0},
]


def test_stacked_equals_separate_with_unequal_candidates(tiny_llama: Loaded) -> None:
    task = tasks.get("choice", data={"train": ROWS, "dev": ROWS})
    model = task.prepare(tiny_llama)
    check_stacking(task, model, ROWS)
    check_gradient(task, model, ROWS)


def test_padding_candidates_never_win(tiny_llama: Loaded) -> None:
    task = tasks.get("choice", data={"train": ROWS, "dev": ROWS}, reduce="mean")
    model = task.prepare(tiny_llama)
    scores = task.scores(model, task.batch(ROWS))
    assert scores.shape == (3, 3)
    assert torch.isinf(scores).tolist() == [[False] * 3, [False, False, True], [False, False, True]]
    assert torch.isfinite(task.losses(model, task.batch(ROWS))[0]).all()
    assert set(task.evaluate(model, ROWS, 2)) == {"loss", "accuracy"}


def test_a_label_may_be_the_text_of_a_choice() -> None:
    row = {"prompt": "p", "choices": ["a", "b"], "label": "b"}
    assert check_choices(row)["label"] == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "label": 0}, "no field 'choices'; found prompt, label; wanted"),
        ({"prompt": "p", "choices": ["a"], "label": 0}, "two or more choices"),
        ({"prompt": "p", "choices": "ab", "label": 0}, "two or more choices"),
        ({"prompt": "p", "choices": ["a", " "], "label": 0}, "empty choice"),
        ({"prompt": "p", "choices": ["a", "b"], "label": 2}, "label 2 is not one of the 2"),
    ],
)
def test_bad_rows_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"line 1: .*{message}"):
        tasks.get("choice", data={"train": [row], "dev": ROWS})


def test_only_causal_models_and_known_objectives(tiny_bert: Loaded) -> None:
    with pytest.raises(BadInput, match="needs a causal model, got kind 'encoder'"):
        tasks.get("choice", data={"train": ROWS, "dev": ROWS}).prepare(tiny_bert)
    with pytest.raises(BadInput, match="use loss, accuracy"):
        tasks.get("choice", data={"train": ROWS, "dev": ROWS}, objective="f1")
