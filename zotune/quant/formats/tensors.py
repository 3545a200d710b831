"""Reading and checking safetensors files; pickles are refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from zotune.errors import FormatError

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
SINGLES: Final = (SINGLE, "diffusion_pytorch_model.safetensors")
"""What transformers and diffusers call a model's one weight file."""
INDICES: Final = (INDEX, "diffusion_pytorch_model.safetensors.index.json")
# Where older quantizers say what config.json does not: AutoGPTQ, AutoAWQ.
QUANTIZERS: Final = ("quantize_config.json", "quant_config.json")
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SHOWN = 10


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FormatError: if the file is missing or is not a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path} is missing; is {path.parent} a checkpoint folder?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FormatError(f"{path} cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path} holds a {type(found).__name__}; wanted a JSON object")
    return found


def quantization(folder: Path) -> dict[str, Any]:
    """What config.json says about the folder's quantization; {} where there is none.

    Raises:
        FormatError: if config.json is there and no JSON object, or its record is none.
    """
    path = folder / "config.json"
    record = read_json(path).get("quantization_config") if path.exists() else None
    if not isinstance(record, dict | None):
        raise FormatError(f"quantization_config of {path} is no JSON object; fetch it again")
    return record or {}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder: one, or the shards its index names.

    Raises:
        FormatError: if there are none, if a shard is missing or named by a path, or if only pickles
            are there.
    """
    index = index_file(folder)
    if index is not None:
        return [folder / name for name in sorted(set(_weight_map(index).values()))]
    for name in SINGLES:
        if (folder / name).exists():
            return [folder / name]
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickles:
        raise FormatError(
            f"{folder} holds weights only as pickles ({', '.join(pickles)}), which can run code "
            "when opened; load them where you trust them and save with "
            "model.save_pretrained(folder, safe_serialization=True)"
        )
    raise FormatError(f"{folder} holds no weights; wanted {SINGLE} or {INDEX}")


def index_file(folder: Path) -> Path | None:
    """The index of a folder whose weights are in shards."""
    return next((folder / name for name in INDICES if (folder / name).exists()), None)


def check_files(folder: Path) -> list[str]:
    """Open every weight file, which compares its header with its size; returns the tensor names.

    Raises:
        FormatError: naming the file that is truncated or damaged, or the tensors that the index
            and the shards do not agree on.
    """
    names: dict[str, str] = {}
    for path in weight_files(folder):
        with open_file(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name in names:
                    raise FormatError(f"tensor {name!r} is in both {names[name]} and {path.name}")
                names[name] = path.name
    index = index_file(folder)
    if index is not None:
        _compare_with_index(index, names)
    return sorted(names)


def read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file; copies, so the file may change afterwards.

    Raises:
        FormatError: if the file is missing, truncated or damaged.
    """
    with open_file(path) as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


@contextmanager
def open_file(path: Path) -> Iterator[Any]:
    """An open safetensors file.

    Raises:
        FormatError: if the file is missing, truncated or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
    except FileNotFoundError:
        raise FormatError(f"{path} is missing; fetch the checkpoint again") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise FormatError(
            f"{path} is not a whole safetensors file ({error}); fetch it again"
        ) from error
    with file as entered:
        yield entered


def listing(names: list[str] | set[str]) -> str:
    """Names for a message, the first ten of them.

    >>> listing({"b", "a"})
    'a, b'
    """
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise FormatError(f"{index} has no weight_map; fetch it again")
    for name in set(map(str, found.values())):
        # A shard is a file of this folder: a path could name any file of the machine.
        if not name.endswith(".safetensors") or name != Path(name).name or "\\" in name:
            raise FormatError(
                f"{index} names the shard {name!r}; wanted a plain file name ending in .safetensors"
            )
        if not (index.parent / name).is_file():
            raise FormatError(
                f"{index.parent / name} is missing, but the index names it; fetch it again"
            )
    return {str(k): str(v) for k, v in found.items()}


def _compare_with_index(index: Path, names: dict[str, str]) -> None:
    wanted = _weight_map(index)
    absent = {n for n, f in wanted.items() if names.get(n) != f}
    extra = set(names) - set(wanted)
    if absent or extra:
        raise FormatError(
            f"{index} and the shards disagree: "
            f"missing tensors [{listing(absent)}], unexpected tensors [{listing(extra)}]; "
            "fetch the checkpoint again"
        )
