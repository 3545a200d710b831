"""Folders of the CIFAR-10 ResNets from their published weights.

    python benchmarks/cifar_resnet.py 20 OUT

Reads ZOTUNE_DATA/cifar10_resnet/resnet20-*.th with torch.load(weights_only=True), which runs
nothing, and writes config.json, model.safetensors and preprocessor_config.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.nn import functional as F

from zotune.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from zotune.tasks.picture_sets import CIFAR10

DATA = Path(os.environ.get("ZOTUNE_DATA", Path(__file__).parents[1] / "../shared/data"))
NORMALISED = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def convert(depth: int, folder: Path, head_states: str = "last", head_cells: int = 1) -> Path:
    """Write the ResNet of this depth into `folder`.

    With head_states="all" the classifier may read every state, with head_cells=2 in quarters, and
    gives what it gave before.
    """
    (file,) = (DATA / "cifar10_resnet").glob(f"resnet{depth}-*.th")
    stored = torch.load(file, weights_only=True, map_location="cpu")["state_dict"]
    config = CifarResNetConfig(
        depth, head_states=head_states, head_cells=head_cells, id2label=dict(enumerate(CIFAR10))
    )
    config.label2id = {name: i for i, name in enumerate(CIFAR10)}
    with torch.random.fork_rng():
        model = CifarResNetForImageClassification(config)
    named = {name.removeprefix("module."): tensor for name, tensor in stored.items()}
    named = {name.replace("linear.", "classifier."): tensor for name, tensor in named.items()}
    cells = head_cells**2
    read = named["classifier.weight"].repeat_interleave(cells, 1) / cells
    named["classifier.weight"] = F.pad(read, (config.head_inputs - read.shape[1], 0))
    found = model.load_state_dict(named, strict=False)  # without num_batches_tracked
    assert not found.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in found.missing_keys)
    model.eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(NORMALISED, indent=2) + "\n")
    return folder


if __name__ == "__main__":
    print(convert(int(sys.argv[1]), Path(sys.argv[2])))
