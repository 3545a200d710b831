"""From what the user names (a file, a folder, a hub data set) to train, dev and test tables."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zotune.errors import BadInput, DataError
from zotune.tasks.data import (
    READERS,
    SPLIT_STEMS,
    Row,
    Table,
    fingerprint,
    hold_out,
    read_table,
    sample,
    table,
)

log = logging.getLogger("zotune")
Tables = dict[str, Table]
Data = str | Path | Mapping[str, Sequence[Row]] | Sequence[Row]


@dataclass(frozen=True)
class Sizes:
    """How many examples each split keeps (None: all), and how dev is made when there is none.

    Rows are chosen by a hash salted with `seed`, never by a global random state. A dev split that
    the source lacks is held out of train: `dev` rows, else a tenth of train and at most 500.
    """

    train: int | None = None
    dev: int | None = None
    test: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("train", "dev", "test"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"{name}_size={value} is not a number of rows; use 1 or more")

    def apply(self, tables: Tables, group: Callable[[Row], Any] | None = None) -> Tables:
        """Hold out a dev split if there is none, then cut every split to its size."""
        tables = dict(tables)
        if "dev" not in tables and "train" in tables:
            count = self.dev or max(1, min(500, len(tables["train"]) // 10))
            kept, held = hold_out(tables["train"], count, f"dev {self.seed}", group)
            tables["train"], tables["dev"] = kept, held
        cut = {
            name: sample(tables[name], getattr(self, name), f"{name} {self.seed}")
            for name in SPLIT_STEMS
            if name in tables
        }
        _say_overlap(cut)
        return cut


def _say_overlap(tables: Tables) -> None:
    """Rows that stand both in test and in train inflate the result: say so, change nothing."""
    if "train" not in tables or "test" not in tables:
        return
    seen = {fingerprint(row) for row in tables["train"]}
    shared = sum(fingerprint(row) in seen for row in tables["test"])
    if shared:
        log.warning(
            "%d of the %d test rows also stand in train (%s)",
            shared,
            len(tables["test"]),
            tables["test"].source,
        )


def load(
    data: Data,
    encoding: str = "utf-8",
    columns: str | Sequence[str] = (),
    config: str | None = None,
) -> Tables:
    """The splits behind `data`.

    Args:
        data: a file (one split, "train"), a folder with train / dev or validation / test files, a
            hub name ("hf:owner/name", "hf:owner/name:config", or a bare name when no such path
            exists), rows in memory, or a mapping from split names to rows.
        columns: names for the columns of headerless .csv or .tsv files, a list or "label,text".

    Raises:
        DataError: nothing there, malformed rows, or the hub cannot be reached.
    """
    if isinstance(data, Mapping):
        unknown = sorted(set(data) - set(SPLIT_STEMS))
        if unknown:
            raise DataError(f"unknown split {unknown[0]!r}; use {', '.join(SPLIT_STEMS)}")
        return {name: _in_memory(rows, name) for name, rows in data.items()}
    if not isinstance(data, str | Path):
        return {"train": _in_memory(data, "train")}
    columns = [part.strip() for part in columns.split(",")] if isinstance(columns, str) else columns
    name = str(data)
    path = Path(name).expanduser()
    if name.startswith("hf:"):
        return load_hub(name.removeprefix("hf:"), config)
    if path.is_dir():
        return _folder(path, encoding, columns)
    if path.is_file():
        return {"train": read_table(path, encoding, columns)}
    if path.suffix in READERS or path.is_absolute() or name.startswith((".", "~")):
        raise DataError(f"no such file or folder: {path}")
    return load_hub(name, config)


def _in_memory(rows: Sequence[Row], name: str) -> Table:
    if isinstance(rows, Table):
        return rows
    if not rows:
        raise DataError(f"the {name} rows are empty; a data set needs at least one")
    return table(rows, f"{name} rows given in memory")


def _folder(folder: Path, encoding: str, columns: Sequence[str]) -> Tables:
    if (folder / "dataset_dict.json").is_file():
        return _saved(folder)
    found: dict[str, Path] = {}
    for name, stems in SPLIT_STEMS.items():
        files = [p for p in sorted(folder.iterdir()) if p.stem in stems and p.suffix in READERS]
        if len(files) > 1:
            both = ", ".join(p.name for p in files)
            raise DataError(f"{folder} holds several files for {name}: {both}; keep one")
        if files:
            found[name] = files[0]
    if not found:
        raise DataError(
            f"{folder} holds no train, dev (or validation) or test file ending in "
            f"{', '.join(READERS)}; name the file itself, or add one"
        )
    return {name: read_table(path, encoding, columns) for name, path in found.items()}


def _saved(folder: Path) -> Tables:
    import datasets

    return _from_hub_splits(datasets.load_from_disk(str(folder)), str(folder))


def load_hub(
    name: str, config: str | None = None, splits: Mapping[str, str] | None = None
) -> Tables:
    """A data set by its hub name, through the `datasets` library.

    Args:
        splits: our split names to the hub's; train, validation and test when None.

    Raises:
        DataError: the library is missing, the name is unknown, or there is no network.
    """
    name, _, inline = name.partition(":")
    config = inline or config
    try:
        loaded = _load_dataset(name, config)
    except ImportError as error:
        raise DataError(
            f"loading {name!r} needs the datasets library: pip install datasets, "
            "or name a local file or folder"
        ) from error
    except Exception as error:  # the library raises many unrelated types
        where = f"{name!r}" + (f" (config {config!r})" if config else "")
        raise DataError(
            f"no local file or folder {name!r}, and the data set {where} could not be loaded: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no detail'}; "
            "check the name and the network, or give a local file or folder"
        ) from error
    return _from_hub_splits(loaded, name, splits)


def _load_dataset(name: str, config: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, config)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        # repositories that still have a loading script keep a converted copy on this branch
        return datasets.load_dataset(name, config, revision="refs/convert/parquet")


def _from_hub_splits(loaded: Any, name: str, splits: Mapping[str, str] | None = None) -> Tables:
    tables: Tables = {}
    wanted = {k: (v,) for k, v in splits.items()} if splits else SPLIT_STEMS
    for split, stems in wanted.items():
        stem = next((stem for stem in stems if stem in loaded), None)
        if stem is not None:
            tables[split] = table([dict(row) for row in loaded[stem]], f"{name} ({stem})")
        elif splits:
            raise DataError(f"data set {name!r} has no split {stems[0]!r}; it has {list(loaded)}")
    if not tables:
        raise DataError(f"data set {name!r} has no train, validation or test split: {list(loaded)}")
    return tables


def data_root() -> Path | None:
    """The folder named by the environment variable ZOTUNE_DATA, if it is set and exists."""
    named = os.environ.get("ZOTUNE_DATA")
    if not named:
        return None
    root = Path(named).expanduser()
    if not root.is_dir():
        raise DataError(f"ZOTUNE_DATA={named!r} is not a folder; unset it or correct it")
    return root
