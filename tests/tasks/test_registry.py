from __future__ import annotations

import subprocess
import sys

import pytest

from zotune import tasks
from zotune.errors import BadInput
from zotune.tasks.task import register


def test_every_name_is_listed_and_described() -> None:
    expected = {
        "sst2", "sst5", "mr", "trec", "rte", "cb", "boolq", "copa", "wic", "wsc", "multirc",
        "snli", "mnli", "squad", "wikitext2", "ptb", "tickets", "tinystories", "ag_news",
        "classification", "choice", "sft", "lm", "qa", "images", "digits", "mnist", "cifar10",
        "diffusion",
    }  # fmt: skip
    assert set(tasks.names()) == expected
    for name in tasks.names():
        entry = tasks.entry(name)
        assert entry.summary
        assert {"max_length", "size"} & set(entry.options) or name == "diffusion"


def test_unknown_names_and_options_offer_the_nearest() -> None:
    with pytest.raises(BadInput, match="unknown task 'sst-2', did you mean 'sst2'"):
        tasks.get("sst-2")
    with pytest.raises(BadInput, match="no option 'max_len', did you mean 'max_length'"):
        tasks.get("sst2", max_len=3)


def test_a_double_name_fails_loudly() -> None:
    with pytest.raises(BadInput, match="already a task called 'sst2'"):
        register("sst2", lambda: None, "again")  # type: ignore[arg-type, return-value]


def test_every_exported_name_resolves() -> None:
    assert all(hasattr(tasks, name) for name in tasks.__all__)


def test_importing_tasks_stays_light() -> None:
    code = (
        "import sys, zotune.tasks; "
        "print([m for m in ('transformers', 'datasets', 'pyarrow', 'rich', 'pandas') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
