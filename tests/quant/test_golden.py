"""Checkpoints made by other libraries: read, measured, tuned, given back.

The folders in golden/ and what their own library computes with them come from benchmarks/interop/.
Run: pytest tests/quant/test_golden.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from zotune.cli import main
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.core.probe import Probe
from zotune.core.sites import View, probing, sites_of
from zotune.core.spaces import SPACES, get
from zotune.errors import BadInput
from zotune.models import fingerprint
from zotune.quant import QuantLinear, formats
from zotune.quant.formats.shards import entries, raw_bytes
from zotune.training import EvalConfig, TrainConfig, evaluate, replay, train

GOLDEN = Path(__file__).parent / "golden"
# Those of ONNX have tests of their own: their tensors lie in other files (test_onnx.py).
FOLDERS = sorted(p for p in GOLDEN.iterdir() if p.is_dir() and not p.name.startswith("onnx"))
TUNED = [(f, s) for f in FOLDERS for s in formats.formats()[formats.detect(f)].tunable]
golden = pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)


def read(folder: Path, dtype: torch.dtype | None = torch.float32) -> nn.Module:
    return formats.read(folder, AutoModelForCausalLM, dtype=dtype)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def changed(one: Path, other: Path) -> set[str]:
    """Names of the tensors whose bytes differ; dtypes and shapes never do."""
    a, b = entries(one), entries(other)
    assert [(n, e.dtype, e.shape, e.start) for n, e in a.items()] == [
        (n, e.dtype, e.shape, e.start) for n, e in b.items()
    ]
    raw = {n: (raw_bytes(a[n].read()), raw_bytes(b[n].read())) for n in a}
    return {n for n, (x, y) in raw.items() if not torch.equal(x, y)}


def test_every_format_of_other_programs_has_a_checkpoint() -> None:
    foreign = {n for n, f in formats.formats().items() if isinstance(f, formats.SourceFormat)}
    assert {formats.detect(folder) for folder in FOLDERS} == foreign


@golden
def test_logits_are_those_of_the_format_s_own_library(folder: Path) -> None:
    expected = load_file(folder.with_suffix(".expected"))
    with torch.no_grad():
        logits = read(folder)(expected["tokens"]).logits
    error = (logits - expected["logits"]).abs().max() / expected["logits"].abs().max()
    assert error < TOLERANCE.get(folder.name, 2e-5)


# What the library rounds otherwise: weights to bfloat16; activations by max|x| / 127.5, see below.
TOLERANCE = {"ct-nvfp4a16": 0.01, "ct-w8a8": 0.05, "bnb-int8": 0.05}
# What formats call their scales.
SCALES = ("scale", "absmax", "SCB")
# Powers of two as scales: a small step rounds back to where it started.
LR = {"ct-mxfp4a16": 0.5}


def test_int8_activations_differ_from_the_library_s_by_its_step_alone() -> None:
    folder = GOLDEN / "ct-w8a8"
    expected, model = load_file(folder.with_suffix(".expected")), read(folder)

    def as_the_library_does(layer: QuantLinear, args: tuple[torch.Tensor], out: object) -> object:
        step = args[0].abs().amax(-1, keepdim=True) / 127.5
        x = (args[0] / step).round().clamp(-128, 127) * step
        return nn.functional.linear(x, layer.dequantize())

    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.register_forward_hook(as_the_library_does)
    with torch.no_grad():
        logits = model(expected["tokens"]).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-5)


@golden
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_an_untouched_model_is_given_back_byte_for_byte(
    folder: Path, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    model = read(folder, dtype)
    formats.round_to_storage_(model)
    assert files(formats.write(model, tmp_path / "out")) == files(folder)


@golden
def test_a_model_can_take_its_source_s_place(folder: Path, tmp_path: Path) -> None:
    here = Path(shutil.copytree(folder, tmp_path / "model"))
    model = read(here)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.scale.mul_(1.5)
    formats.round_to_storage_(model)
    formats.write(model, here)
    once = files(here)
    assert once != files(folder)
    assert files(formats.write(model, here)) == once
    assert fingerprint(read(here)) == fingerprint(model)


@pytest.mark.parametrize(("folder", "space"), TUNED, ids=lambda v: getattr(v, "name", v))
def test_what_a_format_says_can_be_tuned_is_kept_and_nothing_else_changes(
    folder: Path, space: str, tmp_path: Path
) -> None:
    model = read(folder)
    if not has(folder, space):
        with pytest.raises(BadInput, match=r"no quantized zero|no biases|are floats"):
            get(space).build(model)
        return  # another of the folders has them
    blocks = get(space).build(model)
    for block in blocks:
        block.bind_(1.0, 1.0, "relative")
        step = torch.ones(block.shape) * (1.0 if space in ("codes", "zeros") else 0.5)
        unit = block.unit if space not in ("codes", "zeros") else 1.0
        block.move_(0, block.rows, step * unit, Key(0))
    before = fingerprint(model)
    formats.round_to_storage_(model)
    out = formats.write(model, tmp_path / "out")
    assert fingerprint(read(out)) == fingerprint(model)
    if space == "codes" or (space == "zeros" and formats.detect(folder) != "hqq"):
        assert fingerprint(model) == before, "whole steps need no rounding"
    parts = {block.name.rpartition(".")[2] for block in blocks}
    own = {b.name.rpartition(".")[0] for b in blocks}
    moved = changed(folder, out)
    assert {layer for layer in own if any(n.startswith(f"{layer}.") for n in moved)} == own
    assert all(n.startswith(tuple(f"{layer}." for layer in own)) for n in moved)
    assert len(parts) >= 1
    names = {p for p, data in files(out).items() if data != files(folder)[p]}
    assert names <= {e.path.name for e in entries(folder).values()}


@pytest.mark.parametrize("space", ["scales", "zeros", "codes", "norms", "biases", "weights"])
def test_every_space_is_met_in_some_checkpoint(space: str) -> None:
    assert any(has(folder, space) for folder in FOLDERS)


def has(folder: Path, space: str) -> bool:
    try:
        return bool(get(space).build(read(folder)).blocks)
    except BadInput:
        return False


@golden
def test_what_a_format_does_not_keep_cannot_be_tuned(folder: Path) -> None:
    tunable = formats.formats()[formats.detect(folder)].tunable
    for space in {"scales", "zeros", "codes"} - set(tunable):
        with pytest.raises(BadInput):
            get(space).build(read(folder))
    assert set(tunable) <= set(SPACES)


@golden
def test_thirty_steps_move_the_scales_alone_and_the_file_measures_the_same(
    folder: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"It was a day like day {k}, and so on.\n\n" for k in range(40)))
    shared = {"task": "lm(dev_size=6)", "data": str(text), "max_length": 32, "dtype": "float32"}
    config = TrainConfig(
        model_name_or_path=str(folder), output_dir=str(tmp_path / "run"), space="scales",
        method=f"qzo(lr={LR.get(folder.name, 0.01)})", max_steps=30,
        per_device_train_batch_size=8, report_to="none", show_progress=False, **shared,
    )  # fmt: skip
    result = train(config)
    model = tmp_path / "run" / "model"
    names = changed(folder, model)
    assert names
    assert all(any(part in name for part in SCALES) for name in names), names
    saved = evaluate(EvalConfig(model_name_or_path=str(model), **shared))
    assert saved["numbers"] == result.numbers["after"]
    assert saved["numbers"] != result.numbers["before"]
    kept = {n: b for n, b in files(model).items() if not n.endswith((".safetensors", "README.md"))}
    assert kept == {n: files(folder)[n] for n in kept}
    replay(tmp_path / "run", folder, tmp_path / "again")
    assert not changed(model, tmp_path / "again")


@golden
def test_a_model_without_its_head_is_read_and_given_back(folder: Path, tmp_path: Path) -> None:
    body = formats.read(folder, AutoModel, dtype=torch.float32)
    assert files(formats.write(body, tmp_path / "out")) == files(folder)
    whole = read(folder)
    with torch.no_grad():
        ids = torch.arange(8).unsqueeze(0)
        assert torch.equal(body(ids)[0], whole.model(ids)[0])


@golden
def test_versions_of_the_library_are_written_down(folder: Path) -> None:
    with safe_open(folder.with_suffix(".expected"), framework="pt") as file:
        assert {"torch", "transformers"} < set(file.metadata())


def test_the_command_line_trains_measures_replays_and_lists_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def zotune(*words: object) -> dict[str, Any]:
        capfd.readouterr()
        assert main([*map(str, words), "--json"]) == 0
        found: dict[str, Any] = json.loads(capfd.readouterr().out)
        return found

    listed = {row["name"]: row for row in zotune("list", "formats")["formats"]}
    for name, format in formats.formats().items():
        assert listed[name]["tunable"] == list(format.tunable)
        assert listed[name]["summary"]
    text = tmp_path / "text.txt"
    text.write_text("".join(f"A day like day {k}.\n\n" for k in range(30)))
    task = ("--task", "lm(dev_size=4)", "--data", text, "--max_length", 24)
    run, folder = tmp_path / "run", GOLDEN / "gptq-4bit-asym-act"
    result = zotune(
        "train", "--model", folder, "--out", run, "--steps", 2, *task,
        "--method", "qzo(lr=0.1)", "--space", "scales+zeros+norms", "--report-to", "none",
    )  # fmt: skip
    assert zotune("eval", "--model", run, *task)["numbers"] == result["numbers"]["after"]
    zotune("replay", run, "--model", folder, "--out", tmp_path / "again")
    assert changed(folder, run / "model")
    assert not changed(tmp_path / "again", run / "model")


@golden
@pytest.mark.parametrize("space", ["scales", "zeros", "codes"])
def test_probes_stacked_are_those_one_by_one(folder: Path, space: str) -> None:
    if not has(folder, space):
        return
    model = read(folder).eval()
    blocks = list(get(space).build(model))
    for block in blocks:
        block.bind_(0.3, 1.0, "relative")
    probes = [Probe(Key(1, query=q), step, False) for q, step in ((0, 0.3), (0, -0.3), (1, 0.0))]
    ids = torch.arange(30).reshape(3, 10)

    def logits(fast: bool) -> torch.Tensor:
        view = View(probes, 1, Gaussian(), rows=3)
        with torch.no_grad(), probing(sites_of(blocks), view, fast):
            found: torch.Tensor = model(ids).logits
        return found

    torch.testing.assert_close(logits(True), logits(False), rtol=1e-4, atol=1e-3)
