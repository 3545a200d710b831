from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tasks.tiny import bert, check_gradient, check_stacking, gpt2, llama, loaded, make_tokenizer

from zotune import tasks
from zotune.errors import BadInput, DataError
from zotune.models import Loaded
from zotune.tasks import Classification
from zotune.tasks.candidates import CandidateScorer
from zotune.tasks.encoding import Template, TextEncoder
from zotune.tasks.scoring import CausalScorer

ROWS = [
    {"text": "the film was fun and I liked it", "label": 1},
    {"text": "the film was dull", "label": 0},
    {"text": "I left", "label": 0},
    {"text": "a man eats an apple in Paris and liked it", "label": 1},
]
LABELS = ("negative", "positive")


def make(words: Any = ("terrible", "great"), **options: Any) -> Classification:
    return Classification({"train": ROWS}, LABELS, "{text} It was", words, **options)


@pytest.mark.parametrize("words", [("terrible", "great"), ("not so dull", "great fun")])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_stacked_equals_separate(words: Any, reduce: str, tiny_llama: Loaded) -> None:
    task = make(words, reduce=reduce)
    check_stacking(task, task.prepare(tiny_llama), ROWS)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_fast_path_equals_general_path(build: Any) -> None:
    found = build(make_tokenizer())
    fast, slow = make(), make(fast=False)
    model = fast.prepare(found)
    slow.prepare(found)
    quick, general = fast.batch(ROWS), slow.batch(ROWS)
    assert quick["input_ids"].shape[0] == len(ROWS)
    assert general["input_ids"].shape[0] == 2 * len(ROWS)
    with torch.inference_mode():
        a, b = fast.scores(model, quick), slow.scores(model, general)
        torch.testing.assert_close(a.log_softmax(-1), b.log_softmax(-1), rtol=1e-5, atol=1e-5)
        losses = fast.losses(model, quick)[0], slow.losses(model, general)[0]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


def test_scores_are_the_log_probabilities_of_the_words(tiny_llama: Loaded) -> None:
    """Against one naive full forward per candidate."""
    task = make(("not so dull", "great"))
    model = task.prepare(tiny_llama)
    tokenizer = tiny_llama.tokenizer
    with torch.inference_mode():
        scores = task.scores(model, task.batch(ROWS))
        for i, row in enumerate(ROWS):
            prompt = [1, *tokenizer(f"{row['text']} It was")["input_ids"]]
            for j, word in enumerate(("not so dull", "great")):
                answer = tokenizer(" " + word)["input_ids"]
                logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
                places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
                wanted = sum(logits[p, a] for p, a in zip(places, answer, strict=True))
                torch.testing.assert_close(scores[i, j], wanted, rtol=1e-5, atol=1e-5)


def test_body_and_head_are_used_only_where_they_give_the_models_logits(tokenizer: Any) -> None:
    from tasks.tiny import fill_
    from transformers import CohereConfig, CohereForCausalLM

    assert CausalScorer.probe(llama(tokenizer).model).split
    config = CohereConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, logit_scale=0.25,
    )  # fmt: skip
    scaled = loaded(fill_(CohereForCausalLM(config)), tokenizer, "causal")
    assert not CausalScorer.probe(scaled.model).split
    task = make(("not so dull", "great"))
    check_stacking(task, task.prepare(scaled), ROWS)


