"""Diffusion models on images with captions: the denoising loss, and samples."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zotune.errors import BadInput, DataError
from zotune.models.conditioning import Canvas, Conditions, canvas_of, embed
from zotune.models.pipeline import component, read_index
from zotune.tasks.batch import Batch
from zotune.tasks.data import Table
from zotune.tasks.images import image_tables, named, read_image
from zotune.tasks.labels import pick_split
from zotune.tasks.noising import Noised, Noising, noising
from zotune.tasks.pictures import frechet, grid, pooled
from zotune.tasks.sampling import Sampler, Sampling, run
from zotune.tasks.sources import Sizes
from zotune.tasks.task import Example, Numbers, Task, device_of, evaluating

if TYPE_CHECKING:
    from PIL.Image import Image

    from zotune.models import Loaded

log = logging.getLogger("zotune")
FIXED = 0  # the seed of evaluations: every run is measured under the same noise
_TOGETHER = 16  # images that go through the VAE at a time


@dataclass(frozen=True, eq=False)
class Encoded:
    """An image as the denoiser knows it: latents, conditions, and features to compare sets by."""

    latents: Tensor
    conditions: Conditions
    features: Tensor
    digest: str


Look = tuple[Noised, Conditions]


class Diffusion(Task):
    """Tell the noise from the image.

    The loss of an example is the mean square error of what the denoiser makes of it at one time
    and under one draw of noise, both a function of (seed, step, place in the batch): all probes of
    a step see the same. An evaluation looks at every image at `looks` times, evenly spread, under
    noise that goes by the image alone, and makes samples from fixed noise; "frechet" is their
    Fréchet distance to the images of the split on mean colours of 8 x 8 fields.

    Latents and embeddings are computed once, in `prepare`, and kept on the CPU.

    Args:
        tables: split name to rows {"image", "text", "digest"}; `root` is where the images lie.
        numbers: the source of random numbers.
        resolution: side of the images in pixels; the model's own when None.
        timesteps: "logit-normal" or "uniform", for flow matching; diffusion is always uniform.
        weighting: of flow matching's loss: "none", "sigma-sqrt" or "cosmap".
    """

    name = "diffusion"
    metric = "loss"
    higher_is_better = False
    kinds = ("diffusion",)

    def __init__(
        self,
        tables: Mapping[str, Table],
        root: Path,
        numbers: Numbers,
        sampling: Sampling,
        *,
        resolution: int | None = None,
        timesteps: str = "logit-normal",
        weighting: str = "none",
        looks: int = 4,
    ) -> None:
        if looks < 1:
            raise BadInput(f"looks={looks}; want at least one time to look at an image")
        self._tables, self._root, self._numbers = dict(tables), root, numbers
        self._sampling, self._resolution, self._looks = sampling, resolution, looks
        self._density, self._weighting = timesteps, weighting
        self._encoded: dict[str, Encoded] = {}
        self._noising: Noising | None = None
        self._sampler: Sampler | None = None
        self._samples: Tensor | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._tables)

    @property
    def truncated(self) -> int:
        return 0

    def split(self, name: str) -> Sequence[Example]:
        """Rows of one split; after `prepare`, without the images that cannot be read."""
        return pick_split(self._tables, name)

    def prepare(self, loaded: Loaded) -> nn.Module:
        """Read all images, encode them and their captions; returns the denoiser."""
        if loaded.kind != "diffusion":
            raise BadInput(
                f"task {self.name!r} needs the folder of a diffusers pipeline, got a model of kind "
                f"{loaded.kind!r}"
            )
        folder, device = loaded.path, device_of(loaded.model)
        scheduler = component(folder, "scheduler")
        self._noising = noising(scheduler, self._density, self._weighting)
        canvas = canvas_of(folder, loaded.model, self._resolution, device)
        conditions = self._conditions(folder, device)
        self._sampler = Sampler(scheduler, canvas, conditions.get("", {}), self._sampling)
        for split, rows in self._tables.items():
            self._tables[split] = self._encode_all(split, rows, canvas, conditions)
        return loaded.model

    def _conditions(self, folder: Path, device: torch.device) -> dict[str, Conditions]:
        """What the text encoders make of every caption and of none; {} without text encoders."""
        if not read_index(folder)[1].texts:
            return {}
        rows = [row for table in self._tables.values() for row in table]
        silent = [row for row in rows if not row["text"]]
        if silent:
            raise DataError(
                f"{len(silent)} images in {self._root} have no caption ({named(silent)}), and this "
                "model draws what captions say; give metadata.jsonl with file_name and text, or "
                "name.txt beside name.png"
            )
        return embed(folder, sorted({"", *(row["text"] for row in rows)}), device)

    def _encode_all(
        self, split: str, rows: Table, canvas: Canvas, conditions: Mapping[str, Conditions]
    ) -> Table:
        pixels, bad = dict[int, Tensor](), []
        for i, row in enumerate(rows):
            try:
                pixels[i] = read_image(self._root / row["image"], canvas.size, canvas.channels)
            except DataError as error:
                log.warning("%s; it is left out", error)
                bad.append(row)
        if bad:
            log.warning("%d of %d %s images cannot be read", len(bad), len(rows), split)
        if not pixels:
            raise DataError(f"none of the {len(rows)} {split} images can be read: {named(bad)}")
        kept = list(pixels)
        for start in range(0, len(kept), _TOGETHER):
            part = kept[start : start + _TOGETHER]
            images = torch.stack([pixels[i] for i in part])
            made = zip(part, canvas.latents(images), pooled(images), strict=True)
            for i, latents, features in made:
                known = conditions[rows[i]["text"]] if conditions else {}
                digest = str(rows[i]["digest"])
                self._encoded[rows[i]["image"]] = Encoded(latents, known, features, digest)
        return rows.take(kept)

    def encode(self, example: Example) -> Encoded:
        self._bound()
        return self._encoded[example["image"]]

    def look(self, feature: Encoded, seed: int, step: int, lane: int) -> Look:
        place = self._bound()[0].place(partial(self._numbers, seed=seed, step=step, lane=lane))
        return self._look_at(feature, place, seed, step, lane)

    def _look_at(self, feature: Encoded, place: float, seed: int, step: int, lane: int) -> Look:
        shape = feature.latents.shape
        noise = self._numbers("gaussian", "noise", shape.numel(), seed=seed, step=step, lane=lane)
        noised = self._bound()[0].at(feature.latents, noise.view(shape), place)
        return noised, feature.conditions

    def collate(self, features: Sequence[Look]) -> Batch:
        looks, known = [noised for noised, _ in features], [c for _, c in features]
        tensors = {
            "noisy": torch.stack([x.noisy for x in looks]),
            "target": torch.stack([x.target for x in looks]),
            "timestep": torch.stack([x.timestep for x in looks]),
            "weight": torch.tensor([x.weight for x in looks]),
            **{name: torch.stack([c[name] for c in known]) for name in known[0]},
        }
        return Batch(tensors, len(features))

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The weighted mean square error of each example, and ones."""
        known = {name: batch[name] for name in self._bound()[1].blank}
        made = run(model, batch["noisy"], batch["timestep"], known)
        loss = (made - batch["target"]).square().flatten(1).mean(1) * batch["weight"]
        return loss, torch.ones_like(loss)

    def evaluate(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int
    ) -> dict[str, float]:
        """loss over all looks; frechet of the samples, where samples are made."""
        if not len(examples):
            raise BadInput("there are no examples to evaluate; give at least one")
        features = [self.encode(example) for example in examples]
        looks = [(f, k) for f in features for k in range(self._looks)]
        total, device = 0.0, device_of(model)
        with evaluating(model):
            for start in range(0, len(looks), batch_size):
                batch = self.collate([self._fixed(*x) for x in looks[start : start + batch_size]])
                total += float(self.losses(model, batch.to(device))[0].double().sum())
            found = {"loss": total / len(looks)}
            if self._sampling.count and len(features) > 1:
                found["frechet"] = self._sample(model, features, batch_size)
        return found

    def _fixed(self, feature: Encoded, k: int) -> Look:
        place, step = (k + 0.5) / self._looks, int(feature.digest[:8], 16)
        return self._look_at(feature, place, FIXED, step, k)

    def _sample(self, model: nn.Module, like: Sequence[Encoded], batch_size: int) -> float:
        """Make samples with the conditions of `like`, and compare the two sets."""
        shape = like[0].latents.shape

        def noise(i: int) -> Tensor:
            x = self._numbers("gaussian", "sample", shape.numel(), seed=FIXED, step=i, lane=0)
            return x.view(shape)

        known = [feature.conditions for feature in like]
        self._samples = self._bound()[1].images(model, known, noise, batch_size)
        return frechet(pooled(self._samples), torch.stack([x.features for x in like]))

    def picture(self) -> Image | None:
        return None if self._samples is None else grid(self._samples)

    def _bound(self) -> tuple[Noising, Sampler]:
        if self._noising is None or self._sampler is None:
            raise BadInput(f"task {self.name!r} has no model yet; call prepare(loaded) first")
        return self._noising, self._sampler


def diffusion(
    data: str,
    numbers: Numbers,
    resolution: int | None = None,
    timesteps: str = "logit-normal",
    weighting: str = "none",
    looks: int = 4,
    samples: int = 16,
    sample_steps: int = 20,
    guidance: float = 1.0,
    train_size: int | None = None,
    dev_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
) -> Diffusion:
    """A folder of images with captions, for the folder of a diffusers pipeline.

    Args:
        numbers: the source of random numbers; a run gives its keyed noise.
        looks: times at which an evaluation looks at every image.
        samples: images that an evaluation makes; 0 for none.
        train_size: (and dev_size, test_size) in images.
    """
    root = Path(data).expanduser()
    tables = Sizes(train_size, dev_size, test_size, seed).apply(
        image_tables(root), group=lambda row: row["digest"]
    )
    return Diffusion(
        tables, root, numbers, Sampling(samples, sample_steps, guidance), resolution=resolution,
        timesteps=timesteps, weighting=weighting, looks=looks,
    )  # fmt: skip
