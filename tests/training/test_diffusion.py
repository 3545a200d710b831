"""Runs on diffusion models from end to end. Run: pytest tests/training/test_diffusion.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from transformers import TrainerCallback

from zotune.cli import main
from zotune.models import fingerprint, load
from zotune.training import EvalConfig, TrainConfig, evaluate, load_model, replay, train

QUICK = {"samples": 4, "sample_steps": 2, "looks": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    pipelines.ddpm(root / "ddpm")
    pipelines.images(root / "grey")
    pipelines.sd3(root / "sd3")
    pipelines.images(root / "colour", 6, 16, "RGB", ["a drawing of one", "a drawing of two"])
    return root


def config(folder: Path, out: Path, kind: str = "ddpm", **options: Any) -> TrainConfig:
    given = {
        "model_name_or_path": str(folder / kind), "task": "diffusion", "output_dir": str(out),
        "data": str(folder / ("grey" if kind == "ddpm" else "colour")), "task_options": QUICK,
        "method": "mezo", "space": "norms", "max_steps": 6, "per_device_train_batch_size": 3,
        "save_steps": 2, "report_to": "none", "show_progress": False, "compute_dtype": "float32",
    }  # fmt: skip
    return TrainConfig(**{**given, **options})


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ddpm", {"method": "qzo", "space": "scales", "scheme": "int4-g4"}),
        ("sd3", {"method": "mezo", "space": "lora(rank=2)"}),
    ],
    ids=lambda x: x if isinstance(x, str) else x["space"],
)
def test_a_run_that_stops_and_goes_on_ends_bit_for_bit_where_it_would_have(
    folder: Path, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    whole = config(folder, tmp_path / "whole", kind, **options)
    result = train(whole)

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            control.should_training_stop = state.global_step == 3

    train(config(folder, tmp_path / "broken", kind, **options), callbacks=[Stop()])
    again = config(folder, tmp_path / "broken", kind, **options, resume_from_checkpoint=True)
    resumed = train(again)
    assert resumed.numbers == result.numbers
    one, other = (load_model(tmp_path / name / "model").model for name in ("whole", "broken"))
    assert fingerprint(one) == fingerprint(other)
    assert fingerprint(one) != fingerprint(load(folder / kind).model)


def test_what_is_evaluated_in_memory_is_what_is_saved_and_replayed(
    folder: Path, tmp_path: Path
) -> None:
    given = config(folder, tmp_path / "run", method="qzo", space="scales", scheme="int4-g4")
    result = train(given)
    asked = {"task": "diffusion", "data": str(folder / "grey"), "task_options": QUICK,
             "compute_dtype": "float32"}  # fmt: skip
    found = evaluate(EvalConfig(model_name_or_path=str(tmp_path / "run" / "model"), **asked))
    assert found["numbers"] == result.numbers["after"]
    replay(tmp_path / "run", folder / "ddpm", tmp_path / "replayed")
    one, other = (load(tmp_path / n).model for n in ("run/model", "replayed"))
    assert fingerprint(one) == fingerprint(other)


def test_the_command_line_leaves_pictures_and_a_pipeline(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    code = main([
        "train", "--task", "diffusion(samples=4, sample_steps=2)", "--model", str(folder / "sd3"),
        "--data", str(folder / "colour"), "--method", "qzo", "--scheme", "int4-g8", "--steps", "2",
        "--batch-size", "2", "--out", str(out), "--report-to", "none", "--json",
    ])  # fmt: skip
    assert code == 0, capsys.readouterr()
    for when in ("before", "after"):
        assert Image.open(out / f"samples-{when}.png").size == (36, 36)
    assert load(out / "model").format == "zotune"
    assert main(["quantize", "--model", str(folder / "ddpm"), "--scheme", "int4-g4", "--out",
                 str(tmp_path / "int4")]) == 0  # fmt: skip
    assert load(tmp_path / "int4").format == "zotune"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DDPM that backprop has taught scikit-learn's digits, and the digits inverted."""
    root = tmp_path_factory.mktemp("digits")
    pixels = np.round(load_digits().images * (255 / 16)).astype(np.uint8)
    for name, images in (("digits", pixels[:400]), ("inverted", 255 - pixels[400:500])):
        (root / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(root / name / f"{i:03d}.png")
    pipelines.ddpm(root / "random", pipelines.unet(block_out_channels=(16, 16)))
    given = config(
        root, root / "run", data=str(root / "digits"), model_name_or_path=str(root / "random"),
        method="adamw(lr=3e-3)", space="weights", max_steps=50, per_device_train_batch_size=16,
        task_options={"samples": 0}, save_steps=0, max_eval_samples=8,
    )  # fmt: skip
    result = train(given)
    assert result.after < 0.8 < 2 < result.before  # type: ignore[operator]
    (root / "run" / "model").rename(root / "ddpm")
    return root


def test_forward_passes_alone_adapt_a_quantized_ddpm_to_other_images(
    trained: Path, tmp_path: Path
) -> None:
    given = config(
        trained, tmp_path / "run", data=str(trained / "inverted"), scheme="int4-g4",
        method="mezo(lr=0.5, eps=0.05, units='relative', directions='example')",
        space="norms+biases", max_steps=25,
        per_device_train_batch_size=16, max_eval_samples=8,
        task_options={"samples": 32, "sample_steps": 5}, save_steps=0,
    )  # fmt: skip
    result = train(given)
    before, after = result.numbers["before"], result.numbers["after"]
    assert after["loss"] < 0.98 * before["loss"]
    assert after["frechet"] < before["frechet"]
