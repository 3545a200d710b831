"""Every script of benchmarks/ runs at tiny settings and writes rows of the schema. Nothing is timed
here; what `zotune bench` measures is tested in test_bench.py."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from schema import conforms

ROOT = Path(__file__).parents[2]


def ran(name: str, out: Path, *words: str) -> dict[str, Any]:
    """The result file of one benchmark's main function."""
    import_module(f"benchmarks.{name}").main(["--threads", "1", "--out", str(out), *words])
    found: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    conforms(found)
    assert found["benchmark"] == name
    return found


def names(found: dict[str, Any]) -> list[str]:
    return [row["name"] for row in found["rows"]]


def test_learning_repeats_the_demo_and_its_baselines(encoder: str, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "task: tickets\nmethod: mezo(units='relative')\nspace: adapter(rank=1)+head\nlr: 0.01\n"
        "scheme: int4-g32\nmax_length: 8\nmax_eval_samples: 4\nout: unused\n"
    )
    words = ["--model", encoder, "--config", str(config), "--seeds", "2", "--steps", "2"]
    found = ran("learning", tmp_path, *words)
    learning = import_module("benchmarks.learning")
    assert set(found["details"]["runs"]) == {learning.ZOTUNE, *learning.BASELINES}
    forwards = {r["name"]: r["value"] for r in found["rows"] if "forward" in r["name"]}
    assert forwards["zotune: forward passes"] == 4
    assert not (tmp_path / "unused").exists()


