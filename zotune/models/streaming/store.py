"""Tensors that lie in files and are in memory only while somebody uses them.

All of them are mapped, so they can be read and written at any time, by any code: the system brings
a page in when it is touched. What is *resident* is steered by advice (`bring`, `let_go`); advice
changes no value.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from zotune.errors import BadInput, FormatError, ZotuneError
from zotune.quant.formats.shards import Entry, raw_bytes

PAGE: Final = mmap.PAGESIZE
ALIGNED: Final = 64  # bytes: a BLAS rounds sums in another order elsewhere
_DONT_NEED, _POPULATE_READ = 4, 22  # Linux's numbers for madvise
# Nothing is promised for pages that nobody writes: a file may be larger than memory.
_NO_RESERVE: Final = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: memory from `address`, a file's bytes from `offset`."""

    address: int
    size: int
    file: int
    offset: int
    writable: bool

    def bring(self) -> None:
        """Have it in this process's memory."""
        _advise(self, _POPULATE_READ)

    def let_go(self) -> None:
        """Leave this process's memory; what was written is kept."""
        _advise(self, _DONT_NEED)

    def forget(self) -> None:
        """Leave the system's cache as well."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):
                os.posix_fadvise(self.file, self.offset, self.size, os.POSIX_FADV_DONTNEED)


def bring(places: Sequence[Place]) -> None:
    """Have these in memory.

    Plain reads come first, neighbours in one go: the system reads ahead of those in larger pieces,
    and keeps them in larger pages, than of pages that are touched.
    """
    held = memoryview(_scratch())
    for file, start, stop in stretches(places):
        if _cached(file, start) and _cached(file, stop - 1):
            continue
        for here in range(start, stop, len(held)):
            os.preadv(file, [held[: stop - here]], here)
    for place in places:
        place.bring()


def stretches(places: Sequence[Place]) -> list[tuple[int, int, int]]:
    """(file, start, stop) of what lies together, but for a page or less.

    >>> stretches([Place(0, 9, 3, 100, True), Place(0, 5, 3, 60, True), Place(0, 5, 4, 60, True)])
    [(3, 60, 109), (4, 60, 65)]
    """
    found: list[tuple[int, int, int]] = []
    for place in sorted(places, key=lambda p: (p.file, p.offset)):
        stop = place.offset + place.size
        if found and found[-1][0] == place.file and place.offset - found[-1][2] <= PAGE:
            found[-1] = (place.file, found[-1][1], max(stop, found[-1][2]))
        else:
            found.append((place.file, place.offset, stop))
    return found


class Store:
    """A shelf of mapped tensors.

    What needs no change is mapped from the checkpoint itself; everything else, and what training
    moves, lies in a work file without a name, which ends with the process.

    folder: where the work file is made; the system's temporary folder when None.

    >>> store = Store()
    >>> held = store.put(torch.arange(3.0))
    >>> held.tolist(), store.place(held).writable, store.place(torch.ones(1))
    ([0.0, 1.0, 2.0], True, None)
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        if os.name != "posix":
            raise BadInput("streaming maps files as POSIX systems do; drop --stream")
        try:
            self.work = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise _no_room(folder, error) from error
        self.folder = folder
        self.written = 0
        self.files: dict[Path, Any] = {}
        self.maps: dict[Path, mmap.mmap] = {}
        self.held: list[mmap.mmap] = []  # an address must not become another tensor's
        self.places: dict[int, Place] = {}

    def take(self, entry: Entry) -> Tensor:
        """A stored tensor, mapped from its file where it lies well; else a copy of it.

        The map is private: nothing here can write into a checkpoint.
        """
        size = entry.stop - entry.start
        needed = 1 if not entry.dtype.is_floating_point else ALIGNED
        if not size or entry.start % max(needed, entry.dtype.itemsize):
            return self.put(entry.read())
        if entry.path not in self.maps:
            self._open(entry.path)
        whole = self.maps[entry.path]
        if len(whole) < entry.stop:
            raise FormatError(f"{entry.path} is shorter than its header says; fetch it again")
        data = torch.frombuffer(whole, dtype=torch.uint8, count=size, offset=entry.start)
        file = self.files[entry.path].fileno()
        self._note(Place(data.data_ptr(), size, file, entry.start, False))
        return data.view(entry.dtype).reshape(entry.shape)

    def put(self, tensor: Tensor) -> Tensor:
        """A copy in the work file.

        Raises:
            ZotuneError: the disk is full.
        """
        tensor = tensor.detach()
        size = tensor.numel() * tensor.element_size()
        if not size:
            return tensor
        start, self.written = self.written, self.written + -(-size // PAGE) * PAGE
        try:
            _reserve(self.work.fileno(), start, self.written - start)
        except OSError as error:
            raise _no_room(self.folder, error) from error
        mapped = mmap.mmap(
            self.work.fileno(), self.written - start, mmap.MAP_SHARED,
            mmap.PROT_READ | mmap.PROT_WRITE, offset=start,
        )  # fmt: skip
        self.held.append(mapped)
        data = torch.frombuffer(mapped, dtype=torch.uint8, count=size)
        data.copy_(raw_bytes(tensor.cpu()))
        place = Place(data.data_ptr(), size, self.work.fileno(), start, True)
        self._note(place)
        place.let_go()
        return data.view(tensor.dtype).reshape(tensor.shape)

    def own_(self, tensor: Tensor) -> None:
        """Move a tensor, its identity kept, to where it may be written."""
        place = self.place(tensor)
        if place is None or not place.writable:
            tensor.data = self.put(tensor)

    def place(self, tensor: Tensor) -> Place | None:
        """Where a whole tensor of this store lies; None for any other."""
        found = self.places.get(tensor.data_ptr()) if tensor.device.type == "cpu" else None
        same = found is not None and found.size == tensor.numel() * tensor.element_size()
        return found if same else None

    def close(self) -> None:
        """Maps stay valid as long as somebody holds their tensors."""
        for file in (self.work, *self.files.values()):
            file.close()

    def _note(self, place: Place) -> None:
        self.places[place.address] = place

    def _open(self, path: Path) -> None:
        file = self.files[path] = path.open("rb")
        self.maps[path] = mmap.mmap(
            file.fileno(), 0, mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        )


def _reserve(file: int, start: int, size: int) -> None:
    """Space on the disk: a full one must say so here, not by a signal when a page is written."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, start, size)
    else:
        os.ftruncate(file, start + size)


def _no_room(folder: str | Path | None, error: OSError) -> ZotuneError:
    return ZotuneError(
        f"cannot make the work file of a streamed model in {folder or tempfile.gettempdir()}: "
        f"{error.strerror or error}; free some space, or give offload_folder"
    )


def _advise(place: Place, advice: int) -> None:
    """madvise by ctypes, which lets other threads run meanwhile; advice that the system does not
    know is no error."""
    start = place.address // PAGE * PAGE
    _madvise()(
        ctypes.c_void_p(start), ctypes.c_size_t(place.address + place.size - start),
        ctypes.c_int(advice),
    )  # fmt: skip


def _cached(file: int, offset: int) -> bool:
    """Whether a byte is in memory already; what lies in a file system in memory cannot be asked."""
    try:
        return bool(os.preadv(file, [bytearray(1)], offset, getattr(os, "RWF_NOWAIT", 0)))
    except BlockingIOError:
        return False
    except OSError:
        return True


@cache
def _scratch() -> bytearray:
    """What is read and not looked at; threads may share it."""
    return bytearray(8 << 20)


@cache
def _madvise() -> Any:
    return ctypes.CDLL(None).madvise
