"""Checkpoint formats: one module each, found by a scan of this folder.

A format module holds `FORMAT`, an object with the methods of `Format`. Reading checks headers
before it builds anything; writing is atomic; pickles are never opened; a model that came from a
checkpoint of another program goes back into the same files.

**A format in one file.** Most formats are folders of safetensors in which a quantized layer is
several tensors. Such a format is a `SourceFormat` (source.py) and says three things:

    detect(folder)                        is it mine? From config.json and file names alone.
    record(folder)                        the settings, checked; FormatError names what is not read.
    layout(record, name, stored, shape)   a `Layout` for one layer, from the headers of its tensors.

A `Layout` (layout.py) is a frozen record with three pure functions and no state:

    decode(stored)        tensors of the file -> `Values`: centred codes (out, in), float32 scale
                          and zero, and the order of the columns where groups are not in a row.
    encode(values)        back to those tensors that tuning can change, bit for bit.
    rounded(scale, zero)  what decode(encode(...)) makes of them, so that a model measured in
                          memory is the model in the file.

All else is shared: `read` takes one layer at a time (shards.py reads byte ranges, so nothing is in
memory twice); `write` copies the source's files and overwrites the byte ranges of tensors whose
value has changed. Untouched means untouched: a part is compared with decode and encode of what the
file holds, so odd bits that no decoder looks at stay as they are.

A layer that no `QuantLinear` can hold is built by `Layout.layer` (aqlm.py).

To build with: `zotune.quant.words` for codes that are a stream of bits in 32-bit words; scales.py
and nested.py for scales that are no plain floats; a kind in `scheme.BITS` for codes that are floats
and, if they go by a table, an entry in `zotune.quant.codebooks`.

Formats of other files (one GGUF file, an ONNX graph) implement `Format` themselves: `read` leaves a
`Source` on the model (`set_source_`, origin.py) and a `Layout` on each layer's `storage`; `write`
gets the model back. One whose files also hold config and tokenizer is `SelfContained`; its "folder"
may be the file itself. Where another engine runs the model there are no layers: a `Graph`
(quant/graph.py) holds the tensors and says what each is (onnx_graph.py).

`tunable` names the spaces whose blocks the format keeps: scales, zeros, codes of quantized layers;
norms, biases, weights (every float tensor, embeddings among them). Adapters lie in a folder beside
the checkpoint and go with every format. `zotune list formats` shows the table.

Tests that every format must pass run over the folders of tests/quant/golden/, made by the format's
own library with a script in benchmarks/interop/: a new format adds such a folder and gets them all
(tests/quant/test_golden.py). Beside them belong the layout restated in plain numpy, drawn shapes
through decode and encode, and one message per kind of damage.
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
from zotune.quant.formats.folder import copy_companions, home_of, replace_folder
from zotune.quant.formats.origin import Source, round_to_storage_, set_source_, source_of
from zotune.quant.formats.shelf import Shelf
from zotune.quant.formats.source import SourceFormat
from zotune.quant.formats.tensors import quantization, read_json
from zotune.quant.layer import QuantLayer

__all__ = [
    "ByLayer", "Format", "SelfContained", "Shelf", "Source", "SourceFormat", "Wrapper", "detect",
    "formats", "home_of", "read", "round_to_storage_", "set_source_", "source_of", "write",
]  # fmt: skip


class Format(Protocol):
    """What a checkpoint format can do."""

    name: str
    tunable: tuple[str, ...]

    def detect(self, folder: Path) -> bool:
        """Whether this folder is in the format, by config.json and file names; never an error for
        a folder of another format."""

    def read(
        self, folder: Path, auto: Any, dtype: torch.dtype | None, trust_remote_code: bool
    ) -> nn.Module:
        """The model, built by the Auto class `auto`; dtype None is the format's own."""

    def write(self, model: nn.Module, folder: Path) -> None:
        """Save config and weights into an existing, empty folder."""


@runtime_checkable
class ByLayer(Protocol):
    """A format whose tensors are read one at a time, onto any shelf."""

    def read_onto(
        self,
        shelf: Shelf,
        folder: Path,
        auto: Any,
        dtype: torch.dtype | None,
        trust_remote_code: bool,
    ) -> nn.Module:
        """As `Format.read`."""


@runtime_checkable
class SelfContained(Protocol):
    """A format whose files hold the config and the tokenizer too, so that no others are read."""

    def config(self, folder: Path) -> dict[str, Any]:
        """The transformers configuration, as config.json would hold it."""

    def tokenizer(self, folder: Path) -> Any:
        """The tokenizer."""


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

    >>> sorted(formats())  # doctest: +NORMALIZE_WHITESPACE
    ['aqlm', 'awq', 'bitsandbytes', 'compressed-tensors', 'float', 'gguf', 'gptq', 'hqq', 'onnx',
     'torchao', 'zotune']
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
    matching = [name for name, format in formats().items() if format.detect(folder)]
    if len(matching) > 1:
        raise FormatError(f"{folder} is claimed by several formats: {matching}")
    if matching:
        return matching[0]
    read_json(folder / "config.json")
    method = quantization(folder).get("quant_method")
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
    shelf: Shelf | None = None,
) -> nn.Module:
    """Read a checkpoint folder into a model, in eval mode.

    Args:
        folder: a local folder.
        auto: the transformers Auto class to build with, such as AutoModelForCausalLM.
        dtype: of float tensors other than scales; None is float32 for float folders and what is
            stored for quantized ones.
        trust_remote_code: whether the folder's own Python may run.
        shelf: where its tensors go, one after the other; None for memory.

    Raises:
        FormatError: naming the file or tensors that are wrong, or a format that is read as a whole
            where a shelf is given.
    """
    folder = Path(folder)
    format = formats()[detect(folder)]
    if shelf is None:
        return format.read(folder, auto, dtype, trust_remote_code).eval()
    if not isinstance(format, ByLayer):
        raise FormatError(
            f"{folder}: format {format.name!r} is read as a whole and cannot be streamed; drop "
            "--stream, or give a folder of safetensors"
        )
    return format.read_onto(shelf, folder, auto, dtype, trust_remote_code).eval()


def write(
    model: nn.Module,
    folder: str | Path,
    source: str | Path | None = None,
    *,
    tokenizer: Any = None,
) -> Path:
    """Save a model; the folder is replaced as a whole or, on any error, not at all.

    A model that was read from another program's checkpoint goes back into that format: the same
    files, in which only what was tuned differs. Any other model with quantized layers becomes a
    "zotune" folder, one without a plain safetensors one. Files of an old checkpoint in `folder`
    that the new one does not have stay, except weights.

    Args:
        model: a transformers model, or a `Wrapper` around one.
        folder: where to; an existing folder must be a checkpoint or empty.
        source: the folder the model was loaded from: its tokenizer and generation files are copied.
        tokenizer: saved when no source is given and the model has none of its own.

    Returns:
        the folder.

    Raises:
        BadInput: if the folder holds something else, or the model cannot be saved.
        OSError: if the disk is full; the old folder is intact.
    """
    inner = model.saved_model if isinstance(model, Wrapper) else model
    origin = source_of(inner)
    quantized = any(isinstance(module, QuantLayer) for module in inner.modules())
    format = formats()[origin.format if origin else "zotune" if quantized else "float"]
    with replace_folder(Path(folder)) as fresh:
        format.write(inner, fresh)
        if isinstance(model, Wrapper):
            model.save_beside(fresh)
        if origin is None and source is not None:
            copy_companions(Path(source), fresh)
        elif origin is None and tokenizer is not None:
            tokenizer.save_pretrained(fresh)
    return Path(folder)
