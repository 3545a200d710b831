from __future__ import annotations

from typing import Any

import pytest
import torch
from tasks.tiny import check_gradient, check_stacking, gpt2, llama, make_tokenizer

from zotune import tasks
from zotune.errors import BadInput, DataError
from zotune.models import Loaded
from zotune.tasks import QuestionAnswering
from zotune.tasks.generation import greedy
from zotune.tasks.metrics import squad_exact, squad_f1
from zotune.tasks.qa import BARE_TEMPLATE

ROWS = [
    {"context": "a man eats an apple in Paris", "question": "a man?", "answers": ["Paris"]},
    {"context": "the film", "question": "a woman reads a book?", "answers": ["Rome", "in Rome"]},
    {"context": "I left", "question": "I?", "answers": ["dull and terrible"]},
]


def make(**options: Any) -> QuestionAnswering:
    options = {"max_new_tokens": 6} | options
    return QuestionAnswering({"train": ROWS}, BARE_TEMPLATE, **options)


@pytest.mark.parametrize("objective", ["loss", "f1"])
def test_stacked_equals_separate(objective: str, tiny_llama: Loaded) -> None:
    task = make(objective=objective)
    model = task.prepare(tiny_llama)
    check_stacking(task, model, ROWS)


def test_differentiable_and_evaluated(tiny_llama: Loaded) -> None:
    task = make()
    model = task.prepare(tiny_llama)
    check_gradient(task, model, ROWS)
    found = task.evaluate(model, ROWS, 2)
    assert set(found) == {"loss", "f1", "exact_match"}


@pytest.mark.parametrize("build", [llama, gpt2])
def test_generation_equals_one_full_forward_per_token(build: Any) -> None:
    task = make()
    model = task.prepare(build(make_tokenizer()))
    features = [task.encode(row) for row in ROWS]
    batch = task._prompts(features)
    with torch.inference_mode():
        found = greedy(model, batch["input_ids"], batch["attention_mask"], 6, [2], 0)
        for feature, answer in zip(features, found, strict=True):
            ids: list[int] = []
            while len(ids) < 6:
                logits = model(torch.tensor([feature.prompt + ids])).logits[0, -1]
                if int(logits.argmax()) == 2:
                    break
                ids.append(int(logits.argmax()))
            assert answer == ids


def test_generation_stops_at_the_end_token(tiny_llama: Loaded) -> None:
    task = make()
    model = task.prepare(tiny_llama)
    batch = task._prompts([task.encode(row) for row in ROWS])
    free = greedy(model, batch["input_ids"], batch["attention_mask"], 6, [], 0)
    stop = free[0][2]
    ended = greedy(model, batch["input_ids"], batch["attention_mask"], 6, [stop], 0)
    assert ended[0] == free[0][: free[0].index(stop)]


def test_f1_objective_is_minus_the_metric(
    tiny_llama: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make(objective="f1")
    model = task.prepare(tiny_llama)
    answers = ["Paris", "in Rome city", "fun"]
    monkeypatch.setattr(task, "answers", lambda model, batch: answers)
    loss, weight = task.losses(model, task.batch(ROWS))
    assert loss.tolist() == pytest.approx([-1.0, -0.8, 0.0])
    assert weight.tolist() == [1.0] * 3


@pytest.mark.parametrize(
    ("answer", "golds", "f1", "exact"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1.0, 1.0),
        ("a tower", ["Eiffel tower"], 2 / 3, 0.0),
        ("the the", ["x"], 0.0, 0.0),
        ("x y", ["q", "x y z", "x"], 0.8, 0.0),
    ],
)
def test_squad_metrics(answer: str, golds: list[str], f1: float, exact: float) -> None:
    assert squad_f1(answer, golds) == pytest.approx(f1)
    assert squad_exact(answer, golds) == exact


def test_long_contexts_leave_room_for_the_answer(tiny_llama: Loaded) -> None:
    task = make(max_length=20)
    task.prepare(tiny_llama)
    row = {"context": "fun " * 50, "question": "a man?", "answers": ["Paris"]}
    feature = task.encode(row)
    assert len(feature.prompt) == 14
    assert feature.prompt[0] == 1
    assert task.truncated == 1
    assert tiny_llama.tokenizer.decode(feature.prompt).endswith("a man?\nAnswer:")


def test_rows_and_options_are_checked(tiny_llama: Loaded) -> None:
    with pytest.raises(DataError, match=r"line 2: no field 'question'; found context, answers"):
        tasks.get("qa", data={"train": [ROWS[0], {"context": "a", "answers": ["b"]}], "dev": ROWS})
    bad = {"context": "a", "question": "q", "answers": []}
    with pytest.raises(DataError, match="wanted one or more non-empty answers"):
        tasks.get("qa", data={"train": [bad], "dev": ROWS})
    one = {"context": "a", "question": "q", "answer": "b"}
    assert tasks.get("qa", data={"train": [one], "dev": ROWS}).split("train")[0]["answers"] == ["b"]
    with pytest.raises(BadInput, match="leaves no room for a prompt"):
        make(max_length=7).prepare(tiny_llama)
    with pytest.raises(BadInput, match="use loss, f1"):
        make(objective="accuracy")
