"""Picture data by name (digits, MNIST, CIFAR-10), and pictures of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from zotune.errors import DataError
from zotune.tasks.data import Row, Table, hold_out
from zotune.tasks.labels import find_labels, labelled, parse_list
from zotune.tasks.pictures import (
    Arrays,
    Encoded,
    Files,
    Pictures,
    Readable,
    folder_tables,
    has_tables,
    numbered,
)
from zotune.tasks.sources import Data, Sizes, Tables, data_root, load, load_hub
from zotune.tasks.vision import ImageClassification

Found = tuple[Tables, Pictures, list[str]]
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SPLITS = ("train", "test")
DIGITS = tuple("0123456789")


def digits() -> Found:
    """scikit-learn's 1,797 digits of 8 x 8 pixels; a fifth is the test split."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("task 'digits' needs scikit-learn: pip install 'zotune[vision]'") from error
    images, labels = load_digits(return_X_y=True)
    pixels = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    rows = numbered("all", labels, "scikit-learn's digits")
    train, test = hold_out(rows, len(rows) // 5, "test")
    return {"train": train, "test": test}, Arrays({"all": pixels}), list(DIGITS)


def mnist() -> Found:
    """ZOTUNE_DATA's mnist/mnist.npz, or the hub's."""
    file = _local("mnist/mnist.npz")
    if file is None:
        return _hub("ylecun/mnist", "image", DIGITS)
    held = _npz(file, [f"{s}_{part}" for s in SPLITS for part in "xy"])
    tables = {s: numbered(s, held[f"{s}_y"], f"{file} ({s})") for s in SPLITS}
    return tables, Arrays({s: held[f"{s}_x"] for s in SPLITS}), list(DIGITS)


def cifar10() -> Found:
    """ZOTUNE_DATA's cifar10_jpeg/cifar10_jpeg.npz, or the hub's."""
    file = _local("cifar10_jpeg/cifar10_jpeg.npz")
    if file is None:
        return _hub("uoft-cs/cifar10", "img", CIFAR10)
    held = _npz(file, [f"{s}_{part}" for s in SPLITS for part in ("jpeg", "off", "label")])
    encoded = Encoded({s: (held[f"{s}_jpeg"], held[f"{s}_off"]) for s in SPLITS})
    tables = {s: numbered(s, held[f"{s}_label"], f"{file} ({s})") for s in SPLITS}
    return tables, encoded, list(CIFAR10)


SETS: dict[str, tuple[Callable[[], Found], str]] = {
    "digits": (digits, "scikit-learn's handwritten digits, 8 x 8 pixels"),
    "mnist": (mnist, "handwritten digits, 28 x 28 pixels"),
    "cifar10": (cifar10, "photographs of ten kinds, 32 x 32 pixels"),
}


def named(
    task: str,
    size: int | Sequence[int] | None = None,
    channels: int | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    objective: str = "loss",
    train_size: int | None = None,
    dev_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
) -> ImageClassification:
    """A named picture set; arguments as `ImageClassification` and `images`."""
    tables, pictures, labels = SETS[task][0]()
    tables = Sizes(train_size, dev_size, test_size, seed).apply(tables)
    return ImageClassification(
        tables, pictures, labels, name=task, size=size, channels=channels, mean=mean, std=std,
        objective=objective,
    )  # fmt: skip


def images(
    data: Data,
    labels: str | Sequence[str] | None = None,
    path_field: str = "path",
    label_field: str = "label",
    channels: int = 3,
    size: int | Sequence[int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    objective: str = "loss",
    encoding: str = "utf-8",
    train_size: int | None = None,
    dev_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
) -> ImageClassification:
    """Pictures of the user's own.

    Args:
        data: a folder with a subfolder of pictures per class (in train, dev and test folders, or
            not), or rows as in `sources.load` whose `path_field` names a file, seen from the rows'
            own file.
        labels: label names in index order; found in the train rows when None.
        channels: 3, or 1 for grey.

    Raises:
        DataError: naming what is missing; pictures that cannot be read are named and left out.
    """
    sizes = Sizes(train_size, dev_size, test_size, seed)
    tables = _own(data, path_field, encoding, sizes)
    first = tables.get("train") or next(iter(tables.values()))
    names = parse_list(labels) if labels is not None else find_labels(first, label_field)
    readable = Readable(Files())
    tables = {
        split: readable.keep(labelled(rows, ("image",), label_field, names))
        for split, rows in tables.items()
    }
    readable.say()
    return ImageClassification(
        tables, readable.pictures, names, size=size, channels=channels, mean=mean, std=std,
        objective=objective, skipped=len(readable.skipped),
    )  # fmt: skip


def _own(data: Data, field: str, encoding: str, sizes: Sizes) -> Tables:
    """Splits are drawn by paths as seen from the data: a folder may move, they stay."""
    folder = Path(data).expanduser() if isinstance(data, str | Path) else None
    if folder is None or not folder.is_dir() or has_tables(folder):
        chosen = sizes.apply(load(data, encoding))
        return {split: _located(rows, field) for split, rows in chosen.items()}
    inside = {
        split: _renamed(rows, lambda path: str(Path(path).relative_to(folder)))
        for split, rows in folder_tables(folder).items()
    }
    return {
        split: _renamed(rows, lambda path: str(folder / path))
        for split, rows in sizes.apply(inside).items()
    }


def _renamed(rows: Table, change: Callable[[str], str]) -> Table:
    return rows.map(lambda row: {**row, "image": change(str(row["image"]))})


def _located(rows: Table, field: str) -> Table:
    """Rows whose "image" is the path that `field` holds, seen from the rows' own file."""
    beside = Path(rows.source).parent if Path(rows.source).is_file() else Path()

    def change(row: Row) -> Row:
        if not row.get(field):
            raise DataError(f"no field {field!r}; found {', '.join(row)}; want a picture's path")
        rest = {k: v for k, v in row.items() if k != field}
        return {**rest, "image": str(beside / str(row[field]))}

    return rows.map(change)


def _local(path: str) -> Path | None:
    root = data_root()
    return root / path if root is not None and (root / path).is_file() else None


def _npz(file: Path, keys: Sequence[str]) -> dict[str, NDArray[Any]]:
    """These arrays of a .npz file; pickled objects are refused."""
    try:
        with np.load(file, allow_pickle=False) as data:
            missing = sorted(set(keys) - set(data.files))
            if missing:
                raise DataError(f"{file} lacks the arrays {', '.join(missing)}")
            return {key: data[key] for key in keys}
    except (OSError, ValueError, BadZipFile) as error:
        raise DataError(f"{file} cannot be read ({error}); fetch it again") from error


def _hub(name: str, field: str, labels: Sequence[str]) -> Found:
    tables = load_hub(name, None, {"train": "train", "test": "test"})
    pixels: dict[str, NDArray[np.uint8]] = {
        split: np.stack([np.asarray(row[field], np.uint8) for row in rows])
        for split, rows in tables.items()
    }
    found = {s: numbered(s, np.array([r["label"] for r in rows]), f"{name} ({s})")
             for s, rows in tables.items()}  # fmt: skip
    return found, Arrays(pixels), list(labels)


def register_all() -> None:
    """Add the picture sets and `images` to the list of tasks."""
    from zotune.tasks.task import register

    for name, (_, summary) in SETS.items():
        register(name, partial(named, name), summary)
    register("images", images, "your own pictures: a folder per class, or rows (path, label)")
