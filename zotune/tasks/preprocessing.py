"""From pixels to what a model takes: size, channels, mean and standard deviation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zotune.errors import BadInput, DataError, FormatError
from zotune.tasks.pictures import Picture

FILE = "preprocessor_config.json"


@dataclass(frozen=True)
class Preprocessing:
    """x = (pixel / 255 - mean) / std, of pictures with so many channels, resized to `size`.

    Args:
        size: (height, width); None for pictures of the same size already.
        resized: length of the shorter edge before the centre is cut out; None: resized to `size`
            itself, whatever the proportions.
        mean, std: per channel, or one for all.
        channels: 1 (grey) or 3; None: as the pictures are.

    >>> Preprocessing(mean=(0.5,), std=(0.5,)).apply(torch.full((1, 1, 2, 2), 255)).unique().item()
    1.0
    """

    size: tuple[int, int] | None = None
    resized: int | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    channels: int | None = None

    def __post_init__(self) -> None:
        if not all(s > 0 for s in self.std) or not self.mean:
            raise BadInput(f"mean={self.mean}, std={self.std}; want a std > 0 per channel")
        if self.channels not in (None, 1, 3):
            raise BadInput(f"channels={self.channels}; want 1 (grey) or 3")

    @classmethod
    def of_folder(cls, folder: Path) -> Preprocessing:
        """What a checkpoint's preprocessor_config.json says; nothing without that file.

        Raises:
            FormatError: if the file makes no sense.
        """
        from zotune.quant.formats.tensors import read_json

        if not (folder / FILE).is_file():
            return cls()
        record = read_json(folder / FILE)
        try:
            return cls(**_settings(record))
        except (TypeError, ValueError, KeyError) as error:
            raise FormatError(f"{folder / FILE} cannot be understood ({error!r})") from error

    def but(
        self,
        size: int | Sequence[int] | None,
        mean: float | Sequence[float] | None,
        std: float | Sequence[float] | None,
        channels: int | None,
    ) -> Preprocessing:
        """The same with what the user says."""
        changed = self if channels is None else replace(self, channels=channels)
        if size is not None:
            pair = (size, size) if isinstance(size, int) else tuple(size)
            changed = replace(changed, size=pair, resized=None)
        if mean is not None:
            changed = replace(changed, mean=_floats(mean))
        return changed if std is None else replace(changed, std=_floats(std))

    def fit(self, picture: Picture) -> Tensor:
        """The picture as it is wanted, uint8 (channels, height, width)."""
        resized = self.size is not None and picture.shape[:2] != self.size
        if resized or self.channels not in (None, picture.shape[2]):
            picture = self._changed(picture, resized)
        return torch.tensor(picture).permute(2, 0, 1).contiguous()

    def _changed(self, picture: Picture, resized: bool) -> Picture:
        from PIL import Image

        image = Image.fromarray(picture if picture.shape[2] > 1 else picture[..., 0])
        if self.channels is not None:
            image = image.convert("L" if self.channels == 1 else "RGB")
        if resized:
            image = self._resized(image)
        found = np.asarray(image)
        return found if found.ndim == 3 else found[..., None]

    def _resized(self, image: Any) -> Any:
        from PIL.Image import Resampling

        assert self.size is not None
        height, width = self.size
        if self.resized is not None:
            factor = self.resized / min(image.size)
            near = tuple(round(edge * factor) for edge in image.size)
            image = image.resize(near, Resampling.BILINEAR)
            left, top = (image.width - width) // 2, (image.height - height) // 2
            return image.crop((left, top, left + width, top + height))
        return image.resize((width, height), Resampling.BILINEAR)

    def check_channels(self, channels: int) -> None:
        """Refuse pictures with other channels than mean and std are given for."""
        for values in (self.mean, self.std):
            if len(values) not in (1, channels):
                raise DataError(
                    f"pictures have {channels} channels, mean and std are for {len(values)}; "
                    f"give channels={len(values)}, or mean= and std= for {channels}"
                )

    def apply(self, pixels: Tensor) -> Tensor:
        """uint8 (batch, channels, height, width) -> float32."""
        mean, std = (torch.tensor(v, device=pixels.device) for v in (self.mean, self.std))
        x = pixels.float().div_(255.0)
        return x.sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    """A transformers image processor's JSON as ours."""
    found: dict[str, Any] = {}
    if record.get("do_normalize", "image_mean" in record):
        found = {"mean": _floats(record["image_mean"]), "std": _floats(record["image_std"])}
    scale = 255.0 * float(record.get("rescale_factor", 1 / 255.0))
    if abs(scale - 1.0) > 1e-4:
        raise ValueError(f"rescale_factor={record['rescale_factor']} is not 1/255")
    size = record.get("size")
    if not record.get("do_resize", size is not None) or size is None:
        return found
    if isinstance(size, int):
        return {**found, "size": (size, size)}
    if "shortest_edge" not in size:
        return {**found, "size": (int(size["height"]), int(size["width"]))}
    edge = int(size["shortest_edge"])
    crop = record.get("crop_size") if record.get("do_center_crop") else None
    if crop is None and edge < 384 and "crop_pct" in record:  # ConvNeXt
        return {**found, "size": (edge, edge), "resized": round(edge / record["crop_pct"])}
    crop = crop or {"height": edge, "width": edge}
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    return {**found, "size": (int(crop["height"]), int(crop["width"])), "resized": edge}


def _floats(values: float | Sequence[float]) -> tuple[float, ...]:
    return (float(values),) if isinstance(values, int | float) else tuple(map(float, values))
