"""Reading rows from files, folders and the hub, with errors that name the file and the line."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

from zotune.errors import DataError

Row = dict[str, Any]
SPLIT_STEMS = {
    "train": ("train",),
    "dev": ("dev", "validation", "valid", "val"),
    "test": ("test",),
}


@dataclass(frozen=True, eq=False)
class Table(Sequence[Row]):
    """Rows and where each stood: `source` for the file, `lines` for its 1-based line numbers."""

    rows: Sequence[Row]
    source: str
    lines: Sequence[int]

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """Where row `index` stands, for messages."""
        return f"{self.source}, line {self.lines[index]}"

    def take(self, indices: Sequence[int]) -> Table:
        """The rows at `indices`, still knowing their lines."""
        rows = [self.rows[i] for i in indices]
        return Table(rows, self.source, [self.lines[i] for i in indices])

    def map(self, change: Callable[[Row], Row]) -> Table:
        """Each row changed; a failing row is named."""
        changed = []
        for i, row in enumerate(self.rows):
            try:
                changed.append(change(row))
            except (KeyError, IndexError, TypeError, ValueError) as error:
                if isinstance(error, DataError):
                    raise DataError(f"{self.where(i)}: {error}") from error
                found = ", ".join(map(str, row)) if isinstance(row, Mapping) else repr(row)
                raise DataError(
                    f"{self.where(i)}: cannot read the row ({type(error).__name__}: {error}); "
                    f"it has the fields {found}"
                ) from error
        return Table(changed, self.source, self.lines)


def table(rows: Sequence[Row], source: str = "rows given in memory") -> Table:
    """Rows in memory as a Table; they are numbered from 1."""
    return Table(list(rows), source, range(1, len(rows) + 1))


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """A text file's content, BOM dropped. Raises DataError naming the byte that does not decode."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        text = raw.decode(encoding)
    except LookupError as error:
        raise DataError(f"unknown encoding {encoding!r} for {path}; try 'utf-8'") from error
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line}: byte {error.start} is not valid {encoding}; "
            "say the file's real encoding, for instance encoding='latin-1'"
        ) from error
    return text.removeprefix("\ufeff")


def read_table(path: Path, encoding: str = "utf-8", columns: Sequence[str] = ()) -> Table:
    """Rows of one file, read by its ending.

    .jsonl (an object a line), .json (a list, or an object of objects), .csv, .tsv (tabs, no
    quoting), .parquet, .txt (each non-empty line is {"text": line}).

    Args:
        columns: names for the columns of a .csv or .tsv that has no header line.

    Raises:
        DataError: missing file, unknown ending, wrong encoding, malformed line, or no rows.
    """
    if path.suffix not in READERS:
        known = ", ".join(READERS)
        raise DataError(f"cannot read {path}: unknown ending {path.suffix!r}; known: {known}")
    if not path.is_file():
        raise DataError(f"no such file: {path}")
    pairs = list(READERS[path.suffix](path, encoding, tuple(columns)))
    if not pairs:
        raise DataError(f"{path} holds no rows; a data set needs at least one")
    return Table([row for _, row in pairs], str(path), [line for line, _ in pairs])


def lines_of(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """(line number, line) of the non-blank lines; only newlines separate lines."""
    for number, line in enumerate(read_text(path, encoding).split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def _jsonl(path: Path, encoding: str, columns: tuple[str, ...]) -> Iterator[tuple[int, Row]]:
    for number, line in lines_of(path, encoding):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno}); "
                "a .jsonl file has one JSON object a line"
            ) from error
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise DataError(f"{path}, line {number}: wanted a JSON object, got a {kind}")
        yield number, row


def _json(path: Path, encoding: str, columns: tuple[str, ...]) -> Iterator[tuple[int, Row]]:
    try:
        content = json.loads(read_text(path, encoding))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    rows = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: wanted a JSON list of objects, or an object of objects")
    yield from enumerate(rows, start=1)


def _delimited(delimiter: str, quoting: Literal[0, 3]) -> Callable[..., Iterator[tuple[int, Row]]]:
    def read(path: Path, encoding: str, columns: tuple[str, ...]) -> Iterator[tuple[int, Row]]:
        stream = io.StringIO(read_text(path, encoding), newline="")
        reader = csv.reader(stream, delimiter=delimiter, quoting=quoting, strict=quoting == 0)
        try:
            header = list(columns) or next(reader, [])
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(cells)} columns, the header has "
                        f"{len(header)} ({', '.join(header)}); is it a .tsv, or headerless?"
                    )
                yield reader.line_num, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: malformed ({error})") from error

    return read


def _parquet(path: Path, encoding: str, columns: tuple[str, ...]) -> Iterator[tuple[int, Row]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow; pip install pyarrow") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a readable parquet file ({error})") from error
    yield from enumerate(rows, start=1)


def _txt(path: Path, encoding: str, columns: tuple[str, ...]) -> Iterator[tuple[int, Row]]:
    for number, line in lines_of(path, encoding):
        yield number, {"text": line}


READERS: dict[str, Callable[..., Iterator[tuple[int, Row]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _delimited(",", csv.QUOTE_MINIMAL),
    ".tsv": _delimited("\t", csv.QUOTE_NONE),
    ".parquet": _parquet,
    ".txt": _txt,
}


def fingerprint(value: Any, salt: str = "") -> bytes:
    """A stable 8-byte hash of a row: equal rows hash alike, in any process and any order.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(f"{salt}\x00{text}".encode("utf-8", "replace"), digest_size=8).digest()


def hold_out(
    rows: Table, count: int, salt: str, group: Callable[[Row], Any] | None = None
) -> tuple[Table, Table]:
    """Split into (kept, held): the rows with the smallest hashes are held out, about `count`.

    No random state: the same rows give the same split in any order. Rows that are equal (or of one
    `group`) stay together, so no copy of a held-out row remains in the kept part.

    Raises:
        DataError: nothing would be left on one of the two sides.
    """
    hashes = [fingerprint(group(row) if group else row, salt) for row in rows]
    order = sorted(range(len(hashes)), key=lambda i: hashes[i])
    end = min(max(count, 0), len(order))
    while 0 < end < len(order) and hashes[order[end]] == hashes[order[end - 1]]:
        end += 1
    if not 0 < end < len(order):
        raise DataError(
            f"cannot hold out {count} of the {len(rows)} rows of {rows.source}; "
            "give a smaller size, or a file for that split"
        )
    return rows.take(sorted(order[end:])), rows.take(sorted(order[:end]))


def sample(rows: Table, count: int | None, salt: str) -> Table:
    """At most `count` rows, chosen by hash, in their order in the file; all when None."""
    if count is None or count >= len(rows):
        return rows
    if count < 1:
        raise DataError(f"cannot take {count} rows of {rows.source}; ask for at least 1")
    order = sorted(range(len(rows)), key=lambda i: (fingerprint(rows[i], salt), i))
    return rows.take(sorted(order[:count]))
