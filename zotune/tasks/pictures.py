"""Where pictures lie: in arrays, as encoded bytes, in files. A name gets one, uint8 (h, w, c)."""

from __future__ import annotations

import io
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zotune.errors import DataError
from zotune.tasks.data import READERS, SPLIT_STEMS, Table, table
from zotune.tasks.sources import Tables

log = logging.getLogger("zotune")
Picture = NDArray[np.uint8]
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SHOWN = 5


class Pictures(ABC):
    """Pictures by name."""

    @abstractmethod
    def __getitem__(self, name: str) -> Picture:
        """One picture, uint8 (height, width, channels). Raises DataError naming a bad one."""


@dataclass(frozen=True, eq=False)
class Arrays(Pictures):
    """Splits of equal pictures, uint8 (n, height, width) or (n, height, width, channels).

    >>> Arrays({"test": np.zeros((2, 8, 8), np.uint8)})["test/1"].shape
    (8, 8, 1)
    """

    splits: Mapping[str, NDArray[np.uint8]]

    def __getitem__(self, name: str) -> Picture:
        split, index = place(name)
        found: Picture = self.splits[split][index]
        return found if found.ndim == 3 else found[..., None]


@dataclass(frozen=True, eq=False)
class Encoded(Pictures):
    """Splits of encoded files one behind the other: bytes, and n + 1 places where one begins."""

    splits: Mapping[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]

    def __getitem__(self, name: str) -> Picture:
        split, index = place(name)
        data, starts = self.splits[split]
        return decoded(data[starts[index] : starts[index + 1]].tobytes(), name)


@dataclass(frozen=True)
class Files(Pictures):
    """Picture files by path."""

    def __getitem__(self, name: str) -> Picture:
        try:
            data = Path(name).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {name}: {error.strerror or error}") from error
        return decoded(data, name)


def place(name: str) -> tuple[str, int]:
    """Split and number of a name such as "train/17"."""
    split, _, index = name.partition("/")
    return split, int(index)


def decoded(data: bytes, name: str) -> Picture:
    """A PNG, JPEG, ... as pixels, grey or RGB, upright as its EXIF says, transparent parts white.

    Raises:
        DataError: what Pillow cannot read: no image, cut off, or larger than its limit.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as opened:
            image: Any = ImageOps.exif_transpose(opened)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            pixels = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} is not a readable image ({error})") from error
    return pixels if pixels.ndim == 3 else pixels[..., None]


def numbered(split: str, labels: NDArray[Any], source: str) -> Table:
    """Rows {"image": "train/0", "label": 7}, ... of a split held in arrays."""
    rows = [{"image": f"{split}/{i}", "label": int(label)} for i, label in enumerate(labels)]
    return table(rows, source)


def has_tables(folder: Path) -> bool:
    """Whether a folder holds train, dev or test rows in files such as train.csv."""
    stems = {stem for stems in SPLIT_STEMS.values() for stem in stems}
    return any(path.stem in stems and path.suffix in READERS for path in folder.iterdir())


def folder_tables(folder: Path) -> Tables:
    """Pictures of a folder with a subfolder per class, or with train, dev and test folders of them.

    Raises:
        DataError: no classes, or no picture in them.
    """
    stems = {stem: split for split, stems in SPLIT_STEMS.items() for stem in stems}
    parts = {stems[p.name]: p for p in sorted(folder.iterdir()) if p.is_dir() and p.name in stems}
    return {split: _classes(part) for split, part in (parts or {"train": folder}).items()}


def _classes(folder: Path) -> Table:
    rows = [
        {"image": str(path), "label": kind.name}
        for kind in sorted(folder.iterdir())
        if kind.is_dir() and not kind.name.startswith(".")
        for path in sorted(kind.rglob("*"))
        if path.suffix.lower() in ENDINGS
    ]
    if not rows:
        raise DataError(
            f"{folder} holds no pictures in a subfolder per class; wanted class/picture"
            f"{'|'.join(ENDINGS[:3])}, or a .csv or .jsonl file with path and label"
        )
    return table(rows, str(folder))


@dataclass
class Readable:
    """Which rows' pictures can be read; the others are named in the log and counted."""

    pictures: Pictures
    skipped: list[str] = field(default_factory=list)

    def keep(self, rows: Table) -> Table:
        """The readable rows. Raises DataError if none is left."""
        good = [i for i, row in enumerate(rows) if self._reads(str(row["image"]))]
        if not good:
            raise DataError(f"{rows.source}: none of the {len(rows)} pictures can be read")
        return rows.take(good)

    def say(self) -> None:
        """How many are left out, if any."""
        if self.skipped:
            log.warning("%d pictures cannot be read and are left out", len(self.skipped))

    def _reads(self, name: str) -> bool:
        try:
            self.pictures[name]
        except DataError as error:
            self.skipped.append(name)
            if len(self.skipped) <= SHOWN:
                log.warning("left out: %s", error)
            return False
        return True
