"""The journal: a run as the list of its estimates, durable before any of them is applied.

    magic | sizes and checksums | JSON header | attachments (safetensors) | record | record | ...

A record is `n` float64 coefficients, a float32 loss and a CRC-32 chained over everything before:
16 bytes a step for one coefficient. Base model + journal give the tuned model back. A record whose
loss is a NaN of our own says between two steps that layers are frozen, and how many.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from zotune.errors import JournalError

log = logging.getLogger("zotune")
NAME = "journal.zoj"
MAGIC = b"zotune-journal\x00\x01"  # the last byte is the version of this layout
_SIZES = struct.Struct("<QQII")  # bytes of header and attachments, their CRCs
MAX_HEADER = 1 << 24
MAX_ATTACHED = 1 << 36
_END_BITS = 0x7FF8_7A6F_656E_6421
_FREEZE_BITS = 0x7FE5_0000  # a NaN that no computation gives; the depth is in its low 16 bits
_LARGEST = float(np.finfo(np.float32).max)


def record_bytes(coefficients: int) -> int:
    """Size of one record.

    >>> record_bytes(1), record_bytes(4)
    (16, 40)
    """
    return 8 * coefficients + 8


@dataclass(frozen=True)
class Record:
    """One step: its coefficients and the mean loss it saw."""

    coefficients: tuple[float, ...]
    loss: float


@dataclass(frozen=True)
class Journal:
    """What a journal file holds.

    `records` are the steps done; `kept` is the step whose state the run ended with (the last, or
    the best), None while it has not ended. `freezes` are (step, depth): from that step on, so many
    layers stay as they are.
    """

    path: Path
    header: dict[str, Any]
    attached: dict[str, Tensor]
    records: Sequence[Record]
    kept: int | None
    size: int
    crc: int
    start_crc: int = 0
    freezes: tuple[tuple[int, int], ...] = ()

    @classmethod
    def read(cls, path: str | Path, *, repair: bool = False, torn: bool = False) -> Journal:
        """Read and check a journal file.

        Args:
            repair: keep the good prefix of a damaged journal, and say so.
            torn: drop an incomplete last record, as a process killed while writing leaves it.

        Raises:
            JournalError: no journal, a damaged header, or damaged records; says how many steps
                are good.
        """
        path = Path(path)
        path = path / NAME if path.is_dir() else path
        try:
            data = path.read_bytes()
        except OSError as error:
            raise JournalError(f"cannot read the journal {path}: {error.strerror}") from error
        header, attached, start, crc = _read_head(path, data)
        found = _read_records(data, start, crc, int(header["coefficients"]))
        if found.fault and not repair and not (torn and found.torn):
            raise JournalError(
                f"{path}: {found.fault} of step {len(found.records)}; the first "
                f"{len(found.records)} steps are good: --repair goes on with those"
            )
        if found.fault:
            log.warning("%s: %s; keeping the first %d steps", path, found.fault, len(found.records))
        return cls(
            path, header, attached, found.records, found.kept, found.size, found.crc, crc,
            tuple(found.freezes),
        )  # fmt: skip


@dataclass
class _Records:
    records: list[Record]
    kept: int | None
    size: int
    crc: int
    fault: str = ""
    torn: bool = False
    freezes: list[tuple[int, int]] = field(default_factory=list)


def _read_head(path: Path, data: bytes) -> tuple[dict[str, Any], dict[str, Tensor], int, int]:
    """(header, attachments, where records start, CRC so far)."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    start = len(MAGIC) + _SIZES.size
    if data[: len(MAGIC)] != MAGIC:
        if data[: len(MAGIC) - 1] == MAGIC[:-1]:
            raise JournalError(
                f"{path}: journal version {data[len(MAGIC) - 1]}; this zotune reads 1"
            )
        raise JournalError(f"{path} is not a zotune journal (its first bytes are others)")
    cut = JournalError(
        f"{path}: the journal is cut off or damaged inside its header; no step is left"
    )
    if len(data) < start:
        raise cut
    sizes = data[len(MAGIC) : start]
    head, extra, head_crc, extra_crc = _SIZES.unpack(sizes)
    if head > MAX_HEADER or extra > MAX_ATTACHED or len(data) < start + head + extra:
        raise cut
    header, attached = data[start : start + head], data[start + head : start + head + extra]
    if zlib.crc32(header) != head_crc or zlib.crc32(attached) != extra_crc:
        raise cut
    try:
        values = json.loads(header)
        tensors = load(attached) if attached else {}
    except (ValueError, SafetensorError) as error:
        raise cut from error
    return values, tensors, start + head + extra, zlib.crc32(sizes)


