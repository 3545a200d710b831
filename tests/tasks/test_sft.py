from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tasks.tiny import CHATML, check_gradient, check_stacking, llama, make_tokenizer

from zotune import tasks
from zotune.errors import BadInput, DataError
from zotune.models import Loaded
from zotune.tasks import SFT
from zotune.tasks.chat import assistant_spans

ROWS = [
    {"prompt": "question: the film was", "completion": " great fun"},
    {"prompt": "question: I liked it because a man eats", "completion": " Yes"},
    {"prompt": "", "completion": "It was terrible and dull"},
]
TALK = [
    {"role": "system", "content": "answer the question"},
    {"role": "user", "content": "the film?"},
    {"role": "assistant", "content": "It was great"},
    {"role": "user", "content": "Yes?"},
    {"role": "assistant", "content": "No"},
]
MARKED = CHATML.replace(
    "{{ m.content }}<|im_end|>",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}",
)
# Like Qwen3: an empty thought stands before the last answer only, and content is stripped.
REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(template: str | None = CHATML, eos: str = "<|im_end|>") -> Loaded:
    tokenizer = make_tokenizer(eos)
    tokenizer.chat_template = template
    return llama(tokenizer)


def make(rows: Any = ROWS, **options: Any) -> SFT:
    return SFT({"train": rows}, **options)


def trained(task: SFT, example: Any) -> list[str]:
    return [text for text, flag in task.mask_spans(example) if flag]


def test_stacked_equals_separate(tiny_llama: Loaded) -> None:
    task = make()
    model = task.prepare(tiny_llama)
    check_stacking(task, model, ROWS)
    check_gradient(task, model, ROWS)


def test_loss_is_the_models_own_with_a_prompt_mask(tiny_llama: Loaded) -> None:
    task = make()
    model = task.prepare(tiny_llama)
    target = task.encode(ROWS[0])
    ids = torch.tensor([target.ids])
    labels = torch.full_like(ids, -100)
    labels[0, target.scored] = ids[0, target.scored]
    with torch.inference_mode():
        loss, weight = task.losses(model, task.batch(ROWS[:1]))
        wanted = model(ids, labels=labels).loss
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    assert float(weight) == len(target.scored)
    assert set(task.evaluate(model, ROWS, 2)) == {"loss", "perplexity", "tokens"}


def test_only_the_completion_and_eos_are_trained(tiny_llama: Loaded) -> None:
    task = make()
    task.prepare(tiny_llama)
    assert task.show_mask(ROWS[0]) == "<s>question: the film was⟦ great fun</s>⟧"
    assert task.show_mask(ROWS[2]) == "<s>⟦It was terrible and dull</s>⟧"


def test_eos_that_is_never_trained_is_said_once(
    tiny_llama: Loaded, caplog: pytest.LogCaptureFixture
) -> None:
    task = make(append_eos=False)
    task.prepare(tiny_llama)
    with caplog.at_level(logging.WARNING, "zotune"):
        task.encode(ROWS[0])
        task.encode(ROWS[1])
    said = [m for m in caplog.messages if "never trained" in m]
    assert len(said) == 1
    assert "append_eos=true" in said[0]


def test_templates_that_end_a_turn_otherwise_are_said(caplog: pytest.LogCaptureFixture) -> None:
    task = make([{"messages": TALK}])
    task.prepare(chat(eos="</s>"))
    with caplog.at_level(logging.WARNING, "zotune"):
        task.encode({"messages": TALK})
    assert "never trained" in caplog.text
    caplog.clear()
    task = make([{"messages": TALK}])
    task.prepare(chat())
    task.encode({"messages": TALK})
    assert "never trained" not in caplog.text


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_every_assistant_turn_and_nothing_else_is_trained(template: str) -> None:
    task = make([{"messages": TALK}])
    task.prepare(chat(template))
    assert trained(task, {"messages": TALK}) == ["It was great<|im_end|>", "No<|im_end|>"]
    shown = task.show_mask({"messages": TALK}).replace("<|im_end|>\n", "<|im_end|>")
    assert "user\nYes?<|im_end|><|im_start|>assistant\n⟦No<|im_end|>⟧" in shown


