"""Folders of images: which there are, their captions, and each as a tensor of one size."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zotune.errors import DataError
from zotune.tasks.data import SPLIT_STEMS, Row, Table, read_table, read_text, table
from zotune.tasks.pictures import ENDINGS, Files

METADATA = ("metadata.jsonl", "metadata.csv")
CAPTIONS = ("text", "caption")


def image_tables(folder: Path) -> dict[str, Table]:
    """Rows {"image", "text", "digest"} by split: from subfolders train, dev (validation), test; all
    are train where there are none.

    A caption comes from metadata.jsonl or metadata.csv (file_name, text; the imagefolder
    convention) or from `name.txt` beside `name.png`; None where there is none. The digest is of the
    file's bytes.

    Raises:
        DataError: no folder, no images, or metadata that names files that are not there.
    """
    if not folder.is_dir():
        raise DataError(f"no such folder of images: {folder}")
    inside = {
        split: folder / stem
        for split, stems in SPLIT_STEMS.items()
        for stem in reversed(stems)
        if (folder / stem).is_dir()
    }
    found = inside or {"train": folder}
    return {split: _rows(folder, path) for split, path in found.items()}


def _rows(root: Path, folder: Path) -> Table:
    files = find_images(folder)
    if not files:
        raise DataError(f"{folder} holds no images ({', '.join(ENDINGS)})")
    captions = read_captions(folder, files)
    rows: list[Row] = []
    for path in files:
        digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        name = path.relative_to(root).as_posix()
        rows.append({"image": name, "text": captions.get(path), "digest": digest})
    return table(rows, str(folder))


def find_images(folder: Path) -> list[Path]:
    """The image files in a folder and those below it, by name."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())


def read_captions(folder: Path, files: Sequence[Path]) -> dict[Path, str]:
    """The captions of images, by file.

    Raises:
        DataError: a line of the metadata without file_name or caption, or of a file that is not
            among the images.
    """
    texts = {path: path.with_suffix(".txt") for path in files}
    found = {path: read_text(text).strip() for path, text in texts.items() if text.is_file()}
    metadata = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if metadata is None:
        return found
    rows, known = read_table(metadata), set(files)
    for number, row in enumerate(rows):
        path = folder / str(row.get("file_name", ""))
        caption = next((row[name] for name in CAPTIONS if isinstance(row.get(name), str)), None)
        if path not in known or caption is None:
            raise DataError(
                f"{rows.where(number)}: want file_name, an image in {folder}, and its caption as "
                f"{' or '.join(CAPTIONS)}; got {dict(row)}"
            )
        found[path] = caption.strip()
    return found


def read_image(path: Path, size: tuple[int, int], channels: int) -> Tensor:
    """An image as uint8 (channels, height, width).

    Grey (1) or RGB (3) whatever it was, scaled until it covers `size` (height, width), the middle
    cut out.

    Raises:
        DataError: the file is no image, is cut off, or is larger than Pillow's limit.
    """
    from PIL import Image, ImageOps

    found = Files()[str(path)]
    whole = Image.fromarray(found[..., 0] if found.shape[-1] == 1 else found)
    mode = {1: "L", 3: "RGB"}[channels]
    image = ImageOps.fit(whole.convert(mode), size[::-1], Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image))
    return pixels.reshape(*size, channels).permute(2, 0, 1).contiguous()


def named(rows: Sequence[Mapping[str, Any]], shown: int = 5) -> str:
    """Names of images for a message, the first few of them."""
    names = [str(row["image"]) for row in rows]
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
