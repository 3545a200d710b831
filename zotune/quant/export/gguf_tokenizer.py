"""A fast tokenizer as GGUF metadata: SentencePiece's BPE ("llama") or byte-level BPE ("gpt2").

llama.cpp joins the pair with the highest score first, SentencePiece's way; a tokenizer.json has the
order of its merges instead, so a token's score is minus the place of the merge that makes it.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from zotune.errors import BadInput
from zotune.quant.formats.gguf_file import gguf_package

# How llama.cpp names the splitting before byte-level merges, by a part of its pattern.
SPLITS: Final = {
    r"\p{N}{1,3}": "llama-bpe",
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?": "qwen2",
}
_BYTE: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def add_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    """Words, scores or merges, special tokens and the chat template.

    Args:
        writer: gguf's.
        tokenizer: a fast transformers tokenizer, or None to write a model without one.
        size: rows of the embedding; words that the tokenizer lacks are filled up.

    Raises:
        BadInput: for a tokenizer that llama.cpp has no kind for.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    written = {} if backend is None else json.loads(backend.to_str())
    model = written.get("model", {})
    bytes_ = "ByteLevel" in json.dumps(written.get("pre_tokenizer"))
    if model.get("type") != "BPE" or not (model.get("byte_fallback") or bytes_):
        raise BadInput(
            f"a tokenizer of kind {model.get('type')!r} is not written as GGUF; BPE with bytes or "
            "byte fallback is: use format 'gptq' or 'compressed-tensors'"
        )
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    words = _words(written, size)
    if bytes_:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split(written))
        writer.add_token_merges([" ".join(pair) for pair in merges])
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        places = {"".join(pair): k for k, pair in reversed(list(enumerate(merges)))}
        writer.add_token_scores([-float(places.get(word, 0)) for word in words])
        writer.add_add_space_prefix(_adds_space(written))
    writer.add_token_list(words)
    writer.add_token_types(_kinds(written, words, model.get("unk_token") or tokenizer.unk_token))
    _add_special(writer, tokenizer)


def _words(written: dict[str, Any], size: int) -> list[str]:
    """By number, with names of our own where there is none."""
    known = {number: word for word, number in written["model"]["vocab"].items()}
    known |= {token["id"]: token["content"] for token in written["added_tokens"]}
    return [known.get(number, f"[PAD{number}]") for number in range(size)]


def _kinds(written: dict[str, Any], words: list[str], unknown: str | None) -> list[Any]:
    types = gguf_package().TokenType
    added = {token["content"]: token["special"] for token in written["added_tokens"]}
    own = written["model"]["vocab"]

    def kind(word: str) -> Any:
        if word == unknown:
            return types.UNKNOWN
        if word in added:
            return types.CONTROL if added[word] else types.USER_DEFINED
        if word not in own:
            return types.UNUSED
        return types.BYTE if _BYTE.fullmatch(word) else types.NORMAL

    return [kind(word) for word in words]


def _split(written: dict[str, Any]) -> str:
    """llama.cpp's name of the pattern that texts are cut by before merging."""
    patterns = [part.get("pattern", {}).get("Regex", "") for part in _steps(written)]
    for piece, name in SPLITS.items():
        if any(piece in pattern for pattern in patterns):
            return name
    if any(patterns):
        raise BadInput(
            f"llama.cpp's name for splitting by {patterns!r} is not known; use llama.cpp's "
            "convert_hf_to_gguf.py, or format 'gptq' or 'compressed-tensors'"
        )
    return "gpt-2"


def _steps(written: dict[str, Any]) -> list[dict[str, Any]]:
    before: dict[str, Any] = written.get("pre_tokenizer") or {}
    found: list[dict[str, Any]] = before.get("pretokenizers", [before])
    return found


def _adds_space(written: dict[str, Any]) -> bool:
    """Whether a text is read as if it began with a space."""
    text = json.dumps([written.get("normalizer"), written.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"always"' in text


def _add_special(writer: Any, tokenizer: Any) -> None:
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    start = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
    writer.add_add_bos_token(start == [tokenizer.bos_token_id])
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        writer.add_chat_template(template)