def test_templates_that_rewrite_earlier_turns() -> None:
    task = make([{"messages": TALK}])
    task.prepare(chat(REWRITES))
    first, last = trained(task, {"messages": TALK})
    assert first == "It was great<|im_end|>"
    assert last.endswith("No<|im_end|>")
    assert "assistant" not in last


def test_a_repeated_answer_is_found_in_its_own_turn() -> None:
    talk = [
        {"role": "user", "content": "Yes"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "Yes"},
        {"role": "assistant", "content": "Yes"},
    ]
    for template in (CHATML, REWRITES):
        task = make([{"messages": talk}])
        found = chat(template)
        task.prepare(found)
        render = lambda m, p, t=found.tokenizer: t.apply_chat_template(  # noqa: E731
            m, tokenize=False, add_generation_prompt=p
        )
        text, spans = assistant_spans(render, talk)
        assert len(spans) == 2
        for start, end in spans:
            assert text[:start].endswith(("assistant\n", "</think>\n\n"))
            assert text[start:end].endswith("Yes<|im_end|>")


def test_tokenizers_without_offsets_train_the_same_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make([{"messages": TALK}])
    found = chat()
    task.prepare(found)
    wanted = task.encode({"messages": TALK})
    monkeypatch.setattr(type(found.tokenizer), "is_fast", False)
    assert task.encode({"messages": TALK}) == wanted


def test_messages_stack_and_a_missing_template_is_refused() -> None:
    talks = [{"messages": TALK}, {"messages": TALK[:3]}]
    task = make(talks)
    check_stacking(task, task.prepare(chat()), talks)
    with pytest.raises(BadInput, match=r"no chat template.*'prompt' and 'completion'"):
        make(talks).prepare(chat(None))


def test_truncation_keeps_the_answer(tiny_llama: Loaded, caplog: pytest.LogCaptureFixture) -> None:
    row = {"prompt": "fun " * 30 + "question:", "completion": " great"}
    task = make(max_length=8)
    task.prepare(tiny_llama)
    with caplog.at_level(logging.WARNING, "zotune"):
        target = task.encode(row)
        task.encode(row)
    assert len(target.ids) == 8
    assert target.ids[0] == 1
    assert trained(task, row) == [" great</s>"]
    assert task.truncated == 3
    assert len([m for m in caplog.messages if "max_length=8" in m]) == 1


def test_an_answer_longer_than_the_limit_loses_its_end(tiny_llama: Loaded) -> None:
    row = {"prompt": "question:", "completion": " great" * 20}
    task = make(max_length=8)
    task.prepare(tiny_llama)
    target = task.encode(row)
    assert len(target.ids) == 8
    assert trained(task, row) == [" great" * len(target.scored)]


def test_tokens_behind_the_last_answer_are_dropped() -> None:
    talk = [*TALK, {"role": "user", "content": "then a question"}]
    task = make([{"messages": talk}])
    task.prepare(chat())
    assert task.show_mask({"messages": talk}).endswith("⟦No<|im_end|>⟧")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "wanted the fields prompt and completion, or messages; found prompt"),
        ({"prompt": "a", "completion": " "}, "empty completion"),
        ({"prompt": "a", "completion": 3}, "completion must be text, got int"),
        ({"messages": []}, "non-empty list"),
        ({"messages": [{"content": "x"}]}, "message 1 has no role"),
        ({"messages": [{"role": "user"}]}, "message 1 has no 'content'; found role"),
        ({"messages": TALK[:2]}, "no message has the role 'assistant'"),
    ],
)
def test_bad_rows_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"line 1: .*{message}"):
        tasks.get("sft", data={"train": [row], "dev": ROWS})


def test_field_names_and_glued_words(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"ask": f"film {i}", "say": "great"} for i in range(4)]
    task = tasks.get("sft", data=rows, prompt_field="ask", completion_field="say", dev_size=1)
    assert "separator=' '" in caplog.text
    assert {"prompt", "completion"} == set(task.split("train")[0])


def test_a_template_that_refuses_says_so() -> None:
    task = make([{"messages": TALK}])
    task.prepare(chat("{{ raise_exception('no system role') }}"))
    with pytest.raises(DataError, match=r"refuses the messages .*no system role.*roles: system"):
        task.encode({"messages": TALK})
