"""Every kind of bad input: one clear line, exit code 2, no traceback, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Edit = Callable[[Path], None]


def with_data(short: list[Any], file: Path) -> list[Any]:
    words = list(short)
    at = words.index("--data")
    return [*words[:at], "--train-file", file, *words[at + 2 :]]


ROWS = [json.dumps({"text": f"text {i}", "label": "good" if i % 2 else "bad"}) for i in range(20)]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([*ROWS, "{not json"], "line 21: not valid JSON"),
        ([*ROWS, "[1]"], "line 21: wanted a JSON object"),
        ([*ROWS, '{"label": "good"}'], "no field 'text'"),
        ([*ROWS, '{"text": "x"}'], "label"),
        ([], "no rows"),
        (["", "  "], "no rows"),
    ],
)
def test_bad_rows(
    zotune: Any, short: list[Any], tmp_path: Path, rows: list[str], told: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(rows))
    assert told in zotune("train", *with_data(short, file), "--space", "head").error
    assert not (tmp_path / "run").exists()


def test_an_unknown_label(zotune: Any, short: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([*ROWS, '{"text": "x", "label": "goood"}']))
    words = with_data(short, file)
    words[1] = "classification(labels='bad,good')"
    assert "goood" in zotune("train", *words, "--space", "head").error


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (["--method", "mezzo"], "did you mean mezo"),
        (["--method", "mezo(epz=1)"], "did you mean eps"),
        (["--method", "zoqo", "--units", "relative"], "no option 'units'"),
        (["--space", "scale"], "did you mean scales"),
        (["--space", "lora(rnk=2)"], "its options are"),
        (["--space", "scales"], "quantize it first"),
        (["--space", "adapter(rank=1"], "cannot read"),
        (["--task", "tickts"], "did you mean 'tickets'"),
        (["--scheme", "int4-g7"], "does not divide"),
        (["--scheme", "int9-g8"], "bits=9"),
        (["--max-length", "4096"], "more than the model's own limit"),
        (["--learning-rat", "1"], "did you mean learning_rate"),
        (["--lr", "fast"], "learning_rate"),
        (["--lr", "-1"], "lr=-1"),
        (["--eps", "0"], "eps=0"),
        (["--data", "/no/such/folder"], "/no/such/folder"),
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--dtype", "float8"], "float8"),
        (["--directions", "all"], "directions"),
        (["--config", "/no/such.yaml"], "cannot read the configuration"),
        (["--resume", "/no/such/run"], "holds no journal.zoj"),
    ],
)
def test_bad_options(
    zotune: Any, short: list[Any], tmp_path: Path, extra: list[str], told: str
) -> None:
    assert told in zotune("train", *short, "--space", "head", *extra).error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trane"], "did you mean train"),
        (["train"], "no output folder"),
        (["eval", "--model", "x"], "no task"),
        (["eval", "--task", "tickets"], "no model"),
        (["list", "metods"], "methods"),
        (["quantize", "--out", "x"], "no model"),
        (["replay", "/no/such/run", "--model", "x", "--out", "y"], "cannot read the journal"),
    ],
)
def test_bad_commands(zotune: Any, words: list[str], told: str) -> None:
    assert told in zotune(*words).error


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [", "not valid YAML"),
        ("- a", "want keys and values"),
        ("learning_rat: 1", "learning_rate"),
    ],
)
def test_bad_yaml(zotune: Any, tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert told in zotune("train", "--config", tmp_path / "c.yaml").error


def cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 100)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")


def configless(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("edit", "told"),
    [(cut, "not a whole safetensors file"), (pickled, "pickles"), (configless, "config.json")],
)
def test_bad_checkpoints(
    zotune: Any, short: list[Any], bert_folder: Path, tmp_path: Path, edit: Edit, told: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(bert_folder, folder)
    edit(folder)
    assert told in zotune("train", *short, "--model", folder, "--space", "head").error
    assert told in zotune("quantize", "--model", folder, "--out", tmp_path / "q").error
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "q").exists()


def test_a_full_output_folder(
    zotune: Any, short: list[Any], bert_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine").touch()
    assert "not empty" in zotune("train", *short, "--space", "head").error
    words = ["quantize", "--scheme", "int4-g8", "--model", bert_folder, "--out", tmp_path / "run"]
    assert "not empty" in zotune(*words).error
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine"]


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_journal(
    zotune: Any, short: list[Any], bert_folder: Path, tmp_path: Path, damage: str
) -> None:
    zotune("train", *short, "--space", "head")
    path = tmp_path / "run/journal.zoj"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-16 * 3] ^= 1  # 4 steps and the end mark: step 2
    path.write_bytes(data if damage == "flip" else data[: -16 * 2 - 3])
    words = ["replay", tmp_path / "run", "--model", bert_folder, "--out", tmp_path / "again"]
    assert "first 2 steps are good: --repair" in zotune(*words).error
    assert not (tmp_path / "again").exists()
    assert zotune(*words, "--repair", "--json").json["steps"] == 2


def test_with_json_errors_stay_off_standard_output(zotune: Any, short: list[Any]) -> None:
    assert "did you mean mezo" in zotune("train", *short, "--method", "mezzo", "--json").error


def test_our_own_faults_have_another_code(
    zotune: Any, short: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("inner")

    monkeypatch.setattr("zotune.training.loop.assemble", broken)
    said = zotune("train", *short)
    assert said.code == 1
    assert "Traceback" not in said.err
    assert "RuntimeError: inner (ZOTUNE_DEBUG=1 shows where)" in said.err
