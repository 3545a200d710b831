"""What must be the same for cached features to be used again."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from zotune.models import fingerprint
from zotune.training.batches import Batches
from zotune.training.config import TrainConfig
from zotune.training.freezing.cached import Border, digest_of_inputs
from zotune.training.freezing.channels import Channels
from zotune.training.freezing.codec import Codec


def identity_of(
    border: Border,
    batches: Batches,
    codec: Codec,
    dtype: torch.dtype,
    tokens: bool,
    channels: Channels | None,
    config: TrainConfig,
) -> dict[str, Any]:
    """The header of a cache: frozen part, freeze point, data, length, codec, arithmetic."""
    below = border.trunk.below(border.depth)
    whole = hashlib.sha256()
    for unit in below:
        whole.update(f"{unit.path}\0{fingerprint(unit.module)}\0".encode())
    return {
        "model": whole.hexdigest(),
        "layer": below[-1].path,
        "depth": border.depth,
        "task": border.task.name,
        "data": digest_of_inputs(batches),
        "examples": len(batches.examples),
        "batch_size": batches.size,
        "max_length": config.max_length,
        "codec": repr(codec),
        "layout": "tokens" if tokens else "rows",
        "channels": None if channels is None else repr(channels),
        "dtype": str(dtype).removeprefix("torch."),
        "compute_dtype": config.compute_dtype,
        "device": torch.device(config.device).type,
    }
