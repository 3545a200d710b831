"""Checkpoint formats: one module each, found by a scan of this folder.

A format module holds `FORMAT`, an object with the methods of `Format`. Reading checks headers
before it builds anything; writing is atomic; pickles are never opened.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from zotune.errors import FormatError
from zotune.quant.formats.folder import copy_companions, replace_folder
from zotune.quant.formats.tensors import read_json
from zotune.quant.linear import QuantLinear


class Format(Protocol):
    """What a checkpoint format can do."""

    name: str

    def detect(self, folder: Path) -> bool:
        """Whether this folder is in the format; reads `config.json` only."""

    def read(
        self, folder: Path, auto: Any, dtype: torch.dtype | None, trust_remote_code: bool
    ) -> nn.Module:
        """The model, built by the Auto class `auto`; dtype None is the format's own."""

    def write(self, model: nn.Module, folder: Path) -> None:
        """Save config and weights into an existing folder."""


@runtime_checkable
class Wrapper(Protocol):
    """A model around a transformers model, saved as that model and files beside it."""

    @property
    def saved_model(self) -> nn.Module:
        """The transformers model inside."""

    def save_beside(self, folder: Path) -> None:
        """Add the wrapper's own files to a folder that holds the saved model."""


@cache
def formats() -> dict[str, Format]:
    """Every format by name.

    >>> sorted(formats())
    ['float', 'zotune']
    """
    found: dict[str, Format] = {}
    for info in pkgutil.iter_modules(__path__):
        format = getattr(import_module(f"{__name__}.{info.name}"), "FORMAT", None)
        if format is None:
            continue
        if format.name in found:
            raise FormatError(f"two modules call their format {format.name!r}; rename one")
        found[format.name] = format
    return found


def detect(folder: str | Path) -> str:
    """Name of the format of a checkpoint folder.

    Raises:
        FormatError: if the folder is not a checkpoint, or no format or several recognise it.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    matching = [name for name, format in formats().items() if format.detect(folder)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise FormatError(f"{folder} is claimed by several formats: {matching}")
    method = (config.get("quantization_config") or {}).get("quant_method")
    raise FormatError(
        f"{folder} is quantized by {method!r}, which no format reads; known: {sorted(formats())}. "
        "Start from the float checkpoint and give a scheme"
    )


def read(
    folder: str | Path,
    auto: Any,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Read a checkpoint folder into a model, in eval mode.

    Args:
        folder: a local folder.
        auto: the transformers Auto class to build with, such as AutoModelForCausalLM.
        dtype: of float tensors other than scales; None is float32 for float folders and what is
            stored for quantized ones.
        trust_remote_code: whether the folder's own Python may run.

    Raises:
        FormatError: naming the file or tensors that are wrong.
    """
    folder = Path(folder)
    return formats()[detect(folder)].read(folder, auto, dtype, trust_remote_code).eval()


def write(
    model: nn.Module,
    folder: str | Path,
    source: str | Path | None = None,
    *,
    tokenizer: Any = None,
) -> Path:
    """Save a model; the folder is replaced as a whole or, on any error, not at all.

    A model with QuantLinear layers becomes a "zotune" folder, another a plain safetensors one.
    Files of an old checkpoint in `folder` that the new one does not have stay, except weights.

    Args:
        model: a transformers model, or a `Wrapper` around one.
        folder: where to; an existing folder must be a checkpoint or empty.
        source: the folder the model was loaded from: its tokenizer and generation files are copied.
        tokenizer: saved when no source is given.

    Returns:
        the folder.

    Raises:
        BadInput: if the folder holds something else, or the model cannot be saved.
        OSError: if the disk is full; the old folder is intact.
    """
    inner = model.saved_model if isinstance(model, Wrapper) else model
    quantized = any(isinstance(module, QuantLinear) for module in inner.modules())
    format = formats()["zotune" if quantized else "float"]
    with replace_folder(Path(folder)) as fresh:
        format.write(inner, fresh)
        if isinstance(model, Wrapper):
            model.save_beside(fresh)
        if source is not None:
            copy_companions(Path(source), fresh)
        elif tokenizer is not None:
            tokenizer.save_pretrained(fresh)
    return Path(folder)
