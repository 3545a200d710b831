"""Losses, probes, evaluation, bad input. Run: pytest tests/tasks/test_diffusion.py"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import diffusers
import pipelines
import pytest
import torch

from zotune import tasks
from zotune.core.evaluator import TorchEvaluator
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.core.probe import Probe
from zotune.core.spaces import get
from zotune.errors import BadInput, DataError
from zotune.models import Loaded, load
from zotune.tasks.diffusion import Diffusion
from zotune.training.batches import Batches, drawing

CAPTIONS = ("a drawing of one", "a drawing of two")
DRAW = drawing(Key(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pipelines and their images."""
    root = tmp_path_factory.mktemp("diffusion")
    pipelines.ddpm(root / "ddpm", prediction_type="v_prediction")
    pipelines.images(root / "grey")
    pipelines.sd3(root / "sd3")
    pipelines.images(root / "colour", size=16, mode="RGB", captions=CAPTIONS)
    return root


DATA = {"ddpm": "grey", "sd3": "colour"}


def opened(folder: Path, kind: str, scheme: str | None = None, **options: Any) -> Any:
    task = tasks.get("diffusion", data=str(folder / DATA[kind]), draw=DRAW, **options)
    loaded = load(folder / kind, scheme=scheme, compute_dtype="float32")
    return task, task.prepare(loaded)


def first_batch(task: Diffusion, size: int = 4, seed: int = 0) -> Any:
    return Batches(task, task.split("train"), size, seed)[0]


def test_the_loss_of_v_prediction_is_diffusers_in_float64(folder: Path) -> None:
    task, model = opened(folder, "ddpm")
    batch = first_batch(task)
    scheduler = diffusers.DDPMScheduler.from_pretrained(folder / "ddpm" / "scheduler")
    features = [task.encode(row) for row in task.split("train")]
    x = torch.stack([f.latents for f in features]).double()
    t = batch["timestep"]
    noise = drawing(Key(0))("noise", 4 * 64, normal=True).double().view(4, 1, 8, 8)
    with torch.no_grad():
        found, weight = task.losses(model, batch)
        deep = model.double()
        matches = []
        for clean in x:  # which image it is, the batch does not say
            clean = clean.expand(4, 1, 8, 8)
            made = deep(scheduler.add_noise(clean, noise, t), t).sample
            matches.append(
                (made - scheduler.get_velocity(clean, noise, t)).square().mean((1, 2, 3))
            )
    best = (torch.stack(matches) - found).abs().min(0).values
    assert weight.tolist() == [1.0] * 4
    assert float(best.max()) < 1e-5


