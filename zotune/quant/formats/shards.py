"""Single tensors of safetensors files: where they lie, reading one, overwriting one.

Files are read by plain reads, not mapped: what was read can be dropped, so that a model takes its
own size in memory and not its files' as well.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from zotune.errors import FormatError
from zotune.quant.formats.tensors import check_files, weight_files

DTYPES: Final = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: bytes start to stop."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def read(self) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            FormatError: if the file has become shorter.
        """
        data = torch.empty(self.stop - self.start, dtype=torch.uint8)
        with self.path.open("rb") as file:
            file.seek(self.start)
            if file.readinto(data.numpy().data) != len(data):
                raise FormatError(f"{self.path} is shorter than its header says; fetch it again")
        return data.view(self.dtype).reshape(self.shape)

    def overwrite(self, folder: Path, tensor: Tensor) -> None:
        """Put `tensor`, of the same dtype and shape, in its place in `folder`'s copy of the file.

        Raises:
            FormatError: if it has another dtype or shape.
        """
        if tensor.dtype != self.dtype or tuple(tensor.shape) != self.shape:
            raise FormatError(
                f"a tensor of {self.path.name} is {self.dtype} {self.shape}; "
                f"{tensor.dtype} {tuple(tensor.shape)} cannot take its place"
            )
        with (folder / self.path.name).open("r+b") as file:
            file.seek(self.start)
            file.write(raw_bytes(tensor.detach().cpu()).numpy().data)


def raw_bytes(tensor: Tensor) -> Tensor:
    """A tensor's values as they lie in a file: uint8 (bytes,).

    >>> raw_bytes(torch.tensor([1.0])).tolist()
    [0, 0, 128, 63]
    """
    # Sizes of 1 leave strides free, also the last one, which a view of another dtype wants to be 1.
    flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8)


def entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint folder by name, in the order of the files.

    Raises:
        FormatError: as `check_files`, or for a dtype that torch does not have.
    """
    check_files(folder)
    found: dict[str, Entry] = {}
    for path in weight_files(folder):
        found.update(stored_in(path))
    return found


def stored_in(path: Path) -> dict[str, Entry]:
    """What a file holds, its header having been compared with its size (`check_files`)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, record in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype = DTYPES.get(record["dtype"])
        if dtype is None:
            raise FormatError(f"tensor {name!r} of {path} has the unknown dtype {record['dtype']}")
        shape = tuple(record["shape"])
        start, stop = (8 + length + offset for offset in record["data_offsets"])
        if stop - start != torch.Size(shape).numel() * dtype.itemsize:
            raise FormatError(f"tensor {name!r} of {path} has other bytes than its shape")
        found[name] = Entry(path, dtype, shape, start, stop)
    return found
