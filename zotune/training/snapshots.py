"""Snapshots: the full state of a tuner at one step, written as a whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from zotune.errors import FormatError, ZotuneError
from zotune.quant.formats.shards import stored_in

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
    from safetensors.torch import save_file

    metadata = {_KEY: json.dumps(asdict(mark))}
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    with fresh_file(folder / FOLDER / f"{name}.safetensors") as fresh:
        save_file(_apart(tensors), fresh, metadata=metadata)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each in memory of its own, as the format wants; copied only where two share it."""
    held, seen = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        held[name] = plain.clone() if place in seen else plain
        seen.add(place)
    return held


class _Lazy(Mapping[str, Tensor]):
    """The tensors of a snapshot, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.found = stored_in(path)

    def __getitem__(self, name: str) -> Tensor:
        return self.found[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)


def load(folder: Path, name: str) -> tuple[Mapping[str, Tensor], Mark] | None:
    """A snapshot, or None if there is none; its tensors are read as they are asked for. Raises
    FormatError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    path = folder / FOLDER / f"{name}.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            mark = Mark(**json.loads((file.metadata() or {})[_KEY]))
        return _Lazy(path), mark
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"{path} is damaged ({error}); remove it: the journal alone can rebuild the run"
        ) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file as `fresh_file` does."""
    with fresh_file(path) as fresh:
        fresh.write_bytes(data)


@contextmanager
def fresh_file(path: Path) -> Iterator[Path]:
    """A file beside `path`, brought to the disk, that then takes its name.

    Raises:
        ZotuneError: the disk is full, or the folder cannot be written; the old file is intact.
    """
    fresh = path.with_name(f".{path.name}.new")
    try:
        yield fresh
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
        fresh.replace(path)
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except Exception as error:
        fresh.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        if disk_full(error):
            raise cannot_write(path, OSError(28, "No space left on device")) from error
        raise


def disk_full(error: Exception) -> bool:
    """Whether safetensors says so, which it does by an exception of its own."""
    return "No space left" in str(error) or "os error 28" in str(error)


def cannot_write(path: Path, error: OSError) -> ZotuneError:
    """What to say when a result cannot be saved."""
    return ZotuneError(
        f"cannot write {path}: {error.strerror or error}; what was there before is intact: free "
        "some space and go on with --resume"
    )


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())
