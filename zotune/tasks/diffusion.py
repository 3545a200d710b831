"""Diffusion models on images with captions: the denoising loss, and samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zotune.errors import BadInput, DataError
from zotune.models.conditioning import Conditions, canvas_of, embed
from zotune.models.pipeline import component, read_index
from zotune.tasks.batch import Batch
from zotune.tasks.data import Table
from zotune.tasks.gallery import frechet, grid, pooled
from zotune.tasks.images import image_tables, named
from zotune.tasks.labels import pick_split
from zotune.tasks.latents import Encoded, encode_images
from zotune.tasks.noising import Noising, noising
from zotune.tasks.sampling import Sampler, Sampling, run
from zotune.tasks.sources import Sizes
from zotune.tasks.task import Draw, Example, Task, device_of, evaluating

if TYPE_CHECKING:
    from PIL.Image import Image

    from zotune.models import Loaded


class Diffusion(Task):
    """Tell the noise from the image.

    The loss of an example is the mean square error of what the denoiser makes of it at one time
    and under one draw of noise, both a function of (seed, step, place in the batch): all probes of
    a step see the same. An evaluation looks at every image at `looks` times, evenly spread, under
    noise that goes by the image alone, and makes samples from fixed noise; "frechet" is their
    Fréchet distance to all images of the folder, on mean colours of 8 x 8 fields.

    Latents and embeddings are computed once, in `prepare`, and kept on the CPU.

    Args:
        tables: split name to rows {"image", "text", "digest"}; `root` is where the images lie.
        draw: numbers for evaluations, by name.
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
        draw: Draw,
        sampling: Sampling,
        *,
        resolution: int | None = None,
        timesteps: str = "logit-normal",
        weighting: str = "none",
        looks: int = 4,
    ) -> None:
        if looks < 1:
            raise BadInput(f"looks={looks}; want at least one time to look at an image")
        self._tables, self._root, self._draw = dict(tables), root, draw
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
            self._tables[split], found = encode_images(rows, self._root, canvas, conditions)
            self._encoded.update(found)
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

    def encode(self, example: Example) -> Encoded:
        self._bound()
        return self._encoded[example["image"]]

    def collate(self, features: Sequence[Encoded]) -> Batch:
        """Images without noise; `varied` adds it."""
        names = self._bound()[1].blank
        known = {n: torch.stack([f.conditions[n] for f in features]) for n in names}
        latents = torch.stack([feature.latents for feature in features])
        return Batch({"latents": latents, **known}, len(features))

    def varied(self, batch: Batch, draw: Draw) -> Batch:
        x = batch["latents"]
        places = self._bound()[0].places(draw, len(x))
        return self._with_noise(batch, draw("noise", x.numel(), normal=True).view_as(x), places)

    def _with_noise(self, batch: Batch, noise: Tensor, places: Tensor) -> Batch:
        noised = vars(self._bound()[0].at(batch["latents"], noise, places))
        known = {name: t for name, t in batch.tensors.items() if name != "latents"}
        return Batch({**known, **noised}, batch.size)

    def batch(self, examples: Sequence[Example]) -> Batch:
        return self.varied(super().batch(examples), self._draw)

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
                batch = self._fixed(looks[start : start + batch_size]).to(device)
                total += float(self.losses(model, batch)[0].double().sum())
            found = {"loss": total / len(looks)}
            if self._sampling.count:
                found["frechet"] = self._sample(model, features, batch_size)
        return found

    def _fixed(self, looks: Sequence[tuple[Encoded, int]]) -> Batch:
        """Images under noise that goes by the image and the number of the look."""
        noise = [self._noise(f"{f.digest} {k}", f.latents) for f, k in looks]
        places = torch.tensor([(k + 0.5) / self._looks for _, k in looks])
        return self._with_noise(self.collate([f for f, _ in looks]), torch.stack(noise), places)

    def _noise(self, name: str, like: Tensor) -> Tensor:
        return self._draw(name, like.numel(), normal=True).view_as(like)

    def _sample(self, model: nn.Module, like: Sequence[Encoded], batch_size: int) -> float:
        """Make samples with the conditions of `like`; their distance to the folder's images."""
        known = [feature.conditions for feature in like]

        def start(i: int) -> Tensor:
            return self._noise(f"sample {i}", like[0].latents)

        self._samples = self._bound()[1].images(model, known, start, batch_size)
        target = torch.stack([x.features for x in self._encoded.values()])
        return frechet(pooled(self._samples), target)

    def picture(self) -> Image | None:
        return None if self._samples is None else grid(self._samples)

    def _bound(self) -> tuple[Noising, Sampler]:
        if self._noising is None or self._sampler is None:
            raise BadInput(f"task {self.name!r} has no model yet; call prepare(loaded) first")
        return self._noising, self._sampler


def diffusion(
    data: str,
    draw: Draw,
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
        draw: numbers for evaluations, by name; a run gives its keyed noise.
        looks: times at which an evaluation looks at every image.
        samples: images that an evaluation makes; 0 for none.
        train_size: (and dev_size, test_size) in images.
    """
    root = Path(data).expanduser()
    tables = Sizes(train_size, dev_size, test_size, seed).apply(
        image_tables(root), group=lambda row: row["digest"]
    )
    return Diffusion(
        tables, root, draw, Sampling(samples, sample_steps, guidance), resolution=resolution,
        timesteps=timesteps, weighting=weighting, looks=looks,
    )  # fmt: skip
