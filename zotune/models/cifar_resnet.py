"""The ResNets of CIFAR-10: 20, 32, 44, 56 and 110 layers (He et al. 2015, arXiv 1512.03385).

A transformers model, so that its folders (config.json, safetensors) are read and written like any
other. Importing this module makes "cifar-resnet" known to transformers' Auto classes.
"""

from __future__ import annotations

from typing import Any

import torch
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


class CifarResNetConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """Sizes: depth = 6 n + 2 layers in three stages of n blocks.

    `head_states` "last" is the paper's; with "all" the classifier reads the mean of every state,
    as an encoder's head may (`Head(layers="all")`). `head_cells` 2 gives it the means of the four
    quarters of a state instead of one mean.

    >>> CifarResNetConfig(depth=20).blocks
    3
    """

    model_type = "cifar-resnet"

    def __init__(
        self,
        depth: int = 20,
        width: int = 16,
        num_channels: int = 3,
        head_states: str = "last",
        head_cells: int = 1,
        **options: Any,
    ) -> None:
        if head_states not in ("last", "all"):
            raise BadInput(f"head_states={head_states!r}; want 'last' or 'all'")
        self.depth, self.width, self.num_channels = depth, width, num_channels
        if head_cells < 1:
            raise BadInput(f"head_cells={head_cells}; want at least 1 cell along either side")
        self.head_states, self.head_cells = head_states, head_cells
        labels = {} if "id2label" in options else {"num_labels": 10}
        super().__init__(**{**labels, **options})

    @property
    def blocks(self) -> int:
        """Blocks per stage, n.

        Raises:
            BadInput: if depth is not 6 n + 2.
        """
        if self.depth < 8 or self.depth % 6 != 2:
            raise BadInput(f"depth={self.depth} is not 6 n + 2; use 20, 32, 44, 56 or 110")
        return self.depth // 6

    @property
    def head_inputs(self) -> int:
        """Numbers that the classifier reads: a mean per cell of each channel of the states."""
        every = self.width + self.blocks * 7 * self.width
        return self.head_cells**2 * (every if self.head_states == "all" else 4 * self.width)


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


class CifarResNetForImageClassification(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Logits of images (batch, channels, 32, 32); `classifier` reads means of states.

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
        self.every_state, self.cells = config.head_states == "all", config.head_cells
        self.classifier = nn.Linear(config.head_inputs, config.num_labels or 0)
        self.post_init()  # type: ignore[no-untyped-call]

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
        read = states if self.every_state else states[-1:]
        means = [F.adaptive_avg_pool2d(state, self.cells).flatten(1) for state in read]
        return ImageClassifierOutputWithNoAttention(
            logits=self.classifier(torch.cat(means, dim=1)),
            hidden_states=tuple(states) if output_hidden_states else None,
        )


def _stage(channels: int, outputs: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(*(Block(outputs if k else channels, outputs) for k in range(blocks)))


AutoConfig.register("cifar-resnet", CifarResNetConfig)
AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification)
