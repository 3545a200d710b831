"""Metrics over predictions, in float64; SQuAD's as in the official script."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def accuracy(predicted: Sequence[int], wanted: Sequence[int]) -> float:
    """Share of equal entries.

    >>> accuracy([0, 1, 1, 2], [0, 1, 2, 2])
    0.75
    """
    return sum(p == w for p, w in zip(predicted, wanted, strict=True)) / len(wanted)


def f1_of(label: int, predicted: Sequence[int], wanted: Sequence[int]) -> float:
    """F1 = 2 tp / (2 tp + fp + fn) of one class; 0 when the class occurs nowhere.

    >>> f1_of(1, [1, 1, 0], [1, 0, 1])
    0.5
    """
    hits = sum(p == label and w == label for p, w in zip(predicted, wanted, strict=True))
    total = sum(p == label for p in predicted) + sum(w == label for w in wanted)
    return 2 * hits / total if total else 0.0


def macro_f1(predicted: Sequence[int], wanted: Sequence[int]) -> float:
    """Mean F1 over the classes that occur in either list (scikit-learn's f1_score, macro).

    >>> round(macro_f1([0, 1, 1], [0, 1, 0]), 4)
    0.6667
    """
    labels = sorted(set(predicted) | set(wanted))
    return sum(f1_of(label, predicted, wanted) for label in labels) / len(labels)


def squad_normal(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces.

    >>> squad_normal("The  cat's, hat!")
    'cats hat'
    """
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", text).split())


def squad_f1(answer: str, golds: Sequence[str]) -> float:
    """Best token-overlap F1 against any gold answer.

    >>> round(squad_f1("in Paris, France", ["Paris", "Paris France"]), 4)
    0.8
    """
    return max(_overlap_f1(squad_normal(answer), squad_normal(gold)) for gold in golds)


def squad_exact(answer: str, golds: Sequence[str]) -> float:
    """1.0 when the normalised answer equals any normalised gold answer.

    >>> squad_exact("the Paris", ["Lyon", "paris."])
    1.0
    """
    return float(any(squad_normal(answer) == squad_normal(gold) for gold in golds))


def _overlap_f1(answer: str, gold: str) -> float:
    ours, theirs = answer.split(), gold.split()
    shared = sum((Counter(ours) & Counter(theirs)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(ours), shared / len(theirs)
    return 2 * precision * recall / (precision + recall)
