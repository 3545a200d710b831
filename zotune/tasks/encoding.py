"""Text to token ids for one tokenizer: BOS, answers behind prompts, truncation that is counted."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from string import Formatter
from typing import TYPE_CHECKING, Any

from zotune.errors import BadInput, DataError
from zotune.tasks.task import Example

if TYPE_CHECKING:
    from zotune.models import Loaded

log = logging.getLogger("zotune")
Bos = bool | str


class Template:
    """A prompt with {fields}; an optional {label} may stand at its very end.

    A label word is joined by one space, or by nothing when the prompt ends in a line break.

    >>> prompt = Template("{text} It was {label}")
    >>> prompt.fields, prompt.fill({"text": "Great fun."}), prompt.join
    (('text',), 'Great fun. It was', ' ')
    """

    def __init__(self, text: str) -> None:
        try:
            names = [name for _, name, _, _ in Formatter().parse(text) if name is not None]
        except ValueError as error:
            raise BadInput(
                f"template {text!r} is malformed: {error}; write {{{{ for a brace"
            ) from error
        body = text.rstrip(" ")
        if "label" in names:
            if not body.endswith("{label}") or names.count("label") > 1:
                raise BadInput(f"template {text!r}: {{label}} must be the last thing in it")
            body = body.removesuffix("{label}")
        if any(not name or not name.isidentifier() for name in names):
            raise BadInput(f"template {text!r}: write each field as {{name}}")
        self.text = text
        self.fields = tuple(dict.fromkeys(name for name in names if name != "label"))
        if not self.fields:
            raise BadInput(f"template {text!r} shows no field of the example; write e.g. {{text}}")
        self._body = body.rstrip(" ")
        self.join = "" if self._body.endswith("\n") else " "

    def __repr__(self) -> str:
        return f"Template({self.text!r})"

    def fill(self, example: Example) -> str:
        """The prompt for one example. Raises DataError naming the fields found and wanted."""
        require(example, self.fields)
        return self._body.format(**{name: str(example[name]).strip() for name in self.fields})


def require(example: Example, fields: Sequence[str]) -> None:
    """Raise DataError unless every field is there and is not None."""
    missing = [name for name in fields if example.get(name) is None]
    if missing:
        raise DataError(
            f"no field {missing[0]!r}; found {', '.join(map(str, example)) or 'none'}; "
            f"wanted {', '.join(fields)}"
        )


def length_limit(loaded: Loaded, asked: int | None) -> int:
    """The longest sequence: what the user asked for, checked against model and tokenizer.

    Raises:
        BadInput: no tokenizer, or `asked` is longer than the model's positions or shorter than 2.
    """
    config, tokenizer = loaded.config, loaded.tokenizer
    if tokenizer is None:
        raise BadInput(
            f"{loaded.path} has no tokenizer, and text tasks need one; put its files in the folder"
        )
    limits = []
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        # RoBERTa numbers positions from padding_idx + 1 = 2
        limits.append(
            positions - 2 if "roberta" in getattr(config, "model_type", "") else positions
        )
    declared = getattr(tokenizer, "model_max_length", None)
    if isinstance(declared, int) and 0 < declared < 10**6:
        limits.append(declared)
    own = min(limits) if limits else None
    if asked is None:
        return own if own is not None else 2048
    if asked < 2:
        raise BadInput(f"max_length={asked} leaves no room for text; use at least 2")
    if own is not None and asked > own:
        raise BadInput(f"max_length={asked} is more than the model's own limit {own}; lower it")
    return asked


class TextEncoder:
    """Token ids for a causal model: `bos` in front, prompts cut on the left when too long.

    Args:
        tokenizer: a Hugging Face tokenizer.
        limit: longest sequence in tokens.
        bos: True or False, or "auto": prepend the BOS token where the tokenizer has one that is
            not also its EOS (Llama style) and does not add it by itself.

    Raises:
        BadInput: `bos` is True but the tokenizer has no BOS token.
    """

    def __init__(self, tokenizer: Any, limit: int, bos: Bos = "auto") -> None:
        self.tokenizer = tokenizer
        self.limit = limit
        self.truncated = 0
        self.eos: int | None = tokenizer.eos_token_id
        self.pad: int = next((i for i in (tokenizer.pad_token_id, self.eos) if i is not None), 0)
        self.bos = self._resolve_bos(bos)

    def _resolve_bos(self, bos: Bos) -> int | None:
        own = self.tokenizer.bos_token_id
        bos = {"true": True, "false": False}.get(str(bos).lower(), bos)
        if bos not in (True, False, "auto"):
            raise BadInput(f"bos={bos!r} is not known; use 'auto', true or false")
        if bos is True and own is None:
            raise BadInput("bos=true, but the tokenizer has no BOS token; use bos=false")
        if bos == "auto":
            adds = own is not None and own in self.raw("a", special=True)
            return own if own is not None and (adds or own != self.eos) else None
        return own if bos else None

    def raw(self, text: str, special: bool = False) -> list[int]:
        """The tokenizer's ids, without its "too long" warning (we count and say it ourselves)."""
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    @property
    def head(self) -> list[int]:
        """What stands before every sequence: the BOS id, or nothing."""
        return [] if self.bos is None else [self.bos]

    def pair(self, prompt: str, answer: str, join: str = "") -> tuple[list[int], list[int]]:
        """`pairs` for one answer."""
        return self.pairs(prompt, [answer], join)[0]

    def pairs(
        self, prompt: str, answers: Sequence[str], join: str = ""
    ) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, answer ids) of prompt + join + answer, each tokenized as one text.

        An answer begins where the ids of the whole leave the ids of the prompt alone, so merges
        across the border belong to the answer.

        Raises:
            DataError: an answer adds no token.
        """
        texts = [prompt, *(prompt + join + answer for answer in answers)]
        alone, *wholes = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        found = []
        for answer, whole in zip(answers, wholes, strict=True):
            cut = 0
            while cut < min(len(alone), len(whole)) and alone[cut] == whole[cut]:
                cut += 1
            if cut == len(whole):
                raise DataError(f"the answer {answer!r} adds no token behind the prompt")
            found.append((self.head + whole[:cut], whole[cut:]))
        return found

    def fit(self, prompt: list[int], answer: list[int]) -> list[int]:
        """The prompt ids that leave room for the answer, cut on the left, BOS kept.

        Raises:
            DataError: the answer alone is longer than the limit.
        """
        room = self.limit - len(answer)
        if len(prompt) <= room:
            return prompt
        keep = self.head if prompt[: len(self.head)] == self.head else []
        if room - len(keep) < 1:
            raise DataError(
                f"an answer of {len(answer)} tokens leaves no room for its prompt in "
                f"max_length={self.limit}; raise max_length or shorten the answer"
            )
        self.count_truncated(len(prompt) + len(answer), "on the left of the prompt")
        return keep + prompt[len(prompt) - (room - len(keep)) :]

    def count_truncated(self, length: int, where: str) -> None:
        """Count one truncated sequence; the first one is said."""
        if self.truncated == 0:
            log.warning(
                "a sequence of %d tokens is longer than max_length=%d and is cut %s; further ones "
                "are counted, not said",
                length,
                self.limit,
                where,
            )
        self.truncated += 1
