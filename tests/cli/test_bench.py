"""`zotune bench`, and kernels seen and forced. Run: pytest tests/cli/test_bench.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from schema import conforms

from zotune.bench import models, peaks
from zotune.bench.models import RandomLlama, Shape
from zotune.training import Journal

QUICK = ("--rounds", 1, "--calls", 1, "--warmup", 1, "--memory-steps", 0, "--batch", 2,
         "--length", 8, "--threads", 1)  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = RandomLlama(2, 64, 128, 2, 1, vocabulary=96, shape=Shape(2, 8, 1, 1))
    monkeypatch.setitem(models.LLAMAS, "llama-tiny", tiny)
    measure = peaks.measure
    monkeypatch.setattr(peaks, "measure", lambda: measure(((8, 8, 8),), 1 << 10))


def test_bench_writes_json_and_plot_and_prints_the_table(zotune: Any, tmp_path: Path) -> None:
    words = ("--model", "llama-tiny", "--only", "qzo int8,MeZO", "--out", tmp_path / "new", *QUICK)
    said = zotune("bench", "step", *words, "--verbose")
    assert said.code == 0, said.err
    assert "MeZO restated / qzo int8" in said.out
    assert "MISSED" in said.out or "met" in said.out
    assert "kernel: int8-channel-a8, float32: QuantLinear int8-channel-a8 on cpu" in said.out
    assert (tmp_path / "new/step-llama-tiny.png").exists()
    found = json.loads((tmp_path / "new/step-llama-tiny.json").read_text())
    conforms(found)
    again = zotune("bench", "step", *words, "--json")
    assert {"rows", "written", "plot"} <= set(again.json)


@pytest.mark.parametrize(("words", "wanted"), [
    (["speed"], "step"),
    (["step", "--only", "nobody"], "part of no name"),
    (["step", "--scheme", "int99"], "int99"),
    (["step", "--batch", "0"], "batch=0; want at least 1"),
    (["step", "--kernel", "fastest"], "kernel 'fastest' is unknown"),
    (["step", "--model", "no-such-folder-here/at/all"], "does not exist"),
    (["memory", "--model", "llama-tiny", "--steps", "5"], "give --model minilm"),
])  # fmt: skip
def test_bench_says_what_is_wrong_before_it_measures(
    zotune: Any, words: list[str], wanted: str, tmp_path: Path
) -> None:
    said = zotune("bench", *words, "--out", tmp_path / "new")
    assert wanted in said.error
    assert not (tmp_path / "new").exists()


def test_a_forced_kernel_is_in_result_and_journal(
    zotune: Any, short: list[Any], tmp_path: Path
) -> None:
    more = ("--scheme", "int4-g8", "--space", "scales", "--kernel", "reference", "--verbose")
    said = zotune("train", *short, *more, "--json")
    assert said.code == 0, said.err
    assert said.json["kernels"]["QuantLinear int4-g8"].startswith("reference (")
    assert "kernel: QuantLinear int4-g8 on reference" in said.err
    header = Journal.read(tmp_path / "run").header
    assert header["kernels"] == said.json["kernels"]


def test_evaluating_shows_the_kernel_and_refuses_an_unknown_one(
    zotune: Any, short: list[Any], bert_folder: Path, data: Path
) -> None:
    words = ("eval", "--model", bert_folder, *short[:4], "--scheme", "int4-g8")
    found = {}
    for kernel in ("cpu", "reference"):
        said = zotune(*words, "--kernel", kernel, "--json")
        assert said.code == 0, said.err
        assert said.json["kernels"]["QuantLinear int4-g8"].startswith(kernel)
        found[kernel] = said.json["numbers"]["loss"]
    assert found["cpu"] == pytest.approx(found["reference"], rel=0.05)
    assert "kernel 'fast' is unknown" in zotune(*words, "--kernel", "fast").error


def test_backprop_says_that_it_runs_on_the_kernel_with_a_gradient() -> None:
    from torch import nn

    from zotune.quant import QuantLinear, Scheme
    from zotune.quant.running import kernels_of

    model = nn.Sequential(QuantLinear(64, 4, Scheme.parse("int4-g64")), nn.Linear(4, 2))
    assert kernels_of(model)["QuantLinear int4-g64"] == "cpu (1 layer)"
    assert kernels_of(model, gradient=True)["QuantLinear int4-g64"] == "reference (1 layer)"
    assert kernels_of(model)["Linear float32"] == "torch (1 layer)"


def test_the_way_of_a_kernel_is_shown_where_it_was_forced_or_found() -> None:
    import torch
    from torch import nn

    from zotune.quant import QuantLinear, Scheme
    from zotune.quant.kernels import choice
    from zotune.quant.running import forced_kernel, kernels_of

    layer = QuantLinear(80, 24, Scheme.parse("int8-channel-a8"))
    name = "QuantLinear int8-channel-a8"
    with forced_kernel("cpu/onednn"):
        assert kernels_of(nn.Sequential(layer))[name] == "cpu/onednn (1 layer)"
    with torch.no_grad():
        layer(torch.ones(2, 80))
    found = {way for (size, _), way in choice.chosen().items() if size[2:] == (24, 80, 8)}  # type: ignore[misc,index]
    wanted = "/".join(["cpu", *found])
    assert kernels_of(layer)[name] == f"{wanted} (1 layer)"
