"""Small runs with frozen layers: a BERT whose rows have masks, a plain CNN, a small ResNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import toys
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.tasks.batch import Batch
from zotune.training.config import TrainConfig
from zotune.training.objective import Objective

LENGTH, LAYERS = 7, 3


def bert(layers: int = LAYERS) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=toys.VOCABULARY, hidden_size=16, num_hidden_layers=layers, num_labels=3,
        num_attention_heads=2, intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    with torch.random.fork_rng():
        return toys.fill_(BertForSequenceClassification(config))


def texts(count: int = 24, seed: int = 0, least: int = 2) -> list[dict[str, Tensor]]:
    """Rows of one width whose masks have different lengths, `least` or more."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, toys.VOCABULARY, (count, LENGTH), generator=generator)
    lengths = torch.randint(least, LENGTH + 1, (count, 1), generator=generator)
    mask = (torch.arange(LENGTH) < lengths).long()
    return [
        {"input_ids": i * m, "attention_mask": m, "label": (i * m).sum() % 3}
        for i, m in zip(ids, mask, strict=True)
    ]


def text_loss(model: nn.Module, batch: Batch) -> Tensor:
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return F.cross_entropy(out.logits.float(), batch["label"], reduction="none")


class Residual(nn.Module):
    """x + conv(relu(conv(x))), with a strided shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.relu(self.shortcut(x) + self.second(F.relu(self.norm(self.first(x)))))
        return out


class ResNet(nn.Module):
    """A stem, two stages of two blocks, a head: ResNet-20's shape, smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.stage1 = nn.Sequential(Residual(4, 4, 1), Residual(4, 4, 1))
        self.stage2 = nn.Sequential(Residual(4, 8, 2), Residual(8, 8, 1))
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        x = self.stage2(self.stage1(x))
        out: Tensor = self.linear(x.mean((2, 3)))
        return out


def cnn() -> nn.Module:
    """A plain row of layers."""
    with torch.random.fork_rng():
        return toys.fill_(
            nn.Sequential(
                nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 8, 3, 1, 1),
                nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
            )
        )  # fmt: skip


def resnet() -> nn.Module:
    with torch.random.fork_rng():
        return toys.fill_(ResNet())


def images(count: int = 24, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.rand(count, 3, 8, 8, generator=generator)
    return [{"pixels": x, "label": (x.sum() * 10).long() % 3} for x in pixels]


def image_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["pixels"]).float(), batch["label"], reduction="none")


MODELS = {"bert": bert, "even": bert, "cnn": cnn, "resnet": resnet}


def model(kind: str = "bert") -> nn.Module:
    return MODELS[kind]()


def task(kind: str = "bert", count: int = 24) -> Objective:
    if kind in ("bert", "even"):
        least = 2 if kind == "bert" else LENGTH
        return Objective(text_loss, texts(count, least=least), texts(8, 1))
    return Objective(image_loss, images(count), images(8, 1))


def config(out: Path, **options: Any) -> TrainConfig:
    given = {
        "output_dir": str(out), "max_steps": 16, "per_device_train_batch_size": 4,
        "method": "mezo(units='relative')", "learning_rate": 0.02, "space": "weights",
        "report_to": "none", "save_steps": 5, "logging_steps": 4, "journal_sync": 100,
        "show_progress": False, "freeze": "0.67@6",
    }  # fmt: skip
    return TrainConfig(**{**given, **options})
