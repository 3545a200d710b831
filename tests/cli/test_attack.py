"""`zotune attack` end to end. Run: pytest tests/cli/test_attack.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("sklearn", reason="task digits needs scikit-learn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A tiny ResNet for 8 x 8 grey pictures whose untrained classes follow from its weights."""
    from zotune.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CifarResNetConfig(depth=8, width=4, num_channels=1)
        model = CifarResNetForImageClassification(config)
    path: Path = tmp_path_factory.mktemp("resnet")
    model.save_pretrained(path)
    return path


FLAGS = ["--task", "digits", "--examples", 12, "--queries", 30, "--budget", "64/255"]


@pytest.mark.parametrize("more", [
    ["--method", "zoqo"], ["--method", "zo-sgd", "--norm", "l2", "--scheme", "int8-channel-a8"],
    ["--method", "zo-sign(queries=2)", "--targeted", "--pattern", "tiles(side=4)"],
], ids=["zoqo", "quantized", "targeted"])  # fmt: skip
def test_an_attack_leaves_numbers_pictures_and_images(
    zotune: Any, folder: Path, tmp_path: Path, more: list[str]
) -> None:
    out = tmp_path / "attack"
    said = zotune("attack", "--model", folder, *FLAGS, *more, "--out", out, "--json")
    assert said.code == 0, said.err
    kept = json.loads((out / "result.json").read_text())
    assert said.json == {"out": str(out), **kept}
    assert kept["images"] == 12
    assert kept["targeted"] == ("--targeted" in more)
    images = load_file(out / "images.safetensors")
    assert images["images"].shape == (12, 1, 8, 8)
    moved = images["adversarial"].double() - images["images"].double()
    size = moved.flatten(1).norm(dim=1) if "l2" in more else moved.abs().flatten(1).amax(1)
    assert float(size.max()) <= 64
    assert int(images["queries"].max()) <= 30
    assert (out / "pictures.png").stat().st_size > 1000


@pytest.mark.parametrize(("words", "told"), [
    (["--task", "digits"], "no output folder"),
    (["--out", "new", "--task", "tickets"], "shows no images"),
    (["--out", "new", "--budget", "0"], "holds no image but the original"),
    (["--out", "new", "--queries", "3"], "want at least 4"),
    (["--out", "new", "--method", "lora"], "use zoqo"),
    (["--out", "new", "--norm", "l7"], "norm"),
    (["--out", "new", "--split", "other"], "'other'"),
])  # fmt: skip
def test_bad_attacks(
    zotune: Any, folder: Path, tmp_path: Path, monkeypatch: Any, words: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZOTUNE_DATA", str(tmp_path))
    assert told in zotune("attack", "--model", folder, *words).error
    assert not (tmp_path / "new").exists()


def test_a_folder_that_holds_something_is_left_alone(
    zotune: Any, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("mine")
    assert "is not empty" in zotune("attack", "--model", folder, *FLAGS, "--out", tmp_path).error
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
