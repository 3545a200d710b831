"""Tiny models on disk, small data files, and a way to call the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tasks.tiny import bert, llama, make_tokenizer

from zotune.cli import main

POSITIVE = ["the film was great fun", "I liked it", "a great film and good fun"]
NEGATIVE = ["the film was terrible", "dull and bad", "a terrible dull film I left"]


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: Any) -> Path:
    return _saved(bert(make_tokenizer()), tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: Any) -> Path:
    return _saved(llama(make_tokenizer()), tmp_path_factory.mktemp("llama"))


def _saved(loaded: Any, folder: Path) -> Path:
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: Any) -> Path:
    """A folder with train, dev and test rows."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 24), ("dev", 8), ("test", 8)):
        rows = []
        for i in range(count):
            text = (POSITIVE if i % 2 else NEGATIVE)[i // 2 % 3]
            rows.append({"text": f"{text} {split} {i}", "label": "good" if i % 2 else "bad"})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@dataclass
class Said:
    """What a command wrote and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found

    @property
    def error(self) -> str:
        """The one line of an expected error: nothing on standard output, no traceback."""
        assert self.code == 2, self.err
        assert not self.out
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        return lines[0]


Zotune = Callable[..., Said]


@pytest.fixture
def zotune(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Zotune:
    monkeypatch.delenv("ZOTUNE_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: Any) -> Said:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return Said(code, *capfd.readouterr())

    return call


@pytest.fixture
def short(bert_folder: Path, data: Path, tmp_path: Path) -> list[Any]:
    """Flags of a run of a few steps, without the command's name."""
    flags = {
        "task": "classification(label_texts=['bad', 'good'])",
        "data": data,
        "model": bert_folder,
        "out": tmp_path / "run",
        "steps": 4,
        "batch-size": 4,
        "report-to": "none",
        "method": "mezo(units='relative', lr=0.01, eps=0.01)",
    }
    return [word for key, value in flags.items() for word in (f"--{key}", value)]