def test_the_loss_of_flow_matching_is_the_reference_trainings(folder: Path) -> None:
    task, model = opened(folder, "sd3", weighting="cosmap")
    batch = first_batch(task)
    sigma = (batch["timestep"] / 1000).view(-1, 1, 1, 1)
    with torch.no_grad():
        found, _ = task.losses(model, batch)
        velocity = model(
            batch["noisy"], encoder_hidden_states=batch["encoder_hidden_states"],
            pooled_projections=batch["pooled_projections"], timestep=batch["timestep"],
        ).sample  # fmt: skip
    clean = batch["noisy"] - sigma * batch["target"]
    noise = clean + batch["target"]
    weight = diffusers.training_utils.compute_loss_weighting_for_sd3("cosmap", sigma)
    wanted = (weight * (velocity - (noise - clean)) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    known = torch.stack([task.encode(row).latents for row in task.split("train")])
    distance = (clean.unsqueeze(1) - known).abs().flatten(2).amax(2).min(1).values
    assert distance.max() < 1e-4  # what is under the noise are the images of the folder


@pytest.mark.parametrize("kind", ["ddpm", "sd3"])
@pytest.mark.parametrize(
    ("space", "scheme"), [("scales", "int4-g4"), ("lora", None), ("norms", None), ("weights", None)]
)
def test_stacked_probes_equal_single_ones(
    folder: Path, kind: str, space: str, scheme: str | None
) -> None:
    task, model = opened(folder, kind, scheme)
    built = get(space).build(model)
    probes = [Probe(Key(0, step=1), step) for step in (0.05, -0.05)]
    batch = first_batch(task)
    alone = TorchEvaluator(model, built, task.losses, stack=1)
    together = TorchEvaluator(model, built, task.losses)
    wanted = alone.losses(probes, batch, Gaussian()).per_example
    found = together.losses(probes, batch, Gaussian()).per_example
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-4
    assert not together.check(batch, probes, Gaussian())
    assert together.stack is None


@pytest.mark.parametrize("kind", ["ddpm", "sd3"])
def test_noise_is_a_function_of_seed_and_step(folder: Path, kind: str) -> None:
    task, _ = opened(folder, kind)
    batches = Batches(task, task.split("train"), 4, 7)
    again = Batches(opened(folder, kind)[0], task.split("train"), 4, 7)
    for step in (0, 5):
        one, other = batches[step].tensors, again[step].tensors
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(batches[0]["noisy"], batches[5]["noisy"])
    assert not torch.equal(batches[0]["noisy"], first_batch(task, seed=8)["noisy"])


@pytest.mark.parametrize("kind", ["ddpm", "sd3"])
def test_an_evaluation_depends_on_nothing_but_model_and_images(folder: Path, kind: str) -> None:
    task, model = opened(folder, kind, samples=4, sample_steps=2)
    rows = list(task.split("train"))
    found = task.evaluate(model, rows, 64)
    assert set(found) == {"loss", "frechet"}
    other = task.evaluate(model, rows[::-1], 3)
    assert other["loss"] == pytest.approx(found["loss"], rel=1e-5)
    if kind == "ddpm":  # captions go to the samples in the order of the rows
        assert other["frechet"] == pytest.approx(found["frechet"], rel=1e-2)
    assert task.picture().size[0] > 16
    quiet, model = opened(folder, kind, samples=0)
    assert set(quiet.evaluate(model, rows, 64)) == {"loss"}
    assert quiet.picture() is None


def test_more_looks_see_more_times(folder: Path) -> None:
    task, _ = opened(folder, "ddpm", looks=2, samples=0)
    batch = task._fixed([(task.encode(task.split("dev")[0]), k) for k in range(2)])
    assert batch["timestep"].tolist() == [25, 75]
    with pytest.raises(BadInput, match="looks=0"):
        opened(folder, "ddpm", looks=0)


def test_copies_of_a_held_out_image_are_held_out_too(tmp_path: Path) -> None:
    pipelines.images(tmp_path, 20)
    for path in list(tmp_path.glob("*.png")):
        path.with_stem(f"{path.stem}-copy").write_bytes(path.read_bytes())
    task = tasks.get("diffusion", data=str(tmp_path), draw=DRAW)
    digests = [{row["digest"] for row in task.split(name)} for name in ("train", "dev")]
    assert not digests[0] & digests[1]


def test_unreadable_images_are_named_left_out_and_counted(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipelines.images(tmp_path / "train", 6)
    pipelines.images(tmp_path / "test", 3)
    (tmp_path / "train" / "002.png").write_bytes(b"no image")
    task = tasks.get("diffusion", data=str(tmp_path), draw=DRAW, dev_size=1)
    with caplog.at_level(logging.WARNING):
        task.prepare(load(folder / "ddpm"))
    assert "002.png is not a readable image" in caplog.text
    assert "1 of " in caplog.text
    assert sum(len(task.split(name)) for name in task.splits) == 8
    for path in (tmp_path / "test").iterdir():
        path.write_bytes(b"")
    task = tasks.get("diffusion", data=str(tmp_path), draw=DRAW, dev_size=1)
    with pytest.raises(DataError, match="none of the 3 images can be read: test/000"):
        task.prepare(load(folder / "ddpm"))


def test_images_without_captions_are_named_unless_none_are_read(
    folder: Path, tmp_path: Path
) -> None:
    pipelines.images(tmp_path / "bare", 8, 16, "RGB")
    (tmp_path / "bare" / "003.txt").write_text("a drawing of two")
    task = tasks.get("diffusion", data=str(tmp_path / "bare"), draw=DRAW)
    with pytest.raises(DataError, match=r"7 images in .* have no caption \(.*\.png.*metadata"):
        task.prepare(load(folder / "sd3"))
    task.prepare(load(folder / "ddpm"))  # reads no captions, and makes the images grey


def test_a_model_that_makes_no_images_is_refused(folder: Path) -> None:
    task = tasks.get("diffusion", data=str(folder / "grey"), draw=DRAW)
    causal = Loaded(torch.nn.Linear(1, 1), None, "causal", folder, None, "float")
    with pytest.raises(BadInput, match=r"needs the folder of a diffusers pipeline, got .*causal"):
        task.prepare(causal)
    with pytest.raises(BadInput, match="has no model yet"):
        task.encode(task.split("train")[0])
