"""The cache on the disk: features of every training example, in chunks.

    CACHE/depth-04/header.json             whose features these are, and how they are stored
    CACHE/depth-04/chunk-00000.safetensors bytes of some examples, where each begins, its checksum

A chunk holds examples in a fixed shuffled order, appears under its name whole and on the disk or
not at all, and is mapped into memory, not read. Every example's bytes are checked as they are
read. A chunk that is damaged is taken for missing: whoever owns the model computes it again.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zotune.errors import BadInput, FormatError, ZotuneError
from zotune.training.freezing.codec import Codec
from zotune.training.order import permutation
from zotune.training.snapshots import write_atomic

HEADER = "header.json"
VERSION = 1
CHUNK = 256  # examples
_SEAL = "zotune"  # one key, because the order of several is not fixed


class CacheFull(ZotuneError):
    """The cache would grow beyond its limit."""


class Missing(Exception):
    """A chunk is not there, or damaged; `number` says which."""

    def __init__(self, number: int, damage: str) -> None:
        super().__init__(f"chunk {number} is {damage}")
        self.number, self.damage = number, damage


@dataclass(frozen=True)
class _Chunk:
    """An open chunk: `data` is mapped, the rest is small."""

    data: np.ndarray[Any, Any]
    ends: list[int]
    sums: list[int]
    shapes: list[tuple[int, ...]]


class Store:
    """Features of `count` examples behind one freeze point.

    identity: what must be the same for a cache to be used again (model, data, depth, codec, ...).
    limit: the most bytes that `root`, the folder of all freeze points, may hold.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        count: int,
        codec: Codec,
        dtype: torch.dtype,
        limit: int | None = None,
    ) -> None:
        self.folder, self.count, self.codec, self.dtype = folder, count, codec, dtype
        self.identity, self.limit = {"version": VERSION, **identity}, limit
        text = json.dumps(self.identity, sort_keys=True)
        self._whose = hashlib.sha256(text.encode()).hexdigest()
        self._order = permutation(0, 0, count)
        self._place = np.empty(count, np.int64)
        self._place[self._order] = np.arange(count)
        self._open = dict[int, _Chunk]()

    def claim(self) -> None:
        """Take the folder for these features: a new one, or one that holds the very same.

        Raises:
            BadInput: it holds another model's, data set's, freeze point's or codec's features.
        """
        path = self.folder / HEADER
        if path.exists():
            check_identity(path, self.identity)
            return
        self._make_folder()
        self._write(path, (json.dumps(self.identity, indent=2) + "\n").encode())

    @property
    def chunks(self) -> int:
        return -(-self.count // CHUNK)

    def members(self, number: int) -> list[int]:
        """The examples of a chunk."""
        return [int(i) for i in self._order[number * CHUNK : (number + 1) * CHUNK]]

    def holds(self, number: int) -> bool:
        """Whether a chunk is there and its index is sound."""
        try:
            self._chunk(number)
        except Missing:
            return False
        return True

    def put(self, number: int, features: Sequence[Tensor]) -> None:
        """Publish a chunk: features of its members, in their order.

        Raises:
            CacheFull: it would not fit the limit; nothing is written.
            ZotuneError: the disk is full; nothing is left half written.
        """
        from safetensors.torch import save

        pieces = [self.codec.encode(f) for f in features]
        rank = max(f.dim() for f in features)
        tensors = {
            "data": torch.frombuffer(bytearray(b"".join(pieces) or b"\0"), dtype=torch.uint8),
            "ends": torch.tensor([len(p) for p in pieces]).cumsum(0),
            "sums": torch.tensor([zlib.crc32(p) for p in pieces]),
            "shapes": torch.tensor([[*f.shape] + [-1] * (rank - f.dim()) for f in features]),
        }
        data = save(tensors, metadata={_SEAL: _sealed(tensors, self._whose)})
        self._open.pop(number, None)
        self._write(self._path(number), data)

    def get(self, index: int) -> Tensor:
        """The features of one example.

        Raises:
            Missing: its chunk is not there or damaged.
        """
        number, row = divmod(int(self._place[index]), CHUNK)
        chunk = self._chunk(number)
        start = chunk.ends[row - 1] if row else 0
        data = chunk.data[start : chunk.ends[row]].tobytes()
        if zlib.crc32(data) != chunk.sums[row]:
            self._open.pop(number, None)
            raise Missing(number, "damaged")
        return self.codec.decode(data, chunk.shapes[row], self.dtype)

    @property
    def size(self) -> int:
        """What this freeze point's features take on the disk."""
        return folder_bytes(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"chunk-{number:05d}.safetensors"

    def _chunk(self, number: int) -> _Chunk:
        if number not in self._open:
            count = len(self.members(number))
            self._open[number] = _read(self._path(number), number, count, self._whose)
        return self._open[number]

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(
                f"cannot make cache_dir {self.folder}: {error.strerror}; give another one"
            ) from error

    def _write(self, path: Path, data: bytes) -> None:
        old = path.stat().st_size if path.exists() else 0
        check_room(self.folder.parent, len(data) - old, self.limit)
        write_atomic(path, data)


def check_identity(path: Path, wanted: dict[str, Any]) -> None:
    """Refuse a cache whose header says other things than `wanted`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(
            f"{path} cannot be read ({error}); remove the folder, or give another cache_dir"
        ) from error
    keys = wanted.keys() | (found.keys() if isinstance(found, dict) else set())
    other = sorted(k for k in keys if not isinstance(found, dict) or found.get(k) != wanted.get(k))
    if other:
        told = ", ".join(
            f"{k} {found.get(k) if isinstance(found, dict) else None!r} (want {wanted.get(k)!r})"
            for k in other
        )
        raise BadInput(
            f"{path.parent} holds the features of another run: {told}; give another cache_dir, or "
            "remove that folder"
        )


def check_room(root: Path, size: int, limit: int | None) -> None:
    """Refuse to let the cache in `root` grow by `size` bytes beyond its limit."""
    if limit is not None and (used := folder_bytes(root)) + size > limit:
        raise CacheFull(
            f"the cache in {root} holds {used:,} bytes and would grow by {size:,} beyond "
            f"cache_limit={limit:,}: raise it and go on with --resume (what is cached stays), or "
            "start anew with a stronger cache_codec"
        )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; 0 where there is none."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _read(path: Path, number: int, count: int, whose: str) -> _Chunk:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise Missing(number, "missing")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in ("data", "ends", "sums", "shapes")}
            seal = (file.metadata() or {}).get(_SEAL)
    except (OSError, SafetensorError) as error:
        raise Missing(number, "damaged") from error
    whole = all(len(tensors[name]) == count for name in ("ends", "sums", "shapes"))
    if not whole or seal != _sealed(tensors, whose):
        raise Missing(number, "damaged")
    shapes = [tuple(n for n in row if n >= 0) for row in tensors["shapes"].tolist()]
    ends, sums = tensors["ends"].tolist(), tensors["sums"].tolist()
    return _Chunk(tensors["data"].numpy(), ends, sums, shapes)


def _sealed(tensors: dict[str, Tensor], whose: str) -> str:
    """What a chunk says of itself: whose it is, and one checksum over all but the data."""
    total = 0
    for name in ("ends", "sums", "shapes"):
        total = zlib.crc32(tensors[name].contiguous().numpy().tobytes(), total)
    return f"{whose} {total:08x}"
