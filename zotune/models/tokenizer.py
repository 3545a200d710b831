"""Loading a checkpoint's tokenizer."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any, Final

from zotune.errors import BadInput, FormatError

log = logging.getLogger("zotune")
_TOKENIZER_FILES: Final = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json",
    "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer with a padding token, or None where it has no tokenizer files.

    A tokenizer without a padding token pads with its end-of-text token, and a log line says so.

    Raises:
        FormatError: if the files are there but damaged.
    """
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        _say_once(f"{folder} has no tokenizer files; the model is loaded without a tokenizer")
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # tokenizer back ends raise bare Exception for damaged files
        raise FormatError(f"the tokenizer of {folder} cannot be loaded: {error}") from error
    return with_padding(tokenizer, folder)


def with_padding(tokenizer: Any, folder: Path) -> Any:
    """The tokenizer; without a padding token it pads with its end-of-text token from now on."""
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
        _say_once(f"{folder}: the tokenizer has no padding token; {tokenizer.eos_token!r} is used")
    return tokenizer


@cache
def _say_once(message: str) -> None:
    log.warning(message)


def pad_token_id(tokenizer: Any) -> int:
    """The id to pad with.

    Raises:
        BadInput: if the tokenizer has neither a padding nor an end-of-text token.
    """
    found = getattr(tokenizer, "pad_token_id", None)
    if found is None:
        raise BadInput(
            "the tokenizer has neither a padding nor an end-of-text token, and a batch of texts "
            "needs one; set tokenizer.pad_token or use batch_size=1"
        )
    return int(found)