def test_pieces_of_logits_give_the_same_losses(
    tiny_llama: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make(("not so dull", "great"))
    model = task.prepare(tiny_llama)
    whole = task.losses(model, task.batch(ROWS))[0]
    monkeypatch.setattr("zotune.tasks.scoring.MAX_LOGITS", 1)
    torch.testing.assert_close(task.losses(model, task.batch(ROWS))[0], whole)


@pytest.mark.parametrize("kind", ["causal", "encoder", "classifier"])
def test_every_kind_is_stackable_and_differentiable(kind: str, tokenizer: Any) -> None:
    found = llama(tokenizer) if kind == "causal" else bert(tokenizer, kind, num_labels=2)
    task = make()
    model = task.prepare(found)
    check_stacking(task, model, ROWS)
    check_gradient(task, model, ROWS)
    numbers = task.evaluate(model, ROWS, 3)
    assert set(numbers) == {"loss", "accuracy", "macro_f1", "f1"}
    with torch.inference_mode():
        loss = task.losses(model, task.batch(ROWS))[0].mean()
    assert numbers["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_encoder_head_starts_as_zero_shot_cosine(tiny_bert: Loaded) -> None:
    task = make(texts=[["dull"], ["great", "fun"]], temperature=10.0)
    model = task.prepare(tiny_bert)
    assert model.head.weight.norm(dim=1).tolist() == pytest.approx([10.0, 10.0], rel=1e-4)
    with torch.inference_mode():
        scores = task.scores(model, task.batch([{"text": "dull", "label": 0}]))
    assert float(scores[0, 0]) == pytest.approx(10.0, rel=1e-3)


def test_a_checkpoints_own_head_is_matched_by_label_names(tokenizer: Any) -> None:
    swapped = bert(tokenizer, "classifier", id2label={0: "POSITIVE", 1: "NEGATIVE"})
    task = make()
    model = task.prepare(swapped)
    batch = task.batch(ROWS)
    raw = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(task.scores(model, batch), raw[:, [1, 0]])
    with pytest.raises(BadInput, match="are not the task's"):
        make().prepare(bert(tokenizer, "classifier", num_labels=3))


def test_a_saved_pooled_head_comes_back_as_a_classifier(tokenizer: Any) -> None:
    first = make()
    model = first.prepare(bert(tokenizer))
    again = Classification({"train": ROWS}, LABELS[::-1], "{text} It was", ("great", "terrible"))
    same = again.prepare(loaded(model, tokenizer, "classifier"))
    a = first.scores(model, first.batch(ROWS))
    b = again.scores(same, again.batch(ROWS))
    torch.testing.assert_close(a, b[:, [1, 0]])


def test_pairs_reach_an_encoder_as_pairs(tokenizer: Any) -> None:
    rows = [{"a": "a man", "b": "a woman", "label": 1}]
    task = Classification({"train": rows}, LABELS, "{a} {b}", None, None, ("a", "b"))
    task.prepare(bert(tokenizer, "classifier", num_labels=2))
    ids = task.batch(rows)["input_ids"][0].tolist()
    assert ids == tokenizer("a man", "a woman")["input_ids"]


def test_long_prompts_lose_their_left_and_it_is_said_once(
    tiny_llama: Loaded, caplog: pytest.LogCaptureFixture
) -> None:
    task = make(max_length=10)
    task.prepare(tiny_llama)
    long = {"text": "fun " * 40 + "dull", "label": 1}
    with caplog.at_level(logging.WARNING, "zotune"):
        first = task.encode(long)
        task.encode(long)
    assert task.truncated == 2
    assert len([m for m in caplog.messages if "max_length=10" in m]) == 1
    ids = first.targets[0].ids
    assert len(ids) == 10
    assert ids[0] == 1
    tail = tiny_llama.tokenizer(" dull It was great")["input_ids"]
    assert first.targets[1].ids[-len(tail) :] == tail


def test_length_limits_are_checked(tiny_llama: Loaded) -> None:
    with pytest.raises(BadInput, match="max_length=97 is more than the model's own limit 96"):
        make(max_length=97).prepare(tiny_llama)
    with pytest.raises(BadInput, match="no room for text"):
        make(max_length=1).prepare(tiny_llama)
    task = make(("terrible", "great " * 20), max_length=12)
    task.prepare(tiny_llama)
    with pytest.raises(DataError, match="leaves no room for its prompt"):
        task.encode(ROWS[0])
    bare = Loaded(tiny_llama.model, None, "causal", tiny_llama.path, tiny_llama.config, "float")
    with pytest.raises(BadInput, match="has no tokenizer"):
        make().prepare(bare)


def test_bos_auto_follows_the_tokenizer(tokenizer: Any) -> None:
    assert TextEncoder(tokenizer, 9).head == [1]
    assert TextEncoder(tokenizer, 9, False).head == [] == TextEncoder(tokenizer, 9, "false").head
    same = make_tokenizer(eos="<s>")
    assert TextEncoder(same, 9).head == []
    assert TextEncoder(same, 9, True).head == [1]
    same.bos_token = None
    with pytest.raises(BadInput, match="has no BOS token"):
        TextEncoder(same, 9, True)
    with pytest.raises(BadInput, match="bos='perhaps' is not known"):
        TextEncoder(same, 9, "perhaps")


def test_accuracy_objective_is_one_minus_accuracy(tiny_llama: Loaded) -> None:
    task = make(objective="accuracy")
    model = task.prepare(tiny_llama)
    loss, _ = task.losses(model, task.batch(ROWS))
    assert task.per_example
    assert set(loss.tolist()) <= {0.0, 1.0}
    wanted = 1 - task.evaluate(model, ROWS, 4)["accuracy"]
    assert float(loss.mean()) == pytest.approx(wanted)
    check_stacking(task, model, ROWS)


def test_f1_objective_is_one_number_per_copy(tiny_llama: Loaded) -> None:
    task = make(objective="f1")
    model = task.prepare(tiny_llama)
    loss, weight = task.losses(model, task.batch(ROWS))
    assert not task.per_example
    assert loss.shape == weight.shape == (1,)
    assert float(loss) == pytest.approx(-task.evaluate(model, ROWS, 4)["macro_f1"])
    stacked, _ = task.losses(model, task.batch(ROWS).repeat(3))
    torch.testing.assert_close(stacked, loss.repeat(3))


def test_metrics_agree_with_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    from zotune.tasks.metrics import f1_of, macro_f1

    predicted, wanted = [0, 1, 2, 2, 1, 0, 0], [0, 2, 2, 1, 1, 0, 1]
    assert macro_f1(predicted, wanted) == pytest.approx(
        sklearn.f1_score(wanted, predicted, average="macro")
    )
    assert f1_of(1, predicted, wanted) == pytest.approx(
        sklearn.f1_score([w == 1 for w in wanted], [p == 1 for p in predicted])
    )


def test_own_rows_by_options(write: Any, tiny_llama: Loaded) -> None:
    lines = "".join(f'{{"q": "film {i}", "y": "{"bad" if i % 2 else "ok"}"}}\n' for i in range(30))
    task = tasks.get(
        "classification",
        data=str(write("rows.jsonl", lines)),
        template="{q} was",
        label_words="bad=terrible,ok=great",
        label_field="y",
        dev_size=5,
    )
    assert task.labels == ["bad", "ok"]
    assert task.words == ["terrible", "great"]
    assert task.splits == ("train", "dev")
    assert len(task.split("train")) == 25
    model = task.prepare(tiny_llama)
    assert 0 <= task.evaluate(model, task.split("dev"), 4)["accuracy"] <= 1
    with pytest.raises(DataError, match="there is no 'test' split; this task has train, dev"):
        task.split("test")


def test_bad_rows_are_named(write: Any) -> None:
    path = write(
        "r.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"}\n{"text": "c", "label": "y"}'
    )
    with pytest.raises(DataError, match=r"r\.jsonl, line 2: no field 'label'; found text; wanted"):
        tasks.get("classification", data=path, labels="x,y", dev_size=1)
    with pytest.raises(DataError, match=r"line \d: no field 'story'; found text, label; wanted"):
        tasks.get("classification", data=path, labels="x,y", dev_size=1, template="{story} is")
    path = write("s.jsonl", '{"text": "a", "label": "x"}\n{"text": "c", "label": "z"}\n')
    with pytest.raises(DataError, match=r"unknown label '.'; the labels are v, w"):
        tasks.get("classification", data=path, labels="v,w", dev_size=1)


def test_bad_prompts_and_words_are_refused() -> None:
    with pytest.raises(BadInput, match="must be the last thing"):
        Template("{label}: {text}")
    with pytest.raises(BadInput, match="shows no field"):
        Template("It was")
    with pytest.raises(BadInput, match="malformed"):
        Template("{text It was")
    with pytest.raises(BadInput, match="no word for label 'positive'"):
        make({"negative": "bad"})
    with pytest.raises(BadInput, match="must differ"):
        make(("bad", "bad"))
    with pytest.raises(BadInput, match="3 label words for 2 labels"):
        make("a,b,c")
    with pytest.raises(BadInput, match="objective='acc' is not known"):
        make(objective="acc")
    with pytest.raises(BadInput, match="call prepare"):
        make().encode(ROWS[0])


def test_words_after_a_line_break_get_no_space(tiny_llama: Loaded) -> None:
    task = Classification({"train": ROWS}, LABELS, "{text}\n", ("No", "Yes"))
    task.prepare(tiny_llama)
    encoded = task.encode(ROWS[0])
    assert tiny_llama.tokenizer.decode(encoded.targets[1].ids).endswith("\nYes")


def test_mixed_batches_fall_back_to_the_general_path(tiny_llama: Loaded) -> None:
    task = make()
    task.prepare(tiny_llama)
    scorer = task._scorer
    assert isinstance(scorer, CandidateScorer)
    odd = scorer.encode("the film", ["great", "not so dull"], " ", 0)
    assert "candidate_mask" in scorer.collate([task.encode(ROWS[0]), odd])
    assert "candidate_ids" in scorer.collate([task.encode(ROWS[0])])
