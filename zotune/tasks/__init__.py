"""Tasks: examples, prompts, losses and metrics.

>>> from zotune import tasks
>>> "trec" in tasks.names()
True
>>> tasks.get("trek")
Traceback (most recent call last):
    ...
zotune.errors.BadInput: unknown task 'trek', did you mean 'trec'?; known: ag_news, ...
"""

from __future__ import annotations

from zotune.tasks import choice as _choice
from zotune.tasks import classification as _classification
from zotune.tasks import lm as _lm
from zotune.tasks import named as _named
from zotune.tasks import picture_sets as _picture_sets
from zotune.tasks import qa as _qa
from zotune.tasks import sft as _sft
from zotune.tasks.batch import Batch, pad_stack
from zotune.tasks.choice import Choice
from zotune.tasks.classification import Classification
from zotune.tasks.function import FunctionTask
from zotune.tasks.lm import LanguageModel
from zotune.tasks.qa import QuestionAnswering
from zotune.tasks.sft import SFT
from zotune.tasks.task import Entry, Example, Task, batch_loss, entry, get, names, register
from zotune.tasks.vision import ImageClassification

register("classification", _classification.classification, "your own rows (text, label)")
register("choice", _choice.choice, "choose among a row's own answers (prompt, choices, label)")
register("qa", _qa.qa, "answer questions about contexts (context, question, answers), metric F1")
register("lm", _lm.lm, "language modelling of plain text, metric perplexity")
register("sft", _sft.sft, "prompt and completion, or messages; loss on the answers only")
_named.register_all()
_picture_sets.register_all()

__all__ = [
    "SFT",
    "Batch",
    "Choice",
    "Classification",
    "Entry",
    "Example",
    "FunctionTask",
    "ImageClassification",
    "LanguageModel",
    "QuestionAnswering",
    "Task",
    "batch_loss",
    "entry",
    "get",
    "names",
    "pad_stack",
    "register",
]
