"""ONNX files: parsed by the `onnx` package, and where their tensors' bytes lie.

A file is one protobuf message, or one and files of raw tensors beside it ("external data"). The
package gives values, not places, so places are found here: a protobuf message is a row of fields,
each a varint (number << 3 | kind) and then, by kind, a varint (0), 8 bytes (1), a length and as
many bytes (2), or 4 bytes (5). All but the path model.graph.initializer is skipped.
"""

from __future__ import annotations

import hashlib
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch

from zotune.errors import FormatError
from zotune.quant.formats.shards import Entry

# Bits of a number, by ONNX's numbers for types.
BITS: Final = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16,
    17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2,
}  # fmt: skip
# The types of tensors that are tuned.
FLOATS: Final = {1: torch.float32, 10: torch.float16}
EXTERNAL: Final = 1
# Numbers of fields: ModelProto.graph, GraphProto.initializer, and of a TensorProto.
GRAPH, INITIALIZER, NAME, RAW, FLOAT_DATA = 7, 5, 8, 9, 4
LONGEST_VARINT: Final = 10
CHUNK: Final = 1 << 24


def onnx_packages() -> tuple[Any, Any]:
    """The packages `onnx` and `onnxruntime`.

    Raises:
        FormatError: if one is not installed.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError:
        raise FormatError(
            "ONNX files are read with the packages onnx and onnxruntime: pip install 'zotune[onnx]'"
        ) from None
    return onnx, onnxruntime


def load_model(path: Path) -> Any:
    """The file as a ModelProto, its external tensors not read but held against their files.

    Raises:
        FormatError: if it is no whole ONNX file, or its external data are not what it says.
    """
    onnx, _ = onnx_packages()
    try:
        model = onnx.load_model(path, load_external_data=False)
    except Exception as error:  # protobuf's own, or whatever a damaged file makes of it
        raise FormatError(f"{path} is not a whole ONNX file ({error}); fetch it again") from error
    if not model.graph.node or not model.graph.output:
        raise FormatError(f"{path} holds no ONNX graph; fetch it again")
    if any(isinstance(text, bytes) for message in _messages(model) for text in _texts(message)):
        raise FormatError(f"{path} is damaged: a name is no UTF-8; fetch it again")
    places = sorted(_external(path, tensor) for tensor in _outside(model))
    for (one, _, stop), (other, start, end) in pairwise(places):
        if one == other and start < min(stop, end):
            raise FormatError(f"two tensors of {path} share bytes of {one.name}; fetch both again")
    return model


def entries(path: Path, model: Any) -> dict[str, Entry]:
    """The float initializers whose bytes lie in one run, by name.

    Raises:
        FormatError: if a tensor has other bytes than its shape, or a name is there twice.
    """
    places = _places(path)
    found: dict[str, Entry] = {}
    names = [tensor.name for tensor in model.graph.initializer]
    if "" in names or len(set(names)) < len(names):
        raise FormatError(f"{path} has initializers without a name of their own; fetch it again")
    for tensor in model.graph.initializer:
        dtype, shape = FLOATS.get(tensor.data_type), tuple(tensor.dims)
        if dtype is None or min(shape, default=0) < 0:
            continue
        if tensor.data_location == EXTERNAL:
            file, start, stop = _external(path, tensor)
        elif tensor.name in places and (tensor.raw_data or dtype == torch.float32):
            file, (start, stop) = path, places[tensor.name]
        else:
            continue  # half floats as a list of varints cannot be overwritten in place
        if stop - start != math.prod(shape) * dtype.itemsize:
            raise FormatError(
                f"tensor {tensor.name!r} of {file} has other bytes than its shape; fetch it again"
            )
        found[tensor.name] = Entry(file, dtype, shape, start, stop)
    return found


def files(path: Path, model: Any) -> list[Path]:
    """The file and those of its external data."""
    return [path, *sorted({_external(path, tensor)[0] for tensor in _outside(model)})]


def digest(paths: Iterable[Path], without: Iterable[Entry]) -> torch.Tensor:
    """sha256 of files, but for the bytes of some of their tensors: uint8 (32,)."""
    total = hashlib.sha256()
    gaps: dict[Path, list[tuple[int, int]]] = {}
    for entry in without:
        gaps.setdefault(entry.path, []).append((entry.start, entry.stop))
    for path in paths:
        with path.open("rb") as file:
            for start, stop in [*sorted(gaps.get(path, [])), (path.stat().st_size, 0)]:
                while data := file.read(max(0, min(CHUNK, start - file.tell()))):
                    total.update(data)
                file.seek(stop)
    return torch.frombuffer(bytearray(total.digest()), dtype=torch.uint8)


def _messages(message: Any) -> Iterator[Any]:
    """A message and all inside it: tensors of attributes, subgraphs and functions too."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if isinstance(value, Iterable) else (value,):
                yield from _messages(inner)


