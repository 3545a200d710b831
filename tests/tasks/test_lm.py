from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tasks.tiny import check_gradient, check_stacking, llama

from zotune import tasks
from zotune.errors import BadInput, DataError
from zotune.models import Loaded
from zotune.tasks import LanguageModel

DOCS = [
    {"text": "the film was great fun and I liked it"},
    {"text": "I left"},
    {"text": "a man eats an apple in Paris and a woman reads a book in Rome"},
]


def make(**options: Any) -> LanguageModel:
    return LanguageModel({"train": DOCS}, **options)


def test_stacked_equals_separate(tiny_llama: Loaded) -> None:
    task = make(max_length=12)
    model = task.prepare(tiny_llama)
    check_stacking(task, model, task.split("train"))
    check_gradient(task, model, task.split("train"))


def test_loss_is_the_mean_nll_and_perplexity_weighs_tokens(tiny_llama: Loaded) -> None:
    task = make()
    model = task.prepare(tiny_llama)
    nll, count = 0.0, 0
    with torch.inference_mode():
        for row, window in zip(DOCS, task.split("train"), strict=True):
            ids = torch.tensor([[1, *tiny_llama.tokenizer(row["text"])["input_ids"]]])
            loss = model(ids, labels=ids).loss
            ours, weight = task.losses(model, task.batch([window]))
            assert float(weight) == ids.shape[1] - 1
            assert float(ours) == pytest.approx(float(loss), rel=1e-5)
            nll, count = nll + float(loss) * float(weight), count + int(weight)
    found = task.evaluate(model, task.split("train"), 2)
    assert found["loss"] == pytest.approx(nll / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert found["tokens"] == count


@pytest.mark.parametrize("pack", [False, True])
def test_windows_cover_every_token_once(pack: bool, tiny_llama: Loaded) -> None:
    task = make(max_length=9, pack=pack)
    task.prepare(tiny_llama)
    windows = task.split("train")
    assert all(len(w["ids"]) <= 9 and w["ids"][0] == 1 for w in windows)
    stream = [i for w in windows for i in w["ids"][1:]]
    between = [2] if pack else []
    wanted = [i for d in DOCS for i in (*tiny_llama.tokenizer(d["text"])["input_ids"], *between)]
    assert stream == wanted
    if pack:
        assert all(len(w["ids"]) == 9 for w in windows[:-1])


def test_overflow_drop_keeps_one_counted_window_a_document(tiny_llama: Loaded) -> None:
    task = make(max_length=6, overflow="drop")
    task.prepare(tiny_llama)
    assert [w["document"] for w in task.split("train")] == [0, 1, 2]
    assert task.truncated == 2


def test_without_bos_the_first_token_is_not_predicted(tokenizer: Any) -> None:
    task = make(bos=False)
    task.prepare(llama(tokenizer))
    window = task.split("train")[0]
    assert window["ids"] == tokenizer(DOCS[0]["text"])["input_ids"]
    assert float(task.batch([window])["target_mask"].sum()) == len(window["ids"]) - 1


def test_a_raw_text_can_be_encoded(tiny_llama: Loaded) -> None:
    task = make(max_length=6)
    task.prepare(tiny_llama)
    assert len(task.encode(DOCS[0]).ids) == 6
    assert task.truncated == 1


def test_documents_of_a_text_file(write: Any, tiny_llama: Loaded) -> None:
    path = str(write("t.txt", "one a\ntwo\n\nthree\nfour\n\n\nfive\n\nsix"))
    count = {"line": 6, "paragraph": 4}
    for unit, wanted in count.items():
        task = tasks.get("lm", data=path, document=unit, dev_size=1)
        assert sum(len(task.split(s)) for s in task.splits) == wanted
    task = tasks.get("lm", data=path, document="file")
    text = task.split("train")[0]["text"], task.split("dev")[0]["text"]
    assert " ".join(text).split() == ["one", "a", "two", "three", "four", "five", "six"]
    with pytest.raises(DataError, match="document='page' is not known"):
        tasks.get("lm", data=path, document="page")


def test_bad_options(tiny_bert: Loaded) -> None:
    with pytest.raises(BadInput, match="needs a causal model"):
        make().prepare(tiny_bert)
    with pytest.raises(BadInput, match="overflow='cut' is not known"):
        make(overflow="cut")
    with pytest.raises(BadInput, match="would keep one window"):
        make(overflow="drop", pack=True)
    with pytest.raises(DataError, match="no field 'text'; found story; wanted text"):
        tasks.get("lm", data=[{"story": "a"}] * 2, dev_size=1)
