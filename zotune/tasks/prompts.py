"""Prompts, label words and label texts of the named classification tasks.

Prompts follow MeZO's tables (arXiv 2305.17333, appendix E) where it has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """How a classification task is shown to a model.

    `words` stand behind `template` for causal models; `texts` start an encoder's head, which
    reads the fields `inputs`.
    """

    labels: Sequence[str]
    template: str
    words: Sequence[str]
    texts: Sequence[str]
    inputs: Sequence[str]
    metric: str = "accuracy"


_POLAR = ("terrible", "great")
_YES = ("No", "Yes")
_NLI = ("entailment", "neutral", "contradiction")
_NLI_TEXTS = ("yes, that is true", "maybe", "no, that is false")
_INFER = 'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n'
_PAIR = ("premise", "hypothesis")
_REVIEW = "{text} It was"

PROMPTS: dict[str, Prompt] = {
    "sst2": Prompt(("negative", "positive"), _REVIEW, _POLAR, _POLAR, ("text",)),
    "mr": Prompt(("negative", "positive"), _REVIEW, _POLAR, _POLAR, ("text",)),
    "sst5": Prompt(
        ("very negative", "negative", "neutral", "positive", "very positive"),
        _REVIEW,
        ("terrible", "bad", "okay", "good", "great"),
        ("terrible", "bad", "okay", "good", "great"),
        ("text",),
    ),
    "trec": Prompt(
        ("abbreviation", "entity", "description", "person", "location", "number"),
        "{text}\nThe answer is a kind of",
        ("expression", "entity", "description", "human", "location", "number"),
        ("abbreviation", "entity", "description", "person", "location", "number"),
        ("text",),
    ),
    "ag_news": Prompt(
        ("world", "sports", "business", "technology"),
        "{text}\nThis news is about",
        ("world", "sports", "business", "technology"),
        ("world politics", "sports", "business", "science and technology"),
        ("text",),
    ),
    "rte": Prompt(
        ("entailment", "not_entailment"),
        '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
        ("Yes", "No"),
        ("yes, that is true", "no, that is false"),
        _PAIR,
    ),
    "cb": Prompt(
        ("entailment", "contradiction", "neutral"),
        _INFER,
        ("Yes", "No", "Maybe"),
        (_NLI_TEXTS[0], _NLI_TEXTS[2], _NLI_TEXTS[1]),
        _PAIR,
    ),
    "snli": Prompt(_NLI, _INFER, ("Yes", "Maybe", "No"), _NLI_TEXTS, _PAIR),
    "mnli": Prompt(_NLI, _INFER, ("Yes", "Maybe", "No"), _NLI_TEXTS, _PAIR),
    "boolq": Prompt(("no", "yes"), "{passage} {question}\n", _YES, _YES, ("question", "passage")),
    "wic": Prompt(
        ("no", "yes"),
        'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
        "{sentence1}\n{sentence2}\n",
        _YES,
        ("different meaning", "same meaning"),
        ("first", "sentence2"),
    ),
    "wsc": Prompt(
        ("no", "yes"),
        '{text}\nIn the previous sentence, does the pronoun "{pronoun}" refer to {noun}? '
        "Yes or No?\n",
        _YES,
        ("no, that is false", "yes, that is true"),
        ("text", "claim"),
    ),
    "multirc": Prompt(
        ("no", "yes"),
        '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? '
        "Yes or No?\n",
        _YES,
        ("wrong answer", "right answer"),
        ("claim", "paragraph"),
        metric="f1",
    ),
}
