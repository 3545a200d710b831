"""Rows of the well-known data sets: their file layouts, and one canonical row per task.

A reader turns a file into a Table; a `..._row` function turns a row of any layout (our local
files, the hub's, a user's) into the canonical fields of its task.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from zotune.errors import DataError
from zotune.tasks.data import Row, Table, lines_of, read_table, read_text, table

TREC_CODES = ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")
Lines = Callable[[str], Row]


def by_line(path: Path, encoding: str, parse: Lines) -> Table:
    """A text file with one row a line. Raises DataError naming a line that does not parse."""
    rows, numbers = [], []
    for number, line in lines_of(path, encoding):
        try:
            rows.append(parse(line))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        numbers.append(number)
    if not rows:
        raise DataError(f"{path} holds no rows; a data set needs at least one")
    return Table(rows, str(path), numbers)


def label_first(path: Path) -> Table:
    """`<label> text` lines (MR is latin-1, the SST files are utf-8)."""

    def parse(line: str) -> Row:
        label, found, text = line.partition(" ")
        if not found or not label.isdecimal():
            raise ValueError(f"wanted '<label> text', got {line[:40]!r}")
        return {"text": text.strip(), "label": label}

    return by_line(path, "latin-1" if path.name.startswith("rt-") else "utf-8", parse)


def trec_lines(path: Path) -> Table:
    """`COARSE:fine question` lines; a few are not ASCII."""

    def parse(line: str) -> Row:
        code, _, text = line.partition(" ")
        coarse = code.partition(":")[0]
        if coarse not in TREC_CODES:
            raise ValueError(f"unknown class {coarse!r}; wanted one of {', '.join(TREC_CODES)}")
        return {"text": text.strip(), "label": TREC_CODES.index(coarse)}

    return by_line(path, "utf-8", parse)


def nli_file(path: Path) -> Table:
    """JSON and JSON lines as they are; .txt has premise, hypothesis, label index, by tabs."""
    if path.suffix != ".txt":
        return read_table(path)

    def parse(line: str) -> Row:
        parts = line.split("\t")
        if len(parts) != 3:
            raise ValueError(f"wanted 3 columns separated by tabs, got {len(parts)}")
        return {"premise": parts[0], "hypothesis": parts[1], "label": parts[2].strip()}

    return by_line(path, "utf-8", parse)


def multirc_file(path: Path) -> Table:
    """One row per (paragraph, question, answer)."""
    rows, numbers = [], []
    source = read_table(path)
    for i, entry in enumerate(source):
        for question in entry["passage"]["questions"]:
            for answer in question["answers"]:
                rows.append(
                    {
                        "paragraph": entry["passage"]["text"],
                        "question": question["question"],
                        "answer": answer["text"],
                        "label": answer["label"],
                    }
                )
                numbers.append(source.lines[i])
    return Table(rows, str(path), numbers)


def squad_file(path: Path) -> Table:
    """SQuAD's own JSON: articles, paragraphs, questions."""
    import json

    try:
        content = json.loads(read_text(path))
        rows = [
            {
                "title": article.get("title", ""),
                "context": paragraph["context"],
                "question": item["question"],
                "answers": [answer["text"] for answer in item["answers"]],
                "article": f"{path.name} {number}",
            }
            for number, article in enumerate(content["data"])
            for paragraph in article["paragraphs"]
            for item in paragraph["qas"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not SQuAD JSON ({type(error).__name__}: {error})") from error
    return table(rows, str(path))


def wikitext_articles(path: Path) -> Table:
    """One row per article; a heading ` = Title = ` begins one, ` = = Part = = ` does not."""
    lines = read_text(path).split("\n")
    heads = [
        i
        for i, line in enumerate(lines)
        if line.startswith(" = ")
        and line.rstrip().endswith(" =")
        and not line.startswith(" = = ")
        and (i == 0 or not lines[i - 1].strip())
    ]
    if not heads:
        raise DataError(f"{path} has no article headings like ' = Title = '")
    ends = [*heads[1:], len(lines)]
    rows = [{"text": "\n".join(lines[a:b]).strip()} for a, b in zip(heads, ends, strict=True)]
    return Table(rows, str(path), [i + 1 for i in heads])


def first_of(row: Row, *names: str) -> Any:
    """The first of several fields that is there. Raises KeyError naming them."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise KeyError(f"none of the fields {', '.join(names)}")


def text_row(row: Row) -> Row:
    """text (SST: sentence) and label."""
    return {"text": first_of(row, "text", "sentence"), "label": first_of(row, "label")}


def trec_row(row: Row) -> Row:
    """text and the coarse label."""
    return {"text": first_of(row, "text"), "label": first_of(row, "coarse_label", "label")}


def nli_row(row: Row) -> Row:
    """premise, hypothesis and label, under any of their usual names."""
    return {
        "premise": first_of(row, "premise", "sentence1", "text_a"),
        "hypothesis": first_of(row, "hypothesis", "sentence2", "text_b"),
        "label": first_of(row, "gold_label", "label"),
    }


def news_row(row: Row) -> Row:
    """AG News: title and description as one text; its own file counts classes from 1."""
    if "Class Index" in row:
        text = f"{row['Title']}. {row['Description']}"
        return {"text": text.replace("\\", " "), "label": int(row["Class Index"]) - 1}
    return text_row(row)


def boolq_row(row: Row) -> Row:
    """passage and a question that begins with a capital and ends in a question mark."""
    question = str(first_of(row, "question")).strip().rstrip("?")
    return {
        "passage": first_of(row, "passage"),
        "question": question[:1].upper() + question[1:] + "?",
        "label": first_of(row, "label"),
    }


def wic_row(row: Row) -> Row:
    """word and two sentences; `first` names the word for encoders."""
    word, one, two = (str(first_of(row, name)) for name in ("word", "sentence1", "sentence2"))
    return {
        "word": word,
        "sentence1": one,
        "sentence2": two,
        "first": f"{word}: {one}",
        "label": first_of(row, "label"),
    }


def wsc_row(row: Row) -> Row:
    """text, noun and pronoun; `claim` says for encoders what is to be judged."""
    spans = row.get("target", row)
    noun, pronoun = first_of(spans, "span1_text"), first_of(spans, "span2_text")
    return {
        "text": first_of(row, "text"),
        "noun": noun,
        "pronoun": pronoun,
        "claim": f'"{pronoun}" refers to {noun}.',
        "label": first_of(row, "label"),
    }


def multirc_row(row: Row) -> Row:
    """paragraph, question, answer; `claim` is question and answer for encoders."""
    question, answer = first_of(row, "question"), first_of(row, "answer")
    return {
        "paragraph": first_of(row, "paragraph"),
        "question": question,
        "answer": answer,
        "claim": f"{question} {answer}",
        "label": first_of(row, "label"),
    }


def copa_row(row: Row) -> Row:
    """Premise and question become the prompt; choices continue it in lower case."""
    link = {"cause": "because", "effect": "so"}[first_of(row, "question")]
    choices = [str(first_of(row, name)) for name in ("choice1", "choice2")]
    return {
        "prompt": f"{str(first_of(row, 'premise')).strip().rstrip('.')} {link}",
        "choices": [choice[:1].lower() + choice[1:] for choice in choices],
        "label": int(first_of(row, "label")),
    }


def squad_row(row: Row) -> Row:
    """title, context, question, answers as texts, and the article that a split keeps whole."""
    answers = first_of(row, "answers")
    texts = answers["text"] if isinstance(answers, dict) else answers
    return {
        "title": row.get("title") or "",
        "context": first_of(row, "context"),
        "question": str(first_of(row, "question")).strip(),
        "answers": list(texts),
        "article": row.get("article") or row.get("title") or first_of(row, "context"),
    }


def article_row(row: Row) -> Row:
    """The text as it is."""
    return {"text": first_of(row, "text")}


def story_row(row: Row) -> Row:
    """Runs of spaces become one: sentencepiece does so by itself, its fast twins do not."""
    return {"text": " ".join(str(first_of(row, "text")).split())}
