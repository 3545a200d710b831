"""The ResNets of CIFAR-10: 20, 32, 44, 56 and 110 layers (He et al. 2015, arXiv 1512.03385).

A transformers model, so that its folders (config.json, safetensors) are read and written like any
other. Importing this module makes "cifar-resnet" known to transformers' Auto classes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from zotune.errors import BadInput


class CifarResNetConfig(PretrainedConfig):
    """Sizes: depth = 6 n + 2 layers in three stages of n blocks.

    >>> CifarResNetConfig(depth=20).blocks
    3
    """

    model_type = "cifar-resnet"

    def __init__(
        self, depth: int = 20, width: int = 16, num_channels: int = 3, **options: Any
    ) -> None:
        self.depth, self.width, self.num_channels = depth, width, num_channels
        super().__init__(**{"num_labels": 10, **options})

    @property
    def blocks(self) -> int:
        """Blocks per stage, n.

        Raises:
            BadInput: if depth is not 6 n + 2.
        """
        if self.depth < 8 or self.depth % 6 != 2:
            raise BadInput(f"depth={self.depth} is not 6 n + 2; use 20, 32, 44, 56 or 110")
        return self.depth // 6


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut without parameters: every other pixel, channels
    filled up with zeros (the paper's option A)."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.extra = (1 if channels == outputs else 2), outputs - channels
        self.conv1 = nn.Conv2d(channels, outputs, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, outputs, height / stride, width / stride)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            before = self.extra // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, self.extra - before))
        return F.relu(out + x)


class CifarResNetForImageClassification(PreTrainedModel):
    """Logits of images (batch, channels, 32, 32); `classifier` reads the last stage's means.

    >>> import torch
    >>> model = CifarResNetForImageClassification(CifarResNetConfig(depth=8, width=4))
    >>> model(torch.zeros(2, 3, 32, 32)).logits.shape
    torch.Size([2, 10])
    """

    config_class = CifarResNetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(config)
        width, blocks = config.width, config.blocks
        self.conv1 = nn.Conv2d(config.num_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks)
        self.layer2 = _stage(width, 2 * width, blocks)
        self.layer3 = _stage(2 * width, 4 * width, blocks)
        self.classifier = nn.Linear(4 * width, config.num_labels)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool = False, **options: Any
    ) -> ImageClassifierOutputWithNoAttention:
        """Logits, and the state behind the first layer and each block where they are asked for."""
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        states = [x]
        for stage in (self.layer1, self.layer2, self.layer3):
            for block in stage:
                x = block(x)
                states.append(x)
        return ImageClassifierOutputWithNoAttention(
            logits=self.classifier(x.mean((2, 3))),
            hidden_states=tuple(states) if output_hidden_states else None,
        )


def _stage(channels: int, outputs: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(*(Block(outputs if k else channels, outputs) for k in range(blocks)))


AutoConfig.register("cifar-resnet", CifarResNetConfig)
AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification)
