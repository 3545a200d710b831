"""Runs on pictures from start to end. Run: pytest tests/training/test_vision.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from zotune.errors import BadInput
from zotune.models import fingerprint, load, write
from zotune.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from zotune.training import EvalConfig, TrainConfig, evaluate, replay, train

TASK = "digits(train_size=60, dev_size=20, test_size=20, size=8)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny grey ResNet for digits, with weights that carry pictures to its head."""
    config = CifarResNetConfig(depth=8, width=4, num_channels=1)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        model = CifarResNetForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                width = parameter[0].numel() ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * width)
    return write(model, tmp_path_factory.mktemp("models") / "float")


def config(folder: Path, out: Path, **options: Any) -> TrainConfig:
    given = {
        "model_name_or_path": str(folder), "task": TASK, "output_dir": str(out), "max_steps": 6,
        "per_device_train_batch_size": 4, "report_to": "none", "show_progress": False,
        "save_steps": 3, "scheme": "int8-channel", "augment": "flip + shift(pixels=1)",
    }  # fmt: skip
    return TrainConfig(**{**given, **options})


RUNS: list[dict[str, Any]] = [
    {"method": "auto"},
    {"method": "auto", "space": "norms + head(basis='classes')"},
    {"method": "auto", "space": "norms(basis='shift') + head(basis='classes')"},
    {"method": "mezo", "space": "norms(basis='shift', share=1.0, lr=0.0)", "max_steps": 1},
    {"method": "qzo", "space": "scales", "scheme": "int4-channel"},
    {"method": "zoqo", "space": "codes", "scheme": "int8-channel-a8"},
    {"method": "mezo", "space": "weights", "scheme": None},
]


@pytest.mark.parametrize("options", RUNS, ids=lambda o: f"{o['method']} {o.get('space')}")
def test_what_a_run_measured_is_what_it_saved_and_what_its_journal_replays(
    folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    result = train(config(folder, tmp_path / "run", **options))
    model = str(tmp_path / "run/model")
    assert evaluate(EvalConfig(model, TASK))["value"] == result.after
    replay(tmp_path / "run", folder, tmp_path / "again")
    assert fingerprint(load(tmp_path / "again").model) == fingerprint(load(model).model)


@pytest.mark.parametrize("space", ["norms", "norms(basis='shift') + head(exact=True)"])
def test_a_run_that_stops_goes_on_with_the_same_pictures(
    folder: Path, tmp_path: Path, space: str
) -> None:
    options = {
        "method": "mezo(units='relative', eps=0.1)", "learning_rate": 0.1, "space": space,
        "save_steps": 2,
    }  # fmt: skip
    straight = train(config(folder, tmp_path / "straight", **options))

    class Stop(Exception):
        pass

    class Stopping(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                raise Stop

    with pytest.raises(Stop):
        train(config(folder, tmp_path / "cut", **options), callbacks=[Stopping])
    resumed = train(config(folder, tmp_path / "cut", resume_from_checkpoint=True, **options))
    assert resumed.after == straight.after
    prints = [fingerprint(load(tmp_path / run / "model").model) for run in ("straight", "cut")]
    assert prints[0] == prints[1]


def test_a_model_given_as_an_object_is_quantized_as_one_given_by_name(
    folder: Path, tmp_path: Path
) -> None:
    """Its head stays float, so that a run can go on from the folder."""
    for name, given in (("named", None), ("given", load(folder))):
        train(config(folder, tmp_path / name, max_steps=1), model=given)
    prints = [fingerprint(load(tmp_path / n / "model").model) for n in ("named", "given")]
    assert prints[0] == prints[1]


def test_auto_tunes_the_head_on_the_directions_between_classes(
    folder: Path, tmp_path: Path
) -> None:
    result = train(config(folder, tmp_path / "run", max_steps=40))
    assert result.after > result.before  # type: ignore[operator]


@pytest.mark.parametrize("space", ["adapter", "lora"])
def test_adapters_are_refused_where_no_linear_layer_takes_them(
    folder: Path, tmp_path: Path, space: str
) -> None:
    with pytest.raises(BadInput, match="adapters go on linear layers"):
        train(config(folder, tmp_path / "run", space=space))