def test_a_benchmark_runs_as_a_file_and_as_a_module() -> None:
    for words in (["benchmarks/step.py"], ["-m", "benchmarks.memory"]):
        found = subprocess.run(
            [sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert "--threads" in found.stdout


def test_attack_asks_every_contender_on_the_same_images(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="task digits needs scikit-learn")
    words = {"images": 3, "queries": 8, "seeds": 2, "epochs": 1, "timed": 4}
    flags = [word for k, v in words.items() for word in (f"--{k}", str(v))]
    attack = import_module("benchmarks.attack")
    where = ["--only", "digits", "speed", "--threads", "1", "--out", str(tmp_path)]
    attack.main([*where, *flags, "--peers"])
    conforms(json.loads((tmp_path / "attack-speed.json").read_text()))
    found = json.loads((tmp_path / "attack-digits.json").read_text())
    conforms(found)
    for contender in attack.OURS:
        assert sum(f": {contender}, success" in name for name in names(found)) == 1
    rates = [row["value"] for row in found["rows"] if row["name"].endswith("success")]
    assert all(0 <= rate <= 1 for rate in rates)


def test_a_peer_is_counted_and_stopped_at_its_last_query() -> None:
    import torch

    peers = import_module("benchmarks.attack_peers")
    image = torch.full((1, 2, 2), 100, dtype=torch.uint8)

    def scores(shown: Any) -> Any:
        light = shown.flatten(1).mean(1)
        return torch.stack([0.45 - light, light - 0.45], 1)  # 0.39 before

    counter = peers.Counter(scores, image, 0, budget=0.1, queries=5)
    counter((image / 255).expand(3, 1, 2, 2).numpy())
    with pytest.raises(peers.Spent):
        counter((image / 255 + 0.2).expand(9, 1, 2, 2).numpy())
    assert (counter.asked, counter.fooled) == (5, False), "fooled outside the budget only"
    counter.finish(image / 255 + 0.2)
    assert counter.fooled, "its result is clamped to the budget"


def falling(problem: Any, contender: Any, rate: float, seed: int, steps: int, *rest: Any) -> Any:
    """A run as it could be: the metric falls step by step, for kerzoo from far above."""
    frontier = import_module("benchmarks.frontier")
    start = 2.0 + ("kerzoo" in contender.name) - seed / 10
    curve = [(t, start - t / 1000) for t in range(10, steps + 1, 10)]
    return frontier.Outcome(curve[-1][1], start, curve)


def test_claims_count_forwards_to_where_mezo_ended_and_keep_what_was_measured(
    tmp_path: Path, monkeypatch: Any
) -> None:
    claims = import_module("benchmarks.claims")
    monkeypatch.setattr(claims, "run", falling)
    words = ["--threads", "1", "--out", str(tmp_path), "--seeds", "2", "--only"]
    for task in ("shakespeare", "wikitext2"):
        claims.main([*words, task])
    found = json.loads((tmp_path / "claims-speed.json").read_text())
    conforms(found)
    rows = {r["name"]: r for r in found["rows"]}
    for task in ("shakespeare", "wikitext2"):
        kerzoo = rows[f"kerzoo, {task}: forwards to mezo's last dev metric"]
        assert kerzoo["value"] == 1.0
        assert "0 of 2 seeds got there" in kerzoo["baseline"]
        assert kerzoo["met"] is False
        assert rows[f"dizo, {task}: forwards to mezo's last dev metric"]["value"] == 1.0
    claims.main([*words, "trec", "--batch", "8"])
    again = json.loads((tmp_path / "claims-speed.json").read_text())
    assert len(again["rows"]) < len(found["rows"])  # other settings: nothing of it is kept


def test_rates_widen_beyond_an_edge_that_wins_but_not_for_ever() -> None:
    searched = import_module("benchmarks.frontier").searched
    nan = float("nan")
    best, tried = searched((0.01, 0.03, 0.1), lambda rate: rate, True)
    assert (best, len(tried)) == (0.0003, 6)
    assert list(tried)[3:] == [0.003, 0.001, 0.0003]
    best, tried = searched((0.01, 0.03, 0.1), lambda rate: nan if rate > 0.1 else rate, False)
    assert (best, list(tried)) == (0.1, [0.01, 0.03, 0.1, 0.3])
    best, tried = searched((0.01, 0.03, 0.1), lambda rate: abs(rate - 0.03), True)
    assert (best, list(tried)) == (0.03, [0.01, 0.03, 0.1])
    best, tried = searched((0.01, 0.03, 0.1), lambda rate: nan, True)
    assert best == min(tried)


def test_a_run_of_some_contenders_keeps_the_others_rows_and_their_commit(
    tmp_path: Path, monkeypatch: Any
) -> None:
    frontier = import_module("benchmarks.frontier")
    monkeypatch.setattr(frontier, "run", falling)
    monkeypatch.setattr(frontier.machine, "commit", lambda: "first")
    words = ["--threads", "1", "--out", str(tmp_path), "--task", "shakespeare", "--seeds", "2"]
    frontier.main([*words, "--only", "jaguar", "zo-sign"])
    monkeypatch.setattr(frontier.machine, "commit", lambda: "second")
    frontier.main([*words, "--only", "jaguar", "subzero"])
    found = json.loads((tmp_path / "frontier-shakespeare.json").read_text())
    conforms(found)
    commits = {k.split("(")[0]: e["commit"] for k, e in found["details"]["contenders"].items()}
    assert commits == {"subzero": "second", "jaguar": "second", "zo-sign": "first"}
    assert len(found["rows"]) == 6


def test_length_says_what_is_saved(encoder: str, tmp_path: Path, monkeypatch: Any) -> None:
    length = import_module("benchmarks.length")

    def rows_of(name: str, count: int) -> list[dict[str, Any]]:
        texts = ["the film was great " * (1 + i % 5) for i in range(min(count, 12))]
        return [{"text": t, "context": t, "passage": t, "question": "so"} for t in texts]

    monkeypatch.setattr(length, "rows_of", rows_of)
    monkeypatch.setattr(length, "SHOTS", "the film was dull " * 30)
    words = ["--threads", "1", "--out", str(tmp_path), "--model", encoder, "--sets", "squad",
             "--rounds", "1", "--batch", "4", "--steps", "3", "--hidden", "16",
             "--layers", "1"]  # fmt: skip
    length.main(words)
    found = json.loads((tmp_path / "length.json").read_text())
    conforms(found)
    rows = {row["name"]: row["value"] for row in found["rows"]}
    real, pieces = (rows[f"squad, {how}: padded tokens"] for how in
                    ("no padding at all", "pieces of like length"))  # fmt: skip
    assert 0 < real <= pieces <= 1
    assert rows["demonstrations: tokens"] < 0.8
    assert 0.5 < rows["micro_batch=auto: bytes predicted"] < 2
    assert rows["qzo int4-g64, one probe at a time: tensors of a step"] > 0


def test_stream_compares_steps_with_what_they_read(tmp_path: Path) -> None:
    stream = import_module("benchmarks.stream")
    given = stream.options(["--hidden", "64", "--layers", "2", "--limit", "1"])
    size = stream.make(tmp_path / "model", given)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert sum(stream.chunks(files)) == size
    run = {"peak": 2e6, "seconds": [9.0, 2.0, 2.0], "from_disk": [4] * 3, "rate": [4.0] * 3,
           "passing": 8}  # fmt: skip
    rows = {row.name: row for row in stream.rows(dict.fromkeys(stream.RUNS, run), size, given)}
    assert rows["qzo/disk: a step / reading"].value == 2.0
    assert rows["qzo/memory: a step / reading"].value == 1.0
    assert [rows[f"qzo/{s}: a step / reading"].met for s in ("disk", "memory")] == [False, True]
    assert rows["qzo/disk: peak"].met is False
    assert rows["qzo/disk: a step / a step in memory"].value == 1.0


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "benchmarks").glob("*.py")))
def test_every_benchmark_finds_what_it_imports(name: str) -> None:
    import_module(f"benchmarks.{name}" if name != "__init__" else "benchmarks")