def _outside(model: Any) -> Iterator[Any]:
    """The tensors whose bytes lie in other files."""
    onnx, _ = onnx_packages()
    for message in _messages(model):
        if isinstance(message, onnx.TensorProto) and message.data_location == EXTERNAL:
            yield message


def _texts(message: Any) -> Iterator[Any]:
    """A message's own strings; protobuf gives bytes where they are no UTF-8."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            yield from (value,) if isinstance(value, str | bytes) else value


def _external(path: Path, tensor: Any) -> tuple[Path, int, int]:
    """File, start and stop of a tensor outside the ONNX file.

    Raises:
        FormatError: if the file is named by a path, is missing or too short.
    """
    said: Mapping[str, str] = {entry.key: entry.value for entry in tensor.external_data}
    name, what = said.get("location", ""), f"tensor {tensor.name!r} of {path}"
    # The data lie beside the model: a path could name any file of the machine.
    if not name or name != Path(name).name or "\\" in name or name in (".", ".."):
        raise FormatError(f"{what} lies in {name!r}; wanted a plain file name")
    file = path.parent / name
    if not file.is_file():
        raise FormatError(f"{file} is missing, but {path.name} names it; fetch it again")
    bits, shape = BITS.get(tensor.data_type, 0), tuple(tensor.dims)
    needed = -(-math.prod(shape) * bits // 8)
    try:
        start = int(said.get("offset") or 0)
        length = int(said.get("length") or needed)
    except ValueError:
        start = length = -1
    size = file.stat().st_size
    negative = min(start, *shape) < 0 if shape else start < 0
    if negative or not bits or length != needed or start + length > size:
        raise FormatError(
            f"{what} is type {tensor.data_type} {shape}, bytes {start} to {start + length} of "
            f"{name}, which has {size}; fetch both again"
        )
    return file, start, start + length


def _places(path: Path) -> dict[str, tuple[int, int]]:
    """Start and stop of an initializer's bytes, where they are one field of raw or float data."""
    found: dict[str, tuple[int, int]] = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for graph, inside, end in _fields(path, data, 0, len(data)):
            if graph != GRAPH:
                continue
            for number, start, stop in _fields(path, data, inside, end):
                if number == INITIALIZER:
                    parts = list(_fields(path, data, start, stop))
                    names = [bytes(data[a:b]) for n, a, b in parts if n == NAME]
                    payloads = [(a, b) for n, a, b in parts if n in (RAW, FLOAT_DATA) and b > a]
                    if names and len(payloads) == 1:
                        found[names[-1].decode("utf-8", "replace")] = payloads[0]
    return found


def _fields(path: Path, data: mmap.mmap, at: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and stop of the fields of a message that have a length."""
    while at < stop:
        tag, at = _varint(path, data, at, stop)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            _, end = _varint(path, data, at, stop)
        elif kind == 2:
            length, at = _varint(path, data, at, stop)
            end = at + length
        else:
            end = at + {1: 8, 5: 4}.get(kind, stop)  # groups are not used by ONNX
        if end > stop:
            raise FormatError(f"{path} is damaged: a field ends behind its message; fetch it again")
        if kind == 2:
            yield number, at, end
        at = end


def _varint(path: Path, data: mmap.mmap, at: int, stop: int) -> tuple[int, int]:
    """A number in base 128, the lowest digits first, and where it ends."""
    value = 0
    for k in range(min(LONGEST_VARINT, stop - at)):
        digit = data[at + k]
        value |= (digit & 127) << (7 * k)
        if digit < 128:
            return value, at + k + 1
    raise FormatError(f"{path} is damaged: a number does not end; fetch it again")
