"""Image classification: any module that maps (batch, channels, height, width) to logits."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zotune.errors import BadInput, DataError
from zotune.quant.model import float_dtype
from zotune.tasks.batch import Batch
from zotune.tasks.heads import head_labels, label_columns
from zotune.tasks.labels import pick_split
from zotune.tasks.objectives import check_objective, is_per_example, label_losses, label_metrics
from zotune.tasks.pictures import Pictures
from zotune.tasks.preprocessing import Preprocessing
from zotune.tasks.task import Example, Task, chunks, device_of, evaluating

if TYPE_CHECKING:
    from zotune.models import Loaded

log = logging.getLogger("zotune")


@dataclass(frozen=True)
class PictureFeatures:
    """One picture, uint8 (channels, height, width), and its label."""

    pixels: Tensor
    label: int


class ImageClassification(Task):
    """Classify pictures into `labels`.

    Batches hold "pixels", uint8 (n, channels, height, width), and "label". The model gets
    (pixels / 255 - mean) / std in float32 and gives logits, or an output that has `.logits`.

    Args:
        tables: split name to rows {"image": name, "label": index}.
        pictures: the pictures by name.
        labels: label names, in index order.
        size: height and width to resize to, one number for both; the checkpoint's own, or none.
        channels: 1 (grey) or 3; as the pictures are when None.
        mean, std: of pixels in 0..1, per channel; the checkpoint's own, or 0 and 1.
        objective: "loss", or the non-differentiable "accuracy" or "f1".
        skipped: how many pictures could not be read and were left out.
    """

    metric = "accuracy"
    kinds = ("vision", "module")

    def __init__(
        self,
        tables: Mapping[str, Sequence[Example]],
        pictures: Pictures,
        labels: Sequence[str],
        *,
        name: str = "images",
        size: int | Sequence[int] | None = None,
        channels: int | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        objective: str = "loss",
        skipped: int = 0,
    ) -> None:
        self.name, self.labels, self.skipped = name, list(labels), skipped
        self.objective = check_objective(objective)
        self.per_example = is_per_example(objective)
        self.pictures, self._tables = pictures, dict(tables)
        self._asked = (size, mean, std, channels)
        self.preprocessing = Preprocessing().but(*self._asked)
        self._columns: list[int] | None = None
        first = next(iter(self._tables.values()))[0]
        self.channels = self.encode(first).pixels.shape[0]

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._tables)

    @property
    def truncated(self) -> int:
        return 0

    def split(self, name: str) -> Sequence[Example]:
        return pick_split(self._tables, name)

    def prepare(self, loaded: Loaded) -> nn.Module:
        """The model itself; its folder says how pictures are resized and normalised."""
        if loaded.kind not in self.kinds:
            raise BadInput(
                f"task {self.name!r} shows pictures, which a model of kind {loaded.kind!r} does "
                "not take; give an image classifier"
            )
        if loaded.kind == "vision":
            self._columns = label_columns(head_labels(loaded), self.labels)
        self.preprocessing = Preprocessing.of_folder(loaded.path).but(*self._asked)
        self.preprocessing.check_channels(self.channels)
        wanted = channels_of(loaded.model)
        if wanted not in (None, self.channels):
            raise BadInput(
                f"the model takes {wanted} channels, the pictures of {self.name!r} have "
                f"{self.channels}; give channels={wanted}, or another model"
            )
        return loaded.model

    def encode(self, example: Example) -> PictureFeatures:
        picture = self.pictures[str(example["image"])]
        return PictureFeatures(self.preprocessing.fit(picture), int(example["label"]))

    def collate(self, features: Sequence[PictureFeatures]) -> Batch:
        shapes = {tuple(f.pixels.shape) for f in features}
        if len(shapes) > 1:
            raise DataError(
                f"pictures of {self.name!r} differ in shape: {sorted(shapes)[:3]}; give size="
            )
        pixels = torch.stack([f.pixels for f in features])
        label = torch.tensor([f.label for f in features])
        return Batch({"pixels": pixels, "label": label}, len(features))

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits (batch.size, labels), float32, in the order of the task's labels."""
        x = self.preprocessing.apply(batch["pixels"]).to(float_dtype(model))
        out = model(x.contiguous(memory_format=torch.channels_last))
        logits: Tensor = out if isinstance(out, Tensor) else out.logits
        if logits.dim() != 2 or logits.shape[1] < len(self.labels):
            raise BadInput(
                f"the model gives {tuple(logits.shape)} for {batch.size} pictures; want logits "
                f"({batch.size}, {len(self.labels)}), one per label of {self.name!r}"
            )
        logits = logits.float()
        return logits if self._columns is None else logits[:, self._columns]

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return label_losses(self.objective, self.scores(model, batch), batch)

    def evaluate(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int
    ) -> dict[str, float]:
        """loss (cross-entropy), accuracy, macro_f1 and, for two labels, f1 of label 1."""
        wanted = [int(example["label"]) for example in examples]
        device, found = device_of(model), list[Tensor]()
        with evaluating(model):
            for part in chunks([0] * len(examples), batch_size):
                batch = self.batch([examples[i] for i in part]).to(device)
                found += self.scores(model, batch).cpu()
        return label_metrics(found, wanted, len(self.labels) == 2)


def channels_of(model: nn.Module) -> int | None:
    """How many channels a model's pictures have, by its first convolution; None without one."""
    from zotune.quant import QuantConv2d

    for module in model.modules():
        if isinstance(module, nn.Conv2d | QuantConv2d):
            return module.in_channels
    return None
