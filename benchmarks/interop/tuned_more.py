"""As tuned.py, for the formats whose libraries share an environment with transformers alone.

    export PYTHONPATH=.
    python benchmarks/interop/tuned_more.py bnb ao aqlm     # with bitsandbytes, torchao, aqlm
    ZOTUNE_PYTHON=.venv/bin/python python benchmarks/interop/tuned_more.py hqq

HQQ wants transformers 4.57 (hqq_golden.py), which zotune does not run with; ZOTUNE_PYTHON is the
one to train with. Each call replaces its own rows of tuned_more.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tiny
import torch
from torch.nn.functional import cross_entropy

TEXT = "The cat sat on the mat, and then it sat on day {k}.\n\n"
LIBRARIES = {"bnb": "bitsandbytes", "ao": "torchao", "aqlm": "aqlm", "hqq": "hqq"}
RECORD = Path(__file__).with_suffix(".json")


def main(kinds: list[str]) -> None:
    rows = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for folder in sorted(p for p in tiny.GOLDEN.iterdir() if p.is_dir()):
        kind = folder.name.partition("-")[0]
        if kind not in kinds:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            row = compare(folder, LIBRARIES[kind], Path(scratch))
        packages = ("torch", "transformers", LIBRARIES[kind])
        rows[folder.name] = {**row, "versions": {p: version(p) for p in packages}}
        print(folder.name, rows[folder.name], flush=True)
    RECORD.write_text(json.dumps(rows, indent=2, sort_keys=True) + "\n")


def compare(folder: Path, library: str, scratch: Path) -> dict[str, Any]:
    """Loss before and after 200 steps, and the same by the library."""
    python = os.environ.get("ZOTUNE_PYTHON", sys.executable)
    subprocess.run([python, __file__, "tune", folder, scratch], check=True)
    row: dict[str, Any] = json.loads((scratch / "row.json").read_text())
    theirs = import_module(f"{library}_golden").library(scratch / "run" / "model")
    return {**row, "by_the_library": loss(theirs)}


def tune(folder: Path, scratch: Path) -> None:
    """Train into scratch/run, and note the losses before and after."""
    from transformers import AutoModelForCausalLM

    from zotune.quant import formats
    from zotune.training import TrainConfig, train

    text = scratch / "text.txt"
    text.write_text("".join(TEXT.format(k=k) for k in range(40)))
    config = TrainConfig(
        model_name_or_path=str(folder), output_dir=str(scratch / "run"), space="scales",
        method="qzo(lr=0.01)", max_steps=200, per_device_train_batch_size=8,
        task="lm(dev_size=6)", data=str(text), max_length=48, dtype="float32",
        report_to="none", show_progress=False,
    )  # fmt: skip
    train(config)
    places = {"before": folder, "after": scratch / "run" / "model"}
    row = {
        key: loss(formats.read(place, AutoModelForCausalLM, dtype=torch.float32))
        for key, place in places.items()
    }
    (scratch / "row.json").write_text(json.dumps(row))


def loss(model: Any) -> float:
    """Mean loss of one text's characters."""
    ids = torch.tensor([[ord(c) - 32 for c in TEXT.format(k=3).strip()]])
    with torch.no_grad():
        logits = model(ids).logits.float()
    return float(cross_entropy(logits[0, :-1], ids[0, 1:]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["tune"]:
        tune(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main(sys.argv[1:])
