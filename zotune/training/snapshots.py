"""Snapshots: the full state of a tuner at one step, written as a whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from zotune.errors import FormatError, ZotuneError

FOLDER = "snapshots"
_KEY = "zotune"


@dataclass(frozen=True)
class Mark:
    """Where a snapshot stands. `start` is the CRC that names the journal it belongs to."""

    done: int
    applied: int
    seconds: float
    metric: float | None = None
    start: str = ""


def save(folder: Path, name: str, tensors: Mapping[str, Tensor], mark: Mark) -> None:
    """Write `snapshots/<name>.safetensors`; the old one stays until the new one is on the disk."""
    from safetensors.torch import save as to_bytes

    held = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    data = to_bytes(held, metadata={_KEY: json.dumps(asdict(mark))})
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    write_atomic(folder / FOLDER / f"{name}.safetensors", data)


def load(folder: Path, name: str) -> tuple[dict[str, Tensor], Mark] | None:
    """A snapshot, or None if there is none. Raises FormatError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    path = folder / FOLDER / f"{name}.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            mark = Mark(**json.loads((file.metadata() or {})[_KEY]))
            return {k: file.get_tensor(k).clone() for k in file.keys()}, mark  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"{path} is damaged ({error}); remove it: the journal alone can rebuild the run"
        ) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file beside its place, bring it to the disk, then let it take its name.

    Raises:
        ZotuneError: the disk is full, or the folder cannot be written; the old file is intact.
    """
    fresh = path.with_name(f".{path.name}.new")
    try:
        with fresh.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> ZotuneError:
    """What to say when a result cannot be saved."""
    return ZotuneError(
        f"cannot write {path}: {error.strerror or error}; what was there before is intact: free "
        "some space and go on with --resume"
    )


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())
