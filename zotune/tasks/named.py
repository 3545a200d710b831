"""The named tasks: a prompt from `prompts`, rows from `catalogue`, a few options."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib import resources

from zotune.errors import BadInput
from zotune.tasks.catalogue import SOURCES
from zotune.tasks.choice import Choice, check_choices
from zotune.tasks.classification import Classification
from zotune.tasks.data import Row
from zotune.tasks.encoding import Bos, Template
from zotune.tasks.labels import Words, find_labels, label_index, labelled, parse_list
from zotune.tasks.lm import LanguageModel
from zotune.tasks.prompts import PROMPTS
from zotune.tasks.qa import TEMPLATE, QuestionAnswering, check_answers
from zotune.tasks.sources import Data, Sizes, load
from zotune.tasks.task import register


def _named_classification(
    task: str,
    data: Data | None = None,
    template: str | None = None,
    label_words: Words = None,
    labels: str | Sequence[str] | None = None,
    label_texts: str | Sequence[str | Sequence[str]] | None = None,
    max_length: int | None = None,
    objective: str = "loss",
    metric: str | None = None,
    reduce: str = "sum",
    bos: Bos = "auto",
    encoding: str = "utf-8",
    columns: str | Sequence[str] = (),
    train_size: int | None = None,
    dev_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
) -> Classification:
    """A named classification task.

    Args:
        data: a file, folder or hub name; ZOTUNE_DATA's files or the task's own hub name when None.
        labels: what the label numbers 0, 1, ... of the *data* mean, by our label names; for data
            numbered otherwise than the task.
    """
    prompt = PROMPTS[task]
    sizes = Sizes(train_size, dev_size, test_size, seed)
    tables = SOURCES[task].tables(task, data, encoding, sizes, columns)
    order = list(prompt.labels) if labels is None else parse_list(labels)
    if sorted(order) != sorted(prompt.labels):
        raise BadInput(f"labels of {task!r} are {', '.join(prompt.labels)}; got {', '.join(order)}")

    def relabel(row: Row) -> Row:
        return {**row, "label": prompt.labels.index(order[label_index(row["label"], order)])}

    return Classification(
        {split: rows.map(relabel) for split, rows in tables.items()},
        prompt.labels,
        template or prompt.template,
        prompt.words if label_words is None else label_words,
        prompt.texts if label_texts is None else label_texts,
        prompt.inputs,
        name=task,
        reduce=reduce,
        objective=objective,
        metric=metric or prompt.metric,
        max_length=max_length,
        bos=bos,
    )


def copa(
    data: Data | None = None,
    max_length: int | None = None,
    objective: str = "loss",
    reduce: str = "sum",
    bos: Bos = "auto",
    encoding: str = "utf-8",
    train_size: int | None = None,
    dev_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
) -> Choice:
    """COPA: which of two sentences is the cause or the effect."""
    sizes = Sizes(train_size, dev_size, test_size, seed)
    tables = SOURCES["copa"].tables("copa", data, encoding, sizes)
    checked = {split: rows.map(check_choices) for split, rows in tables.items()}
    return Choice(
        checked, name="copa", reduce=reduce, objective=objective, max_length=max_length, bos=bos
    )


def squad(
    data: Data | None = None,
    template: str = TEMPLATE,
    objective: str = "loss",
    max_length: int | None = None,
    max_new_tokens: int = 50,
    bos: Bos = "auto",
    encoding: str = "utf-8",
    train_size: int | None = None,
    dev_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
) -> QuestionAnswering:
    """SQuAD v1.1: answer a question about a paragraph; dev and test are whole articles."""
    sizes = Sizes(train_size, dev_size, test_size, seed)
    tables = SOURCES["squad"].tables("squad", data, encoding, sizes)
    fields = Template(template).fields
    return QuestionAnswering(
        {k: rows.map(lambda row: check_answers(row, fields)) for k, rows in tables.items()},
        template,
        name="squad",
        objective=objective,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        bos=bos,
    )


def _named_text(
    task: str,
    data: Data | None = None,
    max_length: int | None = None,
    bos: Bos = "auto",
    pack: bool = False,
    overflow: str | None = None,
    encoding: str = "utf-8",
    train_size: int | None = None,
    dev_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
) -> LanguageModel:
    """A named text collection for language modelling; sizes count documents.

    tinystories keeps one window per story (overflow="drop") unless packed.
    """
    sizes = Sizes(train_size, dev_size, test_size, seed)
    tables = SOURCES[task].tables(task, data, encoding, sizes)
    if overflow is None:
        overflow = "drop" if task == "tinystories" and not pack else "window"
    return LanguageModel(
        tables, name=task, max_length=max_length, bos=bos, pack=pack, overflow=overflow
    )


def tickets(
    template: str = "{text}\nTeam:",
    label_words: Words = None,
    label_texts: str | Sequence[str | Sequence[str]] | None = None,
    max_length: int | None = None,
    objective: str = "loss",
    metric: str = "accuracy",
    reduce: str = "sum",
    bos: Bos = "auto",
    train_size: int | None = None,
    dev_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
) -> Classification:
    """Support tickets to teams with nicknames no model has seen; the rows ship with zotune."""
    folder = resources.files("zotune.tasks") / "tickets"
    with resources.as_file(folder) as path:
        tables = load(path)
    tables = Sizes(train_size, dev_size, test_size, seed).apply(tables)
    labels = find_labels(tables["train"], "label")
    return Classification(
        {split: labelled(rows, ("text",), "label", labels) for split, rows in tables.items()},
        labels,
        template,
        label_words,
        label_texts,
        name="tickets",
        reduce=reduce,
        objective=objective,
        metric=metric,
        max_length=max_length,
        bos=bos,
    )


SUMMARIES = {
    "sst2": "film review sentences, negative or positive",
    "mr": "film reviews (rt-polarity), negative or positive",
    "sst5": "film review sentences, five grades",
    "trec": "what a question asks for, six classes",
    "ag_news": "news topics, four classes",
    "rte": "does the premise entail the hypothesis, yes or no",
    "cb": "CommitmentBank: yes, no or maybe",
    "snli": "inference between captions: yes, maybe or no",
    "mnli": "inference across genres: yes, maybe or no",
    "boolq": "yes-or-no questions about a passage",
    "wic": "does a word mean the same in two sentences",
    "wsc": "does a pronoun refer to a noun (Winograd)",
    "multirc": "is an answer about a paragraph right; metric F1 over all answers",
}


def register_all() -> None:
    """Add every named task to the list."""
    for name in PROMPTS:
        register(name, partial(_named_classification, name), SUMMARIES[name])
    register("copa", copa, "cause or effect of two sentences, multiple choice")
    register("squad", squad, "SQuAD v1.1, generated answers, metric F1")
    register("wikitext2", partial(_named_text, "wikitext2"), "WikiText-2 articles, perplexity")
    register(
        "ptb",
        partial(_named_text, "ptb"),
        "Penn Treebank sentences (local folder only: valid to train on), perplexity",
    )
    register(
        "tinystories",
        partial(_named_text, "tinystories"),
        "1,000 TinyStories (local folder only), the first 200 for test, perplexity",
    )
    register("tickets", tickets, "support tickets to ten nicknamed teams (ships with zotune)")
