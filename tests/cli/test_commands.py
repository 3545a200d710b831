"""The commands end to end on tiny models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

SPACES = ["weights", "lora(rank=2)", "adapter(rank=1)+head", "norms+biases", "scales", "codes"]


@pytest.mark.parametrize("space", SPACES)
def test_the_saved_model_evaluates_to_the_same_number(
    zotune: Any, short: list[Any], data: Path, tmp_path: Path, space: str
) -> None:
    method = "zoqo" if space == "codes" else "mezo(units='relative', lr=0.5, eps=0.01)"
    ran = zotune(
        "train", *short, "--json", "--space", space, "--method", method, "--scheme", "int4-g8"
    )
    assert ran.code == 0, ran.err
    task = ["--task", "classification(label_texts=['bad', 'good'])", "--data", data, "--json"]
    found = zotune("eval", "--model", tmp_path / "run/model", *task).json
    assert found["numbers"] == ran.json["numbers"]["after"]
    assert found["value"] == ran.json["after"]
    assert ran.json["numbers"]["after"]["loss"] != ran.json["numbers"]["before"]["loss"]


@pytest.mark.parametrize("space", SPACES)
def test_replay_writes_the_trained_model_byte_for_byte(
    zotune: Any, short: list[Any], bert_folder: Path, tmp_path: Path, space: str
) -> None:
    method = "zoqo" if space == "codes" else "mezo(units='relative', lr=0.5, eps=0.01)"
    zotune("train", *short, "--space", space, "--method", method, "--scheme", "int4-g8")
    lone = tmp_path / "lone"
    lone.mkdir()
    (lone / "journal.zoj").write_bytes((tmp_path / "run/journal.zoj").read_bytes())
    ran = zotune("replay", lone, "--model", bert_folder, "--out", tmp_path / "again", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["steps"] == 4
    for path in (tmp_path / "again").rglob("*.safetensors"):
        twin = tmp_path / "run/model" / path.relative_to(tmp_path / "again")
        assert path.read_bytes() == twin.read_bytes(), path.name


def test_replay_refuses_another_base(
    zotune: Any, short: list[Any], llama_folder: Path, tmp_path: Path, bert_folder: Path
) -> None:
    zotune("train", *short, "--space", "head")
    out = tmp_path / "again"
    said = zotune(
        "quantize", "--model", bert_folder, "--scheme", "int4-g8", "--out", tmp_path / "q"
    )
    assert said.code == 0
    error = zotune("replay", tmp_path / "run", "--model", tmp_path / "q", "--out", out).error
    assert "not the base model" in error
    assert not out.exists()


def test_a_trained_folder_can_be_trained_further(
    zotune: Any, short: list[Any], tmp_path: Path
) -> None:
    first = zotune("train", *short, "--space", "adapter(rank=1)+head", "--json").json
    more = [tmp_path / "two" if w == tmp_path / "run" else w for w in short]
    more[more.index("--model") + 1] = tmp_path / "run/model"
    second = zotune("train", *more, "--space", "adapter(rank=1)+head", "--json")
    assert second.code == 0, second.err
    assert second.json["numbers"]["before"] == first["numbers"]["after"]


def test_resume_takes_the_runs_own_configuration(
    zotune: Any, short: list[Any], tmp_path: Path
) -> None:
    whole = zotune("train", *short, "--space", "head", "--json").json
    journal = tmp_path / "run/journal.zoj"
    journal.write_bytes(journal.read_bytes()[:-20])  # the end mark and part of the last step
    (tmp_path / "run/snapshots/last.safetensors").unlink()
    again = zotune("train", "--resume", tmp_path / "run", "--json")
    assert again.code == 0, again.err
    assert again.json["numbers"] == whole["numbers"]
    bare = zotune("train", "--resume", "--out", tmp_path / "run", "--json")
    assert bare.json["numbers"] == whole["numbers"]


def test_yaml_with_flags_on_top(zotune: Any, short: list[Any], tmp_path: Path) -> None:
    keys = [str(w).removeprefix("--") for w in short[::2]]
    values = [v if isinstance(v, int) else str(v) for v in short[1::2]]
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**dict(zip(keys, values, strict=True)), "space": "head"}))
    ran = zotune("train", "--config", file, "--steps", 2, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["steps"] == 2
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert saved["max_steps"] == 2
    assert saved["per_device_train_batch_size"] == 4


def test_json_prints_one_object_and_nothing_else(zotune: Any, short: list[Any]) -> None:
    ran = zotune("train", *short, "--space", "head", "--json", "--eval-every", 2)
    assert len(ran.out.splitlines()) == 1
    needed = {"before", "after", "metric", "steps", "forwards", "train_seconds", "steps_per_second",
              "peak_memory_bytes", "trainable", "method", "space", "out"}  # fmt: skip
    assert needed <= set(ran.json)
    assert ran.json["metric"] == "accuracy"
    assert json.loads((Path(ran.json["out"]) / "result.json").read_text()) == ran.json


@pytest.mark.parametrize("what", ["methods", "spaces", "tasks", "formats"])
def test_lists(zotune: Any, what: str) -> None:
    rows = zotune("list", what, "--json").json[what]
    assert len(rows) > 1
    table = zotune("list", what).out
    assert all(row["name"] in table for row in rows)


def test_doctor_is_well(zotune: Any) -> None:
    found = zotune("doctor", "--json").json
    assert found["versions"]["zotune"]
    assert not [p for p in found["problems"] if "kernel" in p]
    assert "instructions" in zotune("doctor").out


def test_quantize_then_evaluate(zotune: Any, llama_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    made = zotune(
        "quantize", "--model", llama_folder, "--scheme", "int4-g8", "--out", out, "--json"
    )
    assert made.json["layers"] == 14
    text = tmp_path / "t.txt"
    text.write_text("the film was great fun\nI liked it\n" * 8)
    found = zotune(
        "eval", "--model", out, "--task", "lm", "--data", text, "--json", "--split", "dev"
    )
    assert found.code == 0, found.err
    assert found.json["metric"] == "perplexity"


def test_quantize_by_calibration_into_another_format(
    zotune: Any, llama_folder: Path, data: Path, tmp_path: Path
) -> None:
    flags = ["--model", llama_folder, "--method", "awq + gptq(act_order=True)", "--data", data]
    out = tmp_path / "q"
    made = zotune(
        "quantize", *flags, "--scheme", "int4-g8", "--format", "compressed-tensors",
        "--samples", "4", "--length", "16", "--out", out, "--json",
    )  # fmt: skip
    assert made.code == 0, made.err
    assert made.json["calibrated_on"] == 4 * 16
    assert '"pack-quantized"' in (out / "config.json").read_text()
    again = zotune("quantize", "--model", out, "--scheme", "int4-g8", "--out", tmp_path / "r")
    assert "already quantized (compressed-tensors)" in again.error
    wrong = zotune(
        "quantize", *flags, "--scheme", "int4-g8", "--format", "gguf", "--out", tmp_path / "r"
    )
    assert "use one of int8-g32" in wrong.error


def test_list_formats_says_what_can_be_written(zotune: Any) -> None:
    rows = {row["name"]: row for row in zotune("list", "formats", "--json").json["formats"]}
    assert "Q4_0" in rows["gguf"]["written"]
    assert rows["hqq"]["written"] == ""


def test_show_mask(zotune: Any, llama_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i} ", "completion": f"answer {i}"} for i in range(8)]
    file = tmp_path / "sft.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    words = ["--task", "sft", "--train-file", file, "--model", llama_folder, "--show-mask"]
    shown = zotune("train", *words, "--out", tmp_path / "run")
    assert shown.code == 0, shown.err
    assert "⟦" in shown.out
    assert "⟦question" not in shown.out
    assert not (tmp_path / "run").exists()
    assert len(zotune("eval", *words, "--json").json["examples"]) == 3


def test_a_causal_model_on_label_words(
    zotune: Any, llama_folder: Path, data: Path, tmp_path: Path
) -> None:
    flags = {
        "task": "classification(label_words='bad,good')",
        "data": data,
        "model": llama_folder,
        "out": tmp_path / "run",
        "steps": 3,
        "method": "zo-adam",
        "queries": 2,
        "directions": "example",
        "report-to": "none",
    }
    words = [word for key, value in flags.items() for word in (f"--{key}", value)]
    ran = zotune("train", *words, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["forwards"] == 12


def test_help_is_fast_and_imports_no_torch() -> None:
    code = (
        "import sys\nfrom zotune.cli import main\n"
        "try: main(['train', '--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--learning_rate" in done.stdout


def test_python_m_zotune() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "zotune", "list", "methodz"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


ZEROQAT = "zeroqat(steps=4, examples=8, batch_size=4, rotate=True, report_to='none', save_steps=2)"


@pytest.mark.parametrize(("scheme", "format"), [
    ("int4-g8-a8", "zotune"), ("int4-channel-a4", "compressed-tensors"),
])  # fmt: skip
def test_a_run_through_the_rounding_is_replayed_and_resumed_bit_for_bit(
    zotune: Any, llama_folder: Path, tmp_path: Path, scheme: str, format: str
) -> None:
    text, run, out = tmp_path / "t.txt", tmp_path / "run", tmp_path / "again"
    text.write_text("the film was great fun\nI liked it\n" * 40)
    words = ["quantize", "--model", llama_folder, "--scheme", scheme, "--format", format,
             "--data", text, "--length", 16, "--out", run, "--json"]  # fmt: skip
    made = zotune(*words, "--method", ZEROQAT)
    assert made.code == 0, made.err
    assert "down_proj" in str(made.json["exceptions"]["unrotated"])
    whole = (run / "model/model.safetensors").read_bytes()
    done = zotune("replay", run, "--model", llama_folder, "--out", out, "--json")
    assert done.code == 0, done.err
    assert (out / "model.safetensors").read_bytes() == whole
    assert (out / "config.json").read_text() == (run / "model/config.json").read_text()
    journal = run / "journal.zoj"
    journal.write_bytes(journal.read_bytes()[:-20])  # the end mark and part of the last step
    again = zotune(*words, "--method", ZEROQAT.replace("steps=4", "steps=4, resume=True"))
    assert again.code == 0, again.err
    assert again.json["texts"] == made.json["texts"]
    assert (run / "model/model.safetensors").read_bytes() == whole
    text.write_text("nothing of the kind\nwas ever said before\n" * 40)
    other = zotune("replay", run, "--model", llama_folder, "--out", tmp_path / "other")
    assert "on the run's own examples" in other.error
    assert not (tmp_path / "other").exists()
