"""Whole runs of a streamed model: the same journal, the same weights, whatever happens."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import toys
from training import lab
from training.freezing import frozen
from training.test_loop import Killed, killed_after

from zotune.errors import BadInput
from zotune.models.streaming import Stream
from zotune.quant import formats, quantize_model_
from zotune.training import evaluate, replay, train
from zotune.training.journal import Journal
from zotune.training.objective import Objective
from zotune.training.settings import EvalConfig

KINDS = [k for k in lab.FORWARD if k != "svrg"]


def records(folder: Path) -> Any:
    return Journal.read(folder).records


@pytest.mark.parametrize("kind", KINDS)
def test_a_streamed_run_is_the_run_in_memory_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    whole, streamed = toys.layered(), toys.layered()
    one = train(lab.config(tmp_path / "a", kind, eval_steps=4), model=whole, task=lab.task())
    tight = None if kind == "stored" else lab.TIGHT  # its moments do not fit
    config = lab.config(tmp_path / "b", kind, eval_steps=4, memory_limit=tight, stream=True)
    with monkeypatch.context() as patch:
        killed_after(patch, 8)
        with pytest.raises(Killed):
            train(config, model=toys.layered(), task=lab.task())
    config = dataclasses.replace(config, resume_from_checkpoint=True)
    two = train(config, model=streamed, task=lab.task())
    assert Journal.read(tmp_path / "b").header["streamed"]
    assert lab.states(whole) == lab.states(streamed)
    assert (one.before, one.after, one.best) == (two.before, two.after, two.best)
    assert records(tmp_path / "a") == records(tmp_path / "b")
    if kind in ("queries", "qzo"):
        rebuilt = toys.layered()
        if "scheme" in lab.KINDS[kind]:
            quantize_model_(rebuilt, lab.KINDS[kind]["scheme"])
        replay(tmp_path / "a", rebuilt, memory_limit=lab.TIGHT)
        assert lab.states(whole) == lab.states(rebuilt)


def test_a_streamed_run_may_go_on_in_memory_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"weight_decay": 0.01, "queries": 2, "load_best_model_at_end": True, "eval_steps": 3}
    whole, last = frozen.bert(), frozen.bert()
    train(lab.config(tmp_path / "a", **options), model=whole, task=frozen.task())
    for stop, stream in ((2, True), (7, False)):
        with monkeypatch.context() as patch:
            killed_after(patch, stop)
            with pytest.raises(Killed):
                train(
                    lab.config(tmp_path / "b", stream=stream, resume_from_checkpoint=True,
                               **options),
                    model=frozen.bert(), task=frozen.task(),
                )  # fmt: skip
    config = lab.config(tmp_path / "b", stream=True, resume_from_checkpoint=True, **options)
    train(config, model=last, task=frozen.task())
    assert lab.states(whole) == lab.states(last)


def test_an_update_that_is_still_due_is_seen_by_evaluations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, str]] = []
    real = Objective.evaluate

    def evaluate(self: Any, model: Any, *rest: Any) -> Any:
        seen.append(lab.states(model))
        return real(self, model, *rest)

    monkeypatch.setattr(Objective, "evaluate", evaluate)
    for limit in (None, lab.TIGHT):
        config = lab.config(tmp_path / str(limit), eval_steps=2, memory_limit=limit, max_steps=6)
        train(config, model=toys.layered(), task=lab.task())
    half = len(seen) // 2
    assert seen[:half] == seen[half:]
    assert len({repr(s) for s in seen}) > 3


@pytest.mark.parametrize("scheme", [None, "int4-g8"])
def test_a_folder_is_trained_evaluated_and_replayed_from_its_files(
    tmp_path: Path, scheme: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toys.llama()
    if scheme is not None:
        quantize_model_(model, scheme)
    folder = str(formats.write(model, tmp_path / "base"))
    streams: list[Stream] = []
    real = Stream.__init__

    def noted(self: Stream, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        streams.append(self)

    monkeypatch.setattr(Stream, "__init__", noted)
    found = []
    for name, limit in (("a", None), ("b", "10KB" if scheme else "21KB")):
        options = {"space": "scales", "method": "qzo"} if scheme else {}
        config = lab.config(tmp_path / name, model_name_or_path=folder, memory_limit=limit,
                            eval_steps=6, **options)  # fmt: skip
        result = train(config, task=lab.task())
        out = str(tmp_path / name / "model")
        again = evaluate(EvalConfig(out, memory_limit=limit), task=lab.task())
        assert again["value"] == pytest.approx(result.after, rel=1e-6)
        rebuilt = replay(tmp_path / name, folder, tmp_path / f"{name}2", memory_limit=limit)
        held = (tmp_path / name / "model/model.safetensors").read_bytes()
        assert (tmp_path / f"{name}2/model.safetensors").read_bytes() == held
        found.append((result.after, rebuilt["tuned_fingerprint"], held))
        assert len(streams) == (3 if limit else 0)
    assert found[0] == found[1]
    assert (tmp_path / "base/model.safetensors").read_bytes() != found[0][2]


def test_exact_heads_stream(tmp_path: Path) -> None:
    digests = []
    for limit in (None, lab.TIGHT):
        model = toys.layered()
        config = lab.config(tmp_path / str(limit), "example", memory_limit=limit,
                            space="adapter(rank=1) + head(exact=True)")  # fmt: skip
        train(config, model=model, task=lab.task())
        digests.append(lab.states(model))
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "adamw"}, "adamw goes back through all layers"),
        ({"check_gradient": 5}, "check_gradient"),
        ({"freeze": "0.5@4"}, "freeze"),
        ({"memory_limit": "1KB"}, "three layers.*memory_limit=1,000"),
        ({"memory_limit": "many"}, "memory_limit='many'"),
        ({"method": "zo-adam", "memory_limit": "18KB"}, "keeps 8 bytes for each of"),
    ],
)
def test_what_cannot_be_streamed_is_refused(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    config = lab.config(tmp_path / "run", **{"stream": True, **options})
    with pytest.raises(BadInput, match=said):
        train(config, model=toys.layered(), task=lab.task())
    assert not (tmp_path / "run").exists()


def test_auto_streams_only_what_does_not_fit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for limit, said in (("1GB", False), (lab.TIGHT, True)):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="zotune"):
            config = lab.config(tmp_path / limit, stream="auto", memory_limit=limit, max_steps=1)
            train(config, model=toys.layered(), task=lab.task())
        assert any("streaming 4 layers" in r.message for r in caplog.records) is said
