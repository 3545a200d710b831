"""The header of a GGUF file, read with every count and length held against the file's size.

Layout (GGUF 2 and 3, little-endian): "GGUF", u32 version, u64 tensors, u64 entries of metadata,
each a name, a u32 type and a value; then per tensor its name, u32 axes, u64 sizes (the innermost
first), u32 type and u64 offset; then, from the next multiple of `general.alignment`, the data. A
string is a u64 length and UTF-8. Arrays (the vocabulary) are skipped: what reads the tokenizer
reads them again.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor

from zotune.errors import FormatError

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
# Formats of struct by GGUF's numbers for types of metadata; 8 is a string, 9 an array.
SCALARS: Final = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
STRING, ARRAY = 8, 9
AXES: Final = 4
LONGEST_NAME: Final = 65535


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file: bytes start to stop. `shape` is torch's, the outermost axis first."""

    path: Path
    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def read(self) -> Tensor:
        """Its bytes, uint8 (rows, bytes of a row), in memory of their own.

        Raises:
            FormatError: if the file has become shorter.
        """
        data = torch.empty(self.stop - self.start, dtype=torch.uint8)
        with self.path.open("rb") as file:
            file.seek(self.start)
            if file.readinto(data.numpy().data) != len(data):
                raise FormatError(f"{self.path} is shorter than its header says; fetch it again")
        return data.reshape(self.shape[0] if len(self.shape) > 1 else 1, -1)

    def overwrite(self, path: Path, data: Tensor) -> None:
        """Put bytes in their place in a copy of the file."""
        assert data.numel() == self.stop - self.start
        with path.open("r+b") as file:
            file.seek(self.start)
            file.write(data.contiguous().numpy().data)


@dataclass(frozen=True)
class GgufHeader:
    """What a file holds. Values of metadata that are arrays are None."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def gguf_package() -> Any:
    """The `gguf` package, which knows ggml's types and the names of tensors.

    Raises:
        FormatError: if it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise FormatError(
            "GGUF files are read with the package gguf: pip install 'zotune[gguf]'"
        ) from None
    return gguf


@cache
def ggml_types() -> dict[int, tuple[str, int, int]]:
    """ggml's types by number: name, weights in a block, bytes of a block.

    >>> ggml_types()[2]
    ('Q4_0', 32, 18)
    """
    sizes = gguf_package().GGML_QUANT_SIZES
    return {int(kind): (kind.name, *size) for kind, size in sizes.items()}


def read_header(path: Path) -> GgufHeader:
    """The header of a file, held against its size; no tensor is read.

    Raises:
        FormatError: if it is no GGUF file of version 2 or 3, cut off, or contradicts itself.
    """
    try:
        with path.open("rb") as file:
            return _Reader(path, file).header()
    except OSError as error:
        raise FormatError(f"{path} cannot be read ({error})") from error


class _Reader:
    """A file and how much of it is left."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size

    def header(self) -> GgufHeader:
        if self.take(4, "GGUF's first bytes") != MAGIC:
            raise FormatError(f"{self.path} does not start with 'GGUF'; it is no GGUF file")
        version = self.number("I", "version")
        if version not in VERSIONS:
            raise FormatError(
                f"{self.path} has GGUF version {version}; read are {VERSIONS}, little-endian: "
                "convert it again with a current llama.cpp"
            )
        tensors, entries = self.number("Q", "tensor count"), self.number("Q", "metadata count")
        metadata: dict[str, Any] = {}
        for _ in range(entries):  # ends with the file at the latest
            name = self.text("a metadata name", LONGEST_NAME)
            if name in metadata:
                raise self.damaged(f"metadata {name!r} is there twice")
            metadata[name] = self.value(name)
        records = [self.record() for _ in range(self.fits(tensors, 24, "tensor count"))]
        return GgufHeader(self.path, metadata, self.placed(records, _alignment(self, metadata)))

    def take(self, length: int, what: str) -> bytes:
        return self.file.read(self.fits(length, 1, what))

    def fits(self, count: int, least: int, what: str) -> int:
        """`count` things of `least` bytes, refused where the rest of the file is smaller."""
        if count * least > self.size - self.file.tell():
            raise self.damaged(f"{what} does not fit into the file")
        return count

    def number(self, kind: str, what: str) -> Any:
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind), what))[0]

    def text(self, what: str, longest: int | None = None) -> str:
        length = self.number("Q", what)
        if longest is not None and length > longest:
            raise self.damaged(f"{what} of {length} bytes")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is no UTF-8") from None

    def value(self, name: str) -> Any:
        kind = self.number("I", name)
        if kind in SCALARS:
            return self.number(SCALARS[kind], name)
        if kind == STRING:
            return self.text(name)
        if kind == ARRAY:
            return self.skip(name)
        raise self.damaged(f"metadata {name!r} is of unknown type {kind}")

    def skip(self, name: str) -> None:
        kind, count = self.number("I", name), self.number("Q", name)
        if kind in SCALARS:
            width = struct.calcsize("<" + SCALARS[kind])
            self.file.seek(self.fits(count, width, name) * width, os.SEEK_CUR)
        elif kind == STRING:
            for _ in range(self.fits(count, 8, name)):
                length = self.number("Q", name)
                self.file.seek(self.fits(length, 1, name), os.SEEK_CUR)
        else:
            raise self.damaged(f"metadata {name!r} is an array of type {kind}")

    def record(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and offset of a tensor."""
        name = self.text("a tensor's name", LONGEST_NAME)
        axes = self.number("I", name)
        if not 1 <= axes <= AXES:
            raise self.damaged(f"tensor {name!r} has {axes} axes")
        shape = tuple(self.number("Q", name) for _ in range(axes))
        return name, shape[::-1], self.number("I", name), self.number("Q", name)

    def placed(self, records: list[Any], alignment: int) -> dict[str, GgufTensor]:
        """Where the tensors lie, checked to lie in the file, aligned and apart."""
        base = -(-self.file.tell() // alignment) * alignment
        found: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in records:
            if name in found:
                raise self.damaged(f"tensor {name!r} is there twice")
            if kind not in ggml_types():
                raise self.damaged(f"tensor {name!r} is of unknown type {kind}")
            type_, weights, width = ggml_types()[kind]
            count = torch.Size(shape).numel() if max(shape) < 1 << 40 else 0
            if not 0 < count < 1 << 60 or shape[-1] % weights or offset % alignment:
                raise self.damaged(f"tensor {name!r} is {type_} {shape} at offset {offset}")
            start = base + offset
            stop = start + count // weights * width
            if stop > self.size:
                raise self.damaged(f"tensor {name!r} ends behind the file")
            found[name] = GgufTensor(self.path, name, type_, shape, start, stop)
        ordered = sorted(found.values(), key=lambda t: t.start)
        for one, other in pairwise(ordered):
            if other.start < one.stop:
                raise self.damaged(f"tensors {one.name!r} and {other.name!r} overlap")
        return found

    def damaged(self, what: str) -> FormatError:
        return FormatError(f"{self.path} is damaged: {what}; fetch it again")


def _alignment(reader: _Reader, metadata: Mapping[str, Any]) -> int:
    found = metadata.get("general.alignment", 32)
    if type(found) is not int or found < 1 or found & (found - 1) or found > 1 << 20:
        raise reader.damaged(f"general.alignment is {found!r}")
    return found
