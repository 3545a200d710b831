"""Every benchmark runs at tiny settings and writes rows of the schema. Nothing is timed here."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "benchmarks/results/schema.json").read_text())
KINDS: dict[str, type] = {
    "string": str,
    "null": type(None),
    "object": dict,
    "array": list,
    "boolean": bool,
}
STEP = ["--rounds", "2", "--calls", "1", "--warmup", "1", "--batch", "2", "--length", "8"]


def conforms(value: Any, schema: dict[str, Any], where: str = "result") -> None:
    """The part of JSON Schema that results/schema.json uses."""
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    right = any(numeric if k == "number" else isinstance(value, KINDS[k]) for k in kinds)
    assert right, f"{where} is {value!r}; want {kinds}"
    if isinstance(value, dict):
        assert set(schema.get("required", ())) <= set(value), where
        known = schema.get("properties", {})
        assert schema.get("additionalProperties", True) or set(value) <= set(known), where
        for key in set(known) & set(value):
            conforms(value[key], known[key], f"{where}.{key}")
    if isinstance(value, list):
        assert len(value) >= schema.get("minItems", 0), where
        for i, item in enumerate(value):
            conforms(item, schema.get("items", {}), f"{where}[{i}]")


def ran(name: str, out: Path, *words: str) -> dict[str, Any]:
    """The result file of one benchmark's main function."""
    import_module(f"benchmarks.{name}").main(["--threads", "1", "--out", str(out), *words])
    found: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    conforms(found, SCHEMA)
    assert found["benchmark"] == name
    return found


def names(found: dict[str, Any]) -> list[str]:
    return [row["name"] for row in found["rows"]]


def test_step_times_every_contender_and_judges_the_targets(encoder: str, tmp_path: Path) -> None:
    step = import_module("benchmarks.step")
    found = ran("step", tmp_path, "--model", encoder, *STEP, "--memory_steps", "0")
    assert {f"{name}, seconds" for name in {**step.STEPS, **step.FORWARDS}} <= set(names(found))
    judged = {row["name"]: row["met"] for row in found["rows"] if row["target"] is not None}
    assert len(judged) == 6
    assert None not in judged.values()
    assert all(len(s) == 2 for s in found["details"]["seconds_per_round"].values())


def test_step_measures_memory_in_processes_of_their_own(encoder: str, tmp_path: Path) -> None:
    words = ["--model", encoder, *STEP, "--memory_steps", "1", "--only", "qzo int4"]
    found = ran("step", tmp_path, *words)
    assert found["details"]["failures"] == {}
    memory = found["details"]["memory"]["qzo int4"]
    assert 0 < memory["before_model"] < memory["model_loaded"] <= memory["peak"]


def test_a_process_that_fails_says_why() -> None:
    process = import_module("benchmarks.process")
    with pytest.raises(RuntimeError, match=r"No module named benchmarks\.nothing"):
        process.measured_apart("benchmarks.nothing", [], timeout=60)


def test_a_contender_that_fails_is_a_row_that_is_missed(tmp_path: Path, monkeypatch: Any) -> None:
    process = import_module("benchmarks.process")

    def fails(*words: Any, **options: Any) -> Any:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(process, "measured_apart", fails)
    found = ran("memory", tmp_path, "--only", "qzo int4")
    assert found["details"]["failures"]
    assert [r["met"] for r in found["rows"] if r["target"] is not None] == [False] * 3


def test_noise_compares_every_size_with_torch(
    encoder: str, tmp_path: Path, monkeypatch: Any
) -> None:
    noise = import_module("benchmarks.noise")
    monkeypatch.setattr(noise, "AT_LEAST", 1)
    found = ran("noise", tmp_path, "--model", encoder, "--rounds", "2", "--warmup", "1")
    assert "all blocks: gaussian draw" in names(found)
    assert all(row["value"] > 0 for row in found["rows"])


def test_memory_follows_a_run_of_the_training_loop(encoder: str, tmp_path: Path) -> None:
    memory = import_module("benchmarks.memory")
    options = memory.options(
        ["--model", encoder, "--steps", "20", "--length", "8", "--threads", "1"]
    )
    seen = memory.long_run("qzo int4", options)
    assert len(seen) == 20
    assert min(seen) > 1e6
    (row,) = memory.growth_rows("qzo int4", [100] * 90 + [103] * 10, 5000)
    assert (round(row.value, 6), row.met) == (3.0, False)


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


def test_the_restated_step_is_mezo(encoder: str) -> None:
    """Its four sweeps leave the weights where one merged update would: theta - lr c u."""
    import torch

    from benchmarks.restated import MeZO

    layer = torch.nn.Linear(4, 3).requires_grad_(False)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    step = MeZO(layer, lambda: layer(x).square().mean(), lr=0.1, eps=1e-3)
    generator = torch.Generator().manual_seed(0)
    u = {n: torch.randn(p.shape, generator=generator) for n, p in layer.named_parameters()}
    start = {n: p.clone() for n, p in layer.named_parameters()}

    def loss(sign: int) -> float:
        w, b = (start[n] + sign * 1e-3 * u[n] for n in ("weight", "bias"))
        return float((x @ w.T + b).square().mean())

    slope = (loss(1) - loss(-1)) / 2e-3
    step.step()
    for name, parameter in layer.named_parameters():
        wanted = start[name] - 0.1 * slope * u[name]
        assert torch.allclose(parameter, wanted, atol=2e-4), name


def test_attack_asks_every_contender_on_the_same_images(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="task digits needs scikit-learn")
    words = {"images": 3, "queries": 8, "seeds": 2, "epochs": 1, "timed": 4}
    flags = [word for k, v in words.items() for word in (f"--{k}", str(v))]
    attack = import_module("benchmarks.attack")
    where = ["--only", "digits", "speed", "--threads", "1", "--out", str(tmp_path)]
    attack.main([*where, *flags, "--peers"])
    conforms(json.loads((tmp_path / "attack-speed.json").read_text()), SCHEMA)
    found = json.loads((tmp_path / "attack-digits.json").read_text())
    conforms(found, SCHEMA)
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
    conforms(found, SCHEMA)
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
    conforms(found, SCHEMA)
    commits = {k.split("(")[0]: e["commit"] for k, e in found["details"]["contenders"].items()}
    assert commits == {"subzero": "second", "jaguar": "second", "zo-sign": "first"}
    assert len(found["rows"]) == 6


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "benchmarks").glob("*.py")))
def test_every_benchmark_finds_what_it_imports(name: str) -> None:
    import_module(f"benchmarks.{name}" if name != "__init__" else "benchmarks")
