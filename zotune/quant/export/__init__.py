"""Writing a quantized model in another program's format: one module each, found by a scan.

A format that can be exported to is a module here with `EXPORTS`, a tuple of `Exporter`: it says
which schemes the format expresses, and writes a model of ours. This is another thing than
`zotune.quant.formats`, which gives a checkpoint back in the files that it came in; what is written
here is read there, and then goes back as it came.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from zotune.errors import BadInput
from zotune.quant.formats import Wrapper
from zotune.quant.formats.folder import copy_companions, replace_folder
from zotune.quant.formats.origin import quantized
from zotune.quant.scheme import Scheme

__all__ = ["Exporter", "export_", "exporter", "exporters"]


class Exporter(Protocol):
    """A format that models of ours can be written in."""

    name: str
    schemes: str  # what it expresses, in words

    def refusal(self, scheme: Scheme) -> str | None:
        """Why a scheme is not expressed, and what to use instead; None if it is."""

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What scales are stored in, in a model whose float tensors are of `dtype`."""

    def check(
        self, model: nn.Module, layers: Mapping[str, nn.Linear | nn.Conv2d], scheme: Scheme
    ) -> None:
        """Refuse, before anything is calibrated, a float model that cannot be written.

        Raises:
            BadInput: naming a layer, or what of the architecture is not expressed.
        """

    def write_(self, model: nn.Module, folder: Path, tokenizer: Any) -> None:
        """Save into an existing, empty folder; the model is rounded to what is saved.

        Raises:
            BadInput: if the tokenizer is not expressed, or columns lie in another order.
        """


@cache
def exporters() -> dict[str, Exporter]:
    """Every exporter by name.

    >>> sorted(exporters())
    ['compressed-tensors', 'gguf', 'gptq', 'gptq_v2', 'zotune']
    """
    found: dict[str, Exporter] = {}
    for info in pkgutil.iter_modules(__path__):
        for each in getattr(import_module(f"{__name__}.{info.name}"), "EXPORTS", ()):
            found[each.name] = each
    return found


def exporter(name: str, scheme: Scheme) -> Exporter:
    """The exporter called `name`, which expresses `scheme`.

    Raises:
        BadInput: if there is none, or it does not.

    >>> exporter("gptq", Scheme.parse("int5-g32"))
    Traceback (most recent call last):
    zotune.errors.BadInput: format 'gptq' does not express int5-g32: bits are 2, 3, 4 or 8...
    """
    found = exporters().get(name)
    if found is None:
        raise BadInput(f"format {name!r} is not written; use one of {sorted(exporters())}")
    why = found.refusal(scheme)
    if why:
        raise BadInput(f"format {name!r} does not express {scheme}: {why}")
    return found


def export_(
    model: nn.Module,
    folder: str | Path,
    to: Exporter,
    *,
    source: str | Path | None = None,
    tokenizer: Any = None,
) -> Path:
    """Save a model with QuantLinear layers; the folder is replaced as a whole or not at all.

    The model is rounded in place to what the files hold, so that it computes what they do.

    Args:
        model: a transformers model, or a `Wrapper` around one.
        source: the folder the model came from: its tokenizer and generation files are copied, into
            formats that keep them beside the weights.
        tokenizer: for formats that hold it themselves, and where there is no source.

    Raises:
        BadInput: as `Exporter.write_`, or if the folder holds something else.
    """
    inner = model.saved_model if isinstance(model, Wrapper) else model
    if to.name != "zotune" and any(layer.input_clip is not None for _, layer in quantized(inner)):
        raise BadInput(f"format {to.name!r} has no place for clipped activations; use 'zotune'")
    with replace_folder(Path(folder)) as fresh, torch.no_grad():
        to.write_(inner, fresh, tokenizer)
        if isinstance(model, Wrapper):
            model.save_beside(fresh)
        if (fresh / "config.json").exists():
            if source is not None:
                copy_companions(Path(source), fresh)
            elif tokenizer is not None:
                tokenizer.save_pretrained(fresh)
    return Path(folder)
