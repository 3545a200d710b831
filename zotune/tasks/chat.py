"""Which characters of a rendered conversation the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from zotune.errors import BadInput, DataError

Message = dict[str, Any]
Span = tuple[int, int]
Render = Callable[[Sequence[Message], bool], str]
_MARKS_ITSELF = re.compile(r"\{%-?\s*generation\b")


def renderer(tokenizer: Any) -> Render:
    """render(messages, add_generation_prompt) by the tokenizer's own chat template.

    Raises:
        BadInput: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise BadInput(
            "the data has 'messages' but the tokenizer has no chat template; set "
            "tokenizer.chat_template, or give 'prompt' and 'completion' instead"
        )

    def render(messages: Sequence[Message], prompt: bool) -> str:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt
        )
        return str(text)

    return render


def check_messages(messages: Any) -> list[Message]:
    """Messages with role and content, at least one by the assistant.

    Raises:
        DataError: what is missing.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"messages must be a non-empty list, got {messages!r}")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"message {number} has no role: {message!r}")
        if "content" not in message:
            found = ", ".join(message)
            raise DataError(f"message {number} has no 'content'; found {found}")
    if all(message["role"] != "assistant" for message in messages):
        raise DataError("no message has the role 'assistant', so nothing would be trained")
    return [dict(message) for message in messages]


def assistant_spans(render: Render, messages: Sequence[Message]) -> tuple[str, list[Span]]:
    """The whole rendered text, and the (start, end) of each assistant turn in it.

    A turn begins where the rendering of the messages before it, with the generation prompt, ends,
    and lasts to the end of the rendering that includes it: end-of-turn token in, line break after
    it out. Templates that rewrite earlier turns (dropping old reasoning, say) break that prefix;
    then the turn is found by its content.

    Raises:
        DataError: the template refuses the messages, or a turn cannot be found.
    """
    text = _render(render, messages, False)
    spans: list[Span] = []
    cursor = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        content = _content(message)
        start = _start(render, messages, i, text, cursor, content)
        end = _end(render, messages, i, text, start, content)
        end = start + len(text[start:end].rstrip())
        if end <= start:
            raise DataError(f"message {i + 1} (assistant) is empty; nothing to train on")
        spans.append((start, end))
        cursor = end
    return text, spans


def _render(render: Render, messages: Sequence[Message], prompt: bool) -> str:
    try:
        return render(messages, prompt)
    except Exception as error:  # jinja errors, and whatever a template raises on purpose
        raise DataError(
            f"the chat template refuses the messages ({error}); roles: "
            f"{', '.join(message['role'] for message in messages)}"
        ) from error


def _start(
    render: Render, messages: Sequence[Message], i: int, text: str, cursor: int, content: str
) -> int:
    try:
        prefix = render(messages[:i], True)
    except Exception:  # a template may refuse an empty or partial conversation
        prefix = None
    if prefix is not None and text.startswith(prefix) and len(prefix) >= cursor:
        return len(prefix)
    return _find(text, content, cursor, i)


def _end(
    render: Render, messages: Sequence[Message], i: int, text: str, start: int, content: str
) -> int:
    upto = _render(render, messages[: i + 1], False)
    if text.startswith(upto):
        return len(upto)
    end = _find(text, content, start, i) + len(content)
    tail = upto[upto.rfind(content) + len(content) :]
    shared = 0
    while shared < len(tail) and text[end + shared : end + shared + 1] == tail[shared]:
        shared += 1
    return end + shared


def _find(text: str, content: str, cursor: int, i: int) -> int:
    found = text.find(content, cursor) if content else -1
    if found < 0:
        raise DataError(
            f"cannot find message {i + 1} (assistant) in what the chat template makes of it; use a "
            "template with {% generation %} marks, or 'prompt' and 'completion'"
        )
    return found


def _content(message: Message) -> str:
    content = message["content"]
    return content.strip() if isinstance(content, str) else ""


def chat_tokens(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """(token ids, which of them the assistant wrote) of a conversation.

    A template with {% generation %} marks tells by itself; else the spans of `assistant_spans`
    are mapped to tokens by their character offsets. A token on a border belongs to the turn.
    """
    render = renderer(tokenizer)
    if _MARKS_ITSELF.search(str(tokenizer.chat_template)):
        _render(render, messages, False)
        found = tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(found["input_ids"]), [bool(flag) for flag in found["assistant_masks"]]
    text, spans = assistant_spans(render, messages)
    if not tokenizer.is_fast:
        return _by_pieces(tokenizer, text, spans)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    flags = [any(_touches(offset, span) for span in spans) for offset in found["offset_mapping"]]
    return list(found["input_ids"]), flags


def _touches(offset: Span, span: Span) -> bool:
    lo, hi = offset
    return lo < span[1] and max(hi, lo + 1) > span[0]


def _by_pieces(tokenizer: Any, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
    """For tokenizers without offsets: each stretch tokenized alone."""
    ids: list[int] = []
    flags: list[bool] = []
    cursor = 0
    for start, end in [*spans, (len(text), len(text))]:
        for piece, flag in ((text[cursor:start], False), (text[start:end], True)):
            part = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            ids += part
            flags += [flag] * len(part)
        cursor = end
    return ids, flags
