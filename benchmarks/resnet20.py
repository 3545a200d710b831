"""ResNet-20 for CIFAR-10 and its adaptation to lossy images, for `freezing.py`.

He et al. 2015 (arXiv 1512.03385), section 4.2, with parameter-free shortcuts (their option A).
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.models.cut import Trunk
from zotune.tasks.batch import Batch
from zotune.training import Objective, TrainConfig, train
from zotune.training import augmentation as augmentations
from zotune.training.freezing.channels import Channels
from zotune.training.freezing.schedule import depth_of

DATA = Path(os.environ.get("ZOTUNE_DATA", Path(__file__).parents[1] / "../shared/data"))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AUGMENT = "flip + shift(pixels=4)"
SHARE, BATCH = 0.67, 50


class Block(nn.Module):
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x))))))."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        side = self.more // 2
        short = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, side, side))
        return F.relu(out + short)


class ResNet20(nn.Module):
    """Logits (images, 10) of images (images, 3, 32, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        out: Tensor = self.linear(x.mean((2, 3)))
        return out


def pretrained() -> ResNet20:
    """91.8 % on CIFAR-10 as it came, 81.0 % on the lossy copies."""
    path = DATA / "cifar10_resnet" / "resnet20-12fca82f.th"
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    model = ResNet20()
    model.load_state_dict({name.removeprefix("module."): t for name, t in state.items()})
    return model.eval()


@cache
def rows(split: str, count: int) -> list[dict[str, Tensor]]:
    """The first images of a split, normalised as the network was trained."""
    from PIL import Image

    with np.load(DATA / "cifar10_jpeg" / "cifar10_jpeg.npz") as file:
        data, ends = file[f"{split}_jpeg"].tobytes(), file[f"{split}_off"][: count + 1]
        labels = torch.from_numpy(file[f"{split}_label"][:count].astype(np.int64))
    found = []
    for start, end, label in zip(ends, ends[1:], labels, strict=False):
        pixels = np.asarray(Image.open(io.BytesIO(data[start:end])).convert("RGB"), np.float32)
        image = (pixels / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
        found.append({"image": torch.from_numpy(image).permute(2, 0, 1), "label": label})
    return found


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")


def hit(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch["image"]).argmax(-1) == batch["label"]).float()


def adapt(
    given: argparse.Namespace,
    seed: int,
    cache: float | None = None,
    augment: str | None = AUGMENT,
    frozen: bool = True,
) -> dict[str, float]:
    """One run: accuracy on test images, seconds of training, compute.

    Compute is counted in multiply-adds of the convolutions, a forward with its backward three
    times, and what fills the cache; its unit is a forward of the whole network over one image.
    """
    train_rows, test_rows = rows("train", given.images), rows("test", given.test_images)
    task = Objective(loss, train_rows, test_rows, score=hit, metric="accuracy")
    steps = given.epochs * given.images // BATCH
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            output_dir=f"{folder}/run", seed=seed, method="adamw", learning_rate=3e-4,
            space="weights(pattern='layer3|linear')" if frozen else "weights", max_steps=steps,
            lr_scheduler_type="linear", per_device_train_batch_size=BATCH, augment=augment,
            freeze=f"{SHARE}@0" if frozen else None, report_to="none", save_steps=0,
            cache_dir=None if cache is None else f"{folder}/cache", show_progress=False,
            cache_similarity=0.6 if cache is None else cache, journal_sync=100,
        )  # fmt: skip
        result = train(config, model=pretrained(), task=task)
        filled = 0 if cache is None else passes(Path(folder) / "cache")
    below = share_below() if frozen else 0.0
    seen = steps * BATCH
    each = 3 * (1 - below) + (below if cache is None else 0.0)
    return {
        "accuracy": result.after, "before": float(result.before or 0.0),
        "seconds": result.train_seconds, "passes": filled,
        "compute": seen * each + filled * below * given.images,
    }  # fmt: skip


def passes(folder: Path) -> int:
    """How often the frozen part ran over the images to fill a cache."""
    import json

    (header,) = folder.glob("*/header.json")
    text = json.loads(header.read_text())["channels"]
    if text is None:
        return 1
    channels: Any = eval(text, {"Channels": Channels, **vars(augmentations)})  # our own repr
    return int(channels.passes)


def share_below() -> float:
    """The frozen part's share of the convolutions' multiply-adds."""
    model, image = pretrained(), torch.zeros(1, 3, 32, 32)
    work = dict[int, int]()

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        work[id(module)] = module.weight.numel() * output.shape[-1] * output.shape[-2]

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    trunk = Trunk.of(model, lambda: model(image))
    units = trunk.below(depth_of(SHARE, trunk.depth))
    inside = {id(m) for unit in units for m in unit.module.modules()}
    return sum(n for m, n in work.items() if m in inside) / sum(work.values())
