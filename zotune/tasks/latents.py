"""Images as a denoiser knows them, computed once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zotune.errors import DataError
from zotune.models.conditioning import Canvas, Conditions
from zotune.tasks.data import Table
from zotune.tasks.gallery import pooled
from zotune.tasks.images import named, read_image

log = logging.getLogger("zotune")
_TOGETHER = 16  # images that are in memory, and go through the VAE, at a time


@dataclass(frozen=True, eq=False)
class Encoded:
    """Latents, conditions, features to compare sets by, and what tells the image from others."""

    latents: Tensor
    conditions: Conditions
    features: Tensor
    digest: str


def encode_images(
    rows: Table, root: Path, canvas: Canvas, embedded: Mapping[str, Conditions]
) -> tuple[Table, dict[str, Encoded]]:
    """The rows whose images can be read, and those images by name; the others are named and
    counted in the log.

    Args:
        embedded: conditions by caption; empty for a model without captions.

    Raises:
        DataError: none of the images can be read.
    """
    found: dict[str, Encoded] = {}
    for start in range(0, len(rows), _TOGETHER):
        part = {}
        for row in rows[start : start + _TOGETHER]:
            try:
                pixels = read_image(root / row["image"], canvas.size, canvas.channels)
            except DataError as error:
                log.warning("left out: %s", error)
            else:
                part[row["image"]] = (row, pixels)
        if not part:
            continue
        images = torch.stack([pixels for _, pixels in part.values()])
        latents, features = canvas.latents(images), pooled(images)
        for i, (name, (row, _)) in enumerate(part.items()):
            known = embedded[row["text"]] if embedded else {}
            found[name] = Encoded(latents[i], known, features[i], str(row["digest"]))
    kept = rows.take([i for i, row in enumerate(rows) if row["image"] in found])
    if not found:
        raise DataError(f"none of the {len(rows)} images can be read: {named(list(rows))}")
    if len(kept) < len(rows):
        log.warning("%d of %d images cannot be read", len(rows) - len(kept), len(rows))
    return kept, found
