"""Fixtures of the task tests; the tiny models are in tiny.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tasks.tiny import bert, llama, make_tokenizer

from zotune.models import Loaded


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real test data, or skip."""
    root = Path(os.environ.get("ZOTUNE_DATA", Path(__file__).parents[2] / "../shared/data"))
    if not root.is_dir():
        pytest.skip(f"no real data: {root} is not a folder (set ZOTUNE_DATA)")
    return root.resolve()


@pytest.fixture
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def tiny_llama(tokenizer: Any) -> Loaded:
    return llama(tokenizer)


@pytest.fixture
def tiny_bert(tokenizer: Any) -> Loaded:
    return bert(tokenizer)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a text or bytes file under tmp_path, return its path."""

    def put(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return put
