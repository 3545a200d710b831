"""Replacing a folder as a whole, and the files that travel with a checkpoint."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from zotune.errors import BadInput, FormatError
from zotune.quant.formats.tensors import INDICES, SINGLES

# Tokenizer, generation and remote-code files; weights, their index and config.json are rewritten.
COMPANIONS: Final = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken")
# sentence-transformers keeps the settings of its modules in numbered folders.
NESTED: Final = "[0-9]_*/config.json"
# Endings of weight files: those that the checkpoint does not name are another model's.
ONNX: Final = (".onnx", ".onnx_data", ".data")
WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", *ONNX)
# What tells that a folder is a model's, or a diffusers pipeline's.
RECORDS: Final = ("config.json", "model_index.json")
REWRITTEN: Final = ("config.json", "*.index.json", "*.safetensors")


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield a fresh folder beside `folder` that takes its place when the block ends well.

    On an error the fresh folder is removed and the old one left as it was. Files of the old folder
    that the fresh one lacks are kept, except weights and their index, and a config beside a GGUF.

    Raises:
        BadInput: if `folder` exists and is neither empty nor a checkpoint.
    """
    folder = folder.absolute()
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is a file; give a folder")
    known = any((folder / name).exists() for name in RECORDS) or is_gguf(folder)
    if folder.is_dir() and any(folder.iterdir()) and not known:
        raise BadInput(f"{folder} is not empty and holds no checkpoint; give another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
    try:
        yield fresh
        fresh.chmod(0o777 & ~_umask())
        _sync(fresh)
        _swap(fresh, folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def is_gguf(folder: Path) -> bool:
    """Whether a folder's one .gguf file is its model."""
    own = folder.is_dir() and not (folder / "config.json").exists()
    return own and len(list(folder.glob("*.gguf"))) == 1


def is_onnx(folder: Path) -> bool:
    """Whether a folder's weights are .onnx files alone."""
    others = any((folder / name).exists() for name in (*SINGLES, *INDICES))
    return folder.is_dir() and any(folder.glob("*.onnx")) and not others


def home_of(path: Path) -> Path:
    """The folder in which a checkpoint's config and tokenizer lie: itself, or its file's.

    A file in a folder called "onnx" without a config has them one higher, as on the hub.
    """
    folder = path if path.is_dir() else path.parent
    higher = folder.name == "onnx" and not (folder / "config.json").exists()
    return folder.parent if higher else folder


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, generation and code files that `target` does not have yet.

    Raises:
        FormatError: if the source folder is not there.
    """
    if not source.is_dir():
        raise FormatError(f"{source} is not a folder; give the folder the model was loaded from")
    for path in sorted(source.iterdir()):
        wanted = any(fnmatchcase(path.name, pattern) for pattern in COMPANIONS)
        rewritten = any(fnmatchcase(path.name, pattern) for pattern in REWRITTEN)
        if path.is_file() and wanted and not rewritten:
            # The source's own file is kept byte for byte, even where saving made another.
            shutil.copyfile(path, target / path.name)
    for path in sorted(source.glob(NESTED)):
        (target / path.parent.name).mkdir(exist_ok=True)
        shutil.copyfile(path, target / path.parent.name / path.name)


def copy_source(source: Path, target: Path, weights: set[Path]) -> None:
    """Copy a checkpoint's own files byte for byte: these weights, and all that is no weight.

    Raises:
        FormatError: if the source folder is not there.
    """
    if not source.is_dir():
        raise FormatError(f"{source} is gone; the model is written from the files it was read from")
    nested = [path for path in source.glob(NESTED) if path.is_file()]
    for path in sorted([*source.iterdir(), *nested]):
        foreign = path.suffix.lower() in WEIGHTS and path not in weights
        if path.is_file() and not foreign and not path.name.startswith("."):
            copy = target / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def _swap(fresh: Path, folder: Path) -> None:
    if not folder.exists():
        fresh.rename(folder)
        _sync_directory(folder.parent)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
    folder.rename(old)
    try:
        fresh.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    _sync_directory(folder.parent)
    weights = (".gguf",) if is_gguf(old) else (".safetensors", *ONNX)
    records = RECORDS if is_gguf(folder) else ()  # beside a config the file would be none's
    for path in old.iterdir():
        stale = path.name in (*INDICES, *records) or path.suffix in weights
        if not stale and not (folder / path.name).exists():
            path.rename(folder / path.name)
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Bring every file to the disk before the folder takes its name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_directory(folder)


def _sync_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