def _read_records(data: bytes, start: int, crc: int, n: int) -> _Records:
    size = record_bytes(n)
    found = _Records([], None, start, crc)
    while found.size < len(data):
        piece = data[found.size : found.size + size]
        if len(piece) < size:
            found.fault, found.torn = "the journal is cut off inside the record", True
            break
        body, (wanted,) = piece[:-4], struct.unpack("<I", piece[-4:])
        crc = zlib.crc32(body, found.crc)
        if crc != wanted:
            found.fault = "wrong checksum in the record"
            break
        if n and struct.unpack("<Q", body[:8])[0] == _END_BITS:
            found.kept = struct.unpack("<I", body[-4:])[0]
            if len(data) > found.size + size:
                found.fault = "something stands behind the end mark"
            break  # whoever goes on writes over the end mark
        values, (bits,) = struct.unpack(f"<{n}df", body), struct.unpack("<I", body[-4:])
        if bits & 0xFFFF_0000 == _FREEZE_BITS:
            found.freezes.append((len(found.records), bits & 0xFFFF))
        else:
            found.records.append(Record(values[:n], values[n]))
        found.crc = crc
        found.size += size
    return found


class JournalWriter:
    """Appends records; each is on its way to the disk before `append` returns.

    `sync` brings every so many records to the disk itself (1: each, so that even a power cut
    loses nothing); a killed process loses no record either way.
    """

    def __init__(self, path: Path, n: int, size: int, crc: int, sync: int = 1) -> None:
        self.path, self.n, self.size, self.crc, self.sync = path, n, size, crc, sync
        self.count = 0
        self.start_crc = crc
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        _lock(self._file, path)
        os.ftruncate(self._file, size)

    @classmethod
    def create(
        cls, path: Path, header: Mapping[str, Any], attached: Mapping[str, Tensor], sync: int = 1
    ) -> JournalWriter:
        """Start a journal: header and attachments are written as a whole or not at all."""
        from safetensors.torch import save

        from zotune.training.snapshots import write_atomic

        text = json.dumps(header, sort_keys=True).encode()
        extra = save(dict(attached)) if attached else b""
        if len(text) > MAX_HEADER or len(extra) > MAX_ATTACHED:
            raise JournalError(f"a journal header of {len(text)} + {len(extra)} bytes is too large")
        sizes = _SIZES.pack(len(text), len(extra), zlib.crc32(text), zlib.crc32(extra))
        write_atomic(path, MAGIC + sizes + text + extra)
        size = len(MAGIC) + _SIZES.size + len(text) + len(extra)
        return cls(path, int(header["coefficients"]), size, zlib.crc32(sizes), sync)

    @classmethod
    def reopen(cls, journal: Journal, sync: int = 1) -> JournalWriter:
        """Go on behind the records that were read; whatever stood after them is cut off."""
        n = int(journal.header["coefficients"])
        writer = cls(journal.path, n, journal.size, journal.crc, sync)
        writer.start_crc = journal.start_crc
        return writer

    def append(self, coefficients: Sequence[float], loss: float) -> None:
        """One step. Raises JournalError, with nothing half written, when the disk is full."""
        if len(coefficients) != self.n:
            raise JournalError(f"a record of {len(coefficients)} coefficients; want {self.n}")
        if np.isfinite(loss):  # a loss beyond float32 is still a finite one
            loss = min(max(loss, -_LARGEST), _LARGEST)
        elif np.isnan(loss):  # whatever its bits say
            loss = float("nan")
        with np.errstate(over="ignore"):
            self._write(struct.pack(f"<{self.n}d", *coefficients) + np.float32(loss).tobytes())
        self.count += 1
        if self.count % self.sync == 0:
            _to_disk(self._file)

    def freeze(self, depth: int) -> None:
        """From the next step on, so many layers are frozen."""
        self._write(struct.pack(f"<{self.n}dI", *[0.0] * self.n, _FREEZE_BITS | depth))
        _to_disk(self._file)

    def finish(self, kept: int) -> None:
        """Say that the run has ended, and which step's state it kept."""
        if self.n:
            rest = struct.pack(f"<{self.n - 1}d", *[0.0] * (self.n - 1))
            self._write(struct.pack("<Q", _END_BITS) + rest + struct.pack("<I", kept))
        _to_disk(self._file)

    def _write(self, body: bytes) -> None:
        crc = zlib.crc32(body, self.crc)
        piece = body + struct.pack("<I", crc)
        try:
            written = os.pwrite(self._file, piece, self.size)
            if written < len(piece):
                raise OSError(28, "no space left on device")
        except OSError as error:
            os.ftruncate(self._file, self.size)
            raise JournalError(
                f"cannot write the journal {self.path}: {error.strerror}; every step so far is "
                "safe: free some space and go on with --resume"
            ) from error
        self.crc = crc
        self.size += len(piece)

    def close(self) -> None:
        if self._file >= 0:
            _to_disk(self._file)
            os.close(self._file)
            self._file = -1


def _lock(file: int, path: Path) -> None:
    """Two processes that write one journal would ruin it."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        raise JournalError(f"another process is writing {path}; wait for it or stop it") from error


_to_disk = getattr(os, "fdatasync", os.fsync)
