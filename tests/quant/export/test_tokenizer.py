"""Tokenizers as GGUF metadata are read back by transformers with the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from zotune.errors import BadInput
from zotune.quant import Scheme, quantize_model_
from zotune.quant.export import export_, exporter
from zotune.quant.formats import formats

from .test_export import model

TEXTS = ["the cat sat on the mat and then the cat ran", "there was a red ball on the mat, 12 of"]
SPACE = "\u2581"


def byte_level(pattern: str | None = None) -> Any:
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern is not None:
        from tokenizers import Regex

        found.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    found.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=found, bos_token="<s>", eos_token="</s>")


def with_byte_fallback() -> Any:
    """As Llama 2's: spaces are letters, unknown letters fall back to bytes."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{k:02X}>" for k in range(256))]
    letters = [*sorted(set("".join(TEXTS)) - {" "}), SPACE]
    merges = [
        ("t", "h"),
        ("th", "e"),
        (SPACE, "the"),
        ("a", "t"),
        (SPACE, "m"),
        (SPACE + "m", "at"),
    ]
    vocabulary = {w: k for k, w in enumerate([*words, *letters, *("".join(m) for m in merges)])}
    found = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    found.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    found.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=found, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def through_gguf(tokenizer: Any, folder: Path) -> Any:
    found = model(vocab_size=300)
    quantize_model_(found, "int8-g32")
    export_(found, folder / "out", exporter("gguf", Scheme.parse("int8-g32")), tokenizer=tokenizer)
    return formats()["gguf"].tokenizer(folder / "out")  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", [byte_level, with_byte_fallback])
def test_texts_have_the_same_tokens(make: Any, tmp_path: Path) -> None:
    tokenizer = make()
    again = through_gguf(tokenizer, tmp_path)
    for text in [*TEXTS, "the mat", "a red cat on mats"]:
        own = tokenizer(text, add_special_tokens=False).input_ids
        assert again(text, add_special_tokens=False).input_ids == own
    assert again.eos_token_id == tokenizer.eos_token_id
    assert again.bos_token_id == tokenizer.bos_token_id


def test_tokenizers_that_llama_cpp_has_no_kind_for_are_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    with pytest.raises(BadInput, match="WordLevel"):
        through_gguf(PreTrainedTokenizerFast(tokenizer_object=words), tmp_path)
    with pytest.raises(BadInput, match=r"splitting by .*\\w"):
        through_gguf(byte_level(r"\w+x?"), tmp_path)
    assert not (tmp_path / "out").exists()
