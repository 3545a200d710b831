"""Keys of a run: Hugging Face's names, short names, clear errors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from zotune.errors import BadInput
from zotune.training.config import ALIASES, TrainConfig, normalised
from zotune.training.report import read_config, save_config

NAMES = [f.name for f in dataclasses.fields(TrainConfig)]


def test_short_names_and_dashes() -> None:
    config = TrainConfig.of({"out": "x", "lr": 0.5, "batch-size": 3, "steps": 7, "zo_eps": 0.1})
    assert (config.learning_rate, config.per_device_train_batch_size) == (0.5, 3)
    assert (config.max_steps, config.eps) == (7, 0.1)


def test_an_unknown_key_offers_the_nearest() -> None:
    with pytest.raises(BadInput, match="did you mean learning_rate"):
        TrainConfig.of({"out": "x", "learning_rat": 0.5})


def test_one_key_under_two_names_is_an_error() -> None:
    with pytest.raises(BadInput, match="given twice"):
        TrainConfig.of({"out": "x", "lr": 1, "learning_rate": 2})


def test_every_short_name_stands_for_a_key() -> None:
    used = {ALIASES[a] for a in ALIASES}
    assert used <= set(NAMES)
    assert not set(ALIASES) & set(NAMES)


BAD = [
    {"max_steps": 0},
    {"micro_batch": 0},
    {"seed": -1},
    {"output_dir": ""},
    {"load_best_model_at_end": True},
]


@pytest.mark.parametrize("bad", BAD)
def test_values_are_checked_at_once(bad: dict[str, object]) -> None:
    with pytest.raises(BadInput, match=next(iter(bad))):
        TrainConfig(**{"output_dir": "x", **bad})  # type: ignore[arg-type]


def test_a_configuration_survives_yaml(tmp_path: Path) -> None:
    config = TrainConfig(
        output_dir=str(tmp_path), learning_rate=1e-6, task_options={"labels": ["ä"]}
    )
    save_config(config)
    assert read_config(tmp_path) == config


def test_normalised_keeps_values() -> None:
    assert normalised({"out": "x"}, NAMES) == {"output_dir": "x"}
