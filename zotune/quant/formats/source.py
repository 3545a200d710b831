"""Safetensors checkpoints of other programs: read layer by layer, given back as they came.

Writing copies the source's files and overwrites, byte range by byte range, the tensors whose value
is no longer the one in the file. All else is the source's own bytes.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zotune.allocator import give_back
from zotune.errors import BadInput, FormatError
from zotune.quant.formats.build import (
    assign_,
    empty_model,
    model_config,
    restore_generation_config_,
)
from zotune.quant.formats.folder import copy_source
from zotune.quant.formats.layout import Layout, place_
from zotune.quant.formats.origin import (
    Source,
    changes,
    check_places,
    float_tensors,
    quantized,
    set_source_,
    source_of,
)
from zotune.quant.formats.shards import Entry, entries
from zotune.quant.formats.shelf import Memory, Shelf, shelve_, taken
from zotune.quant.formats.tensors import listing
from zotune.quant.linear import is_conv1d

log = logging.getLogger("zotune")


class SourceFormat(ABC):
    """A format of safetensors folders in which a quantized layer is several tensors."""

    name: ClassVar[str]
    tunable: ClassVar[tuple[str, ...]]
    marks: ClassVar[tuple[str, ...]]  # ends of tensor names that tell a quantized layer

    @abstractmethod
    def detect(self, folder: Path) -> bool:
        """Whether this folder is in the format."""

    @abstractmethod
    def record(self, folder: Path) -> dict[str, Any]:
        """What the folder says about its quantization.

        Raises:
            FormatError: for what this format does not read, naming it.
        """

    @abstractmethod
    def layout(
        self, record: dict[str, Any], name: str, stored: Mapping[str, Entry], shape: tuple[int, int]
    ) -> Layout:
        """How the layer `name` of `shape` (out, in) lies in the tensors `stored`.

        Raises:
            FormatError: if tensors are missing or of another dtype or shape; nothing is read yet.
        """

    def read(
        self, folder: Path, auto: Any, dtype: torch.dtype | None, trust_remote_code: bool
    ) -> nn.Module:
        """The model with QuantLinear layers; `dtype` None keeps float tensors as they are stored.

        Layers are decoded one at a time, so memory peaks at the model and one layer.

        Raises:
            FormatError: for damaged files, or tensors that do not fit each other or the model.
        """
        return self.read_onto(Memory(), folder, auto, dtype, trust_remote_code)

    def read_onto(
        self,
        shelf: Shelf,
        folder: Path,
        auto: Any,
        dtype: torch.dtype | None,
        trust_remote_code: bool,
    ) -> nn.Module:
        """As `read`; every layer goes to its place once it is decoded."""
        record, found = self.record(folder), entries(folder)
        config = model_config(folder, trust_remote_code)
        model = empty_model(config, auto, list(found), trust_remote_code)
        prefix = prefix_of(model, found)
        own = {n.removeprefix(prefix): e for n, e in found.items() if n.startswith(prefix)}
        layers = _layers(own, self.marks)
        if not layers:
            raise FormatError(
                f"{folder} is called {self.name} by its config, but none of its tensors ends in "
                f"{' or '.join(self.marks)}; is it complete?"
            )
        shapes = _shapes(model, set(layers), folder)
        layouts = {n: self.layout(record, n, layers[n], shapes[n]) for n in layers}
        tensors: dict[str, Tensor] = {}
        for name, layout in layouts.items():
            stored = {k: e.read() for k, e in layers[name].items() if k != "bias"}
            layer = place_(model, name, layout, stored, bias="bias" in layers[name])
            shelve_(layer, shelf)
            tensors.update({f"{name}.{k}": v for k, v in layer.state_dict().items() if k != "bias"})
            del stored
            give_back()
        floats = _floats(model, own, folder)
        tensors.update({name: taken(shelf, own[name], dtype) for name in floats})
        assign_(model, tensors, folder)
        restore_generation_config_(model, folder)
        dtypes = {name: own[name].dtype for name in floats}
        set_source_(model, Source(self.name, folder.absolute(), dtypes, prefix))
        return model.eval()

    def write(self, model: nn.Module, folder: Path) -> None:
        """The source's files, with what was tuned in its place.

        Raises:
            BadInput: if the model has layers or tensors that its source does not have.
            FormatError: if the source's files are gone or damaged.
        """
        source = source_of(model)
        if source is None:
            raise BadInput(
                f"{type(model).__name__} was not read from a {self.name} checkpoint, and only such "
                "models are written as one"
            )
        found = entries(source.folder)
        check_places(model, source, found)
        copy_source(source.folder, folder, {entry.path for entry in found.values()})
        for name, tensor in changes(model, source, found):
            found[name].overwrite(folder, tensor)


def prefix_of(model: nn.Module, found: Mapping[str, Entry]) -> str:
    """The name of the body inside a larger model, where the checkpoint holds that larger one."""
    start = f"{getattr(model, 'base_model_prefix', '')}."
    names = [name for name, _ in model.named_parameters()]
    inside = start != "." and not any(name.startswith(start) for name in names)
    return start if inside and any(start + name in found for name in names) else ""


def _layers(own: Mapping[str, Entry], marks: tuple[str, ...]) -> dict[str, dict[str, Entry]]:
    """The tensors of every quantized layer, by layer and the rest of their names."""
    layers: dict[str, dict[str, Entry]] = {
        name.removesuffix(f".{mark}"): {}
        for name in own
        for mark in marks
        if name.endswith(f".{mark}")
    }
    for name, entry in own.items():
        dots = [k for k, letter in enumerate(name) if letter == "."]
        for k in reversed(dots):
            if name[:k] in layers:
                layers[name[:k]][name[k + 1 :]] = entry
                break
    return layers


def _shapes(model: nn.Module, names: set[str], folder: Path) -> dict[str, tuple[int, int]]:
    """(out, in) of the layers to be quantized."""
    modules = dict(model.named_modules())
    wrong = {n for n in names if not (isinstance(m := modules.get(n), nn.Linear) or is_conv1d(m))}
    if wrong:
        raise FormatError(
            f"{folder} holds quantized layers that {type(model).__name__} does not have as linear "
            f"layers: [{listing(wrong)}]"
        )
    shapes: dict[str, tuple[int, int]] = {}
    for name in names:
        rows, columns = modules[name].get_parameter("weight").shape
        shapes[name] = (columns, rows) if is_conv1d(modules[name]) else (rows, columns)
    return shapes


def _floats(model: nn.Module, own: Mapping[str, Entry], folder: Path) -> list[str]:
    """Names of the stored tensors that the model holds as they are; says which nobody uses."""
    wanted = {name for name, _ in float_tensors(model)}
    inside = tuple(f"{name}." for name, _ in quantized(model))
    unused = {n for n in set(own) - wanted if not n.startswith(inside)}
    if unused:
        log.info(
            "%s: tensors that %s does not use stay as they are: [%s]",
            folder, type(model).__name__, listing(unused),
        )  # fmt: skip
    return sorted(wanted & set(own))
