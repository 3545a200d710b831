"""A private run from the command line. Run: pytest tests/cli/test_privacy.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

METHOD = "dp-zo(epsilon=4.0, delta=0.01, clip=1.0, units='relative', eps=0.01, lr=0.01)"


def test_a_private_run_is_planned_promised_resumed_and_replayed(
    zotune: Any, short: list[Any], bert_folder: Path, tmp_path: Path
) -> None:
    short[short.index("--method") + 1] = METHOD
    ran = zotune("train", *short, "--space", "lora(rank=2)", "--json")
    assert ran.code == 0, ran.err
    promise = ran.json["privacy"]
    assert 3.9 < promise["epsilon"] <= 4.0
    assert (promise["delta"], promise["examples"], promise["steps"]) == (0.01, 24, 4)
    planned, reached = [line for line in ran.err.splitlines() if "differential privacy" in line]
    assert planned == f"planned {reached}"
    assert reached.removeprefix("privacy: ") in (tmp_path / "run/model/README.md").read_text()
    assert "loss" not in "".join(x for x in ran.err.splitlines() if x.startswith("step 4/4"))
    journal = tmp_path / "run/journal.zoj"
    begun = journal.read_bytes()[: -16 * 3]  # without the end mark and the last two steps
    journal.write_bytes(begun)
    (tmp_path / "run/snapshots/last.safetensors").unlink()
    again = zotune("train", "--resume", tmp_path / "run", "--json")
    assert again.code == 0, again.err
    assert again.json["privacy"] == promise
    assert journal.read_bytes().startswith(begun)
    made = zotune("replay", tmp_path / "run", "--model", bert_folder, "--out", tmp_path / "again")
    assert made.code == 0, made.err
    for path in (tmp_path / "again").rglob("*.safetensors"):
        twin = tmp_path / "run/model" / path.relative_to(tmp_path / "again")
        assert path.read_bytes() == twin.read_bytes(), path.name
    assert json.loads((tmp_path / "run/result.json").read_text()) == again.json


def test_a_promise_that_cannot_be_kept_is_one_line(zotune: Any, short: list[Any]) -> None:
    short[short.index("--method") + 1] = "dp-zo(epsilon=4.0, delta=0.1)"
    assert "delta < 1/24" in zotune("train", *short, "--space", "head").error
