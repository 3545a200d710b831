"""Label values, label words and splits: from what files and users write to checked values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zotune.errors import BadInput, DataError
from zotune.tasks.data import Row, Table
from zotune.tasks.task import Example

Words = str | Sequence[str] | Mapping[str, str] | None


def label_index(value: Any, labels: Sequence[str]) -> int:
    """The index of a label written as its name, as an index, or as a truth value.

    >>> polar = ["negative", "positive"]
    >>> label_index("positive", polar), label_index("1", polar)
    (1, 1)
    """
    name = str(value).strip()
    for form in (name, name.lower(), str(int(value)) if isinstance(value, bool) else name):
        if form in labels:
            return labels.index(form)
    whole = isinstance(value, float) and value.is_integer()
    number = str(int(value)) if isinstance(value, bool) or whole else name
    if number.isdecimal() and int(number) < len(labels):
        return int(number)
    raise DataError(f"unknown label {value!r}; the labels are {', '.join(labels)}")


def find_labels(rows: Table, field: str) -> list[str]:
    """The distinct labels of a table: numbers in order of size, names in alphabetical order."""
    found = set()
    for i, row in enumerate(rows):
        if row.get(field) is None:
            raise DataError(missing_field(rows, i, field, (field,)))
        found.add(str(row[field]).strip())
    if len(found) > 100:
        raise DataError(
            f"{rows.source}: field {field!r} has {len(found)} different values; "
            "is it the label? name the labels with labels="
        )
    if len(found) < 2:
        raise DataError(f"{rows.source}: all rows have the same label {found}; need at least two")
    numeric = all(name.lstrip("-").isdecimal() for name in found)
    return sorted(found, key=int) if numeric else sorted(found)


def missing_field(rows: Table, index: int, field: str, wanted: Sequence[str]) -> str:
    """The message for a row without a field."""
    found = ", ".join(map(str, rows[index])) or "none"
    return f"{rows.where(index)}: no field {field!r}; found {found}; wanted {', '.join(wanted)}"


def labelled(rows: Table, fields: Sequence[str], field: str, labels: Sequence[str]) -> Table:
    """Check every row and replace its label by the index under "label".

    Raises:
        DataError: naming the row, when a field is missing or the label is unknown.
    """
    wanted = (*fields, field)

    def change(row: Row) -> Example:
        for name in wanted:
            if row.get(name) is None:
                found = ", ".join(map(str, row)) or "none"
                raise DataError(f"no field {name!r}; found {found}; wanted {', '.join(wanted)}")
        return {**row, "label": label_index(row[field], labels)}

    return rows.map(change)


def parse_list(text: str | Sequence[str]) -> list[str]:
    """A list, or the parts of a comma-separated string, stripped.

    >>> parse_list("no, yes")
    ['no', 'yes']
    """
    parts = text.split(",") if isinstance(text, str) else [str(part) for part in text]
    return [part.strip() for part in parts]


def parse_words(words: Words, labels: Sequence[str]) -> list[str]:
    """One word per label, from a list in label order, a mapping, or "neg=bad,pos=good".

    None takes the label names themselves, underscores as spaces.

    Raises:
        BadInput: a label without a word, an unknown label, or two labels with one word.

    >>> parse_words("neg=terrible, pos=great", ["neg", "pos"])
    ['terrible', 'great']
    """
    if words is None:
        chosen = [label.replace("_", " ") for label in labels]
    elif isinstance(words, str) and "=" in words:
        pairs = [part.partition("=") for part in words.split(",")]
        return parse_words({a.strip(): b.strip() for a, _, b in pairs}, labels)
    elif isinstance(words, Mapping):
        given = {str(name): word for name, word in words.items()}
        wrong = sorted(set(given) ^ set(labels))
        if wrong:
            state = "unknown label" if wrong[0] in given else "no word for label"
            raise BadInput(f"label words: {state} {wrong[0]!r}; the labels are {', '.join(labels)}")
        chosen = [given[label].strip() for label in labels]
    else:
        chosen = parse_list(words)
    if len(chosen) != len(labels):
        raise BadInput(f"{len(chosen)} label words for {len(labels)} labels: {', '.join(labels)}")
    if len(set(chosen)) < len(chosen) or not all(chosen):
        raise BadInput(f"label words must differ and not be empty, got {', '.join(chosen)}")
    return chosen


def pick_split(splits: Mapping[str, Sequence[Example]], name: str) -> Sequence[Example]:
    """One split. Raises DataError naming those there are."""
    if name not in splits:
        raise DataError(f"there is no {name!r} split; this task has {', '.join(splits)}")
    return splits[name]
