"""Model folders as a run leaves them: checkpoint, adapters beside it, head inside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zotune.core.spaces.parameters import heads
from zotune.errors import BadInput
from zotune.models import Loaded, PooledClassifier
from zotune.models import load as load_checkpoint
from zotune.models.adapter import adapters, attach, detach, fold_, load_peft, save_peft
from zotune.models.pipeline import is_pipeline, write_pipeline
from zotune.models.shift import fold_shifts_
from zotune.quant import formats
from zotune.quant.export import Exporter, export_
from zotune.quant.formats.folder import replace_folder
from zotune.quant.qat import quantize_
from zotune.training.journal import NAME as JOURNAL
from zotune.training.snapshots import cannot_write, disk_full

ADAPTER = "adapter"


def load_model(path: str | Path, **options: Any) -> Loaded:
    """`zotune.models.load`, with the adapters that a training run left in the folder."""
    inside = Path(path).expanduser() / "model"
    if (inside.parent / JOURNAL).exists() and inside.is_dir():
        path = inside  # a run folder: its model
    loaded = load_checkpoint(path, **options)
    folder = loaded.path / ADAPTER
    if (folder / "adapter_config.json").exists():
        load_peft(loaded.model, folder, _prefix(loaded.model))
        first = next(loaded.model.parameters(), None)
        if first is not None:
            loaded.model.to(first.device)
    return loaded


def need_empty(folder: Path) -> None:
    """Raises BadInput unless a folder is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"output_dir {folder} is not empty; give another folder")


def write_model(model: nn.Module, folder: Path, source: Loaded, to: Exporter | None = None) -> Path:
    """Save in the format it came in, or in another; adapters as a PEFT folder inside. Whole or not
    at all.

    Raises:
        ZotuneError: the disk is full; the old folder is intact.
    """
    try:
        with replace_folder(folder) as fresh:
            with without_adapters(model) as had:
                _write_checkpoint(model, fresh, source, to)
            if had:
                save_peft(model, fresh / ADAPTER, str(source.path), _prefix(model))
    except OSError as error:
        raise cannot_write(folder, error) from error
    except Exception as error:  # safetensors reports a full disk by an exception of its own
        if disk_full(error):
            raise cannot_write(folder, OSError(28, "No space left on device")) from error
        raise
    return folder


def _write_checkpoint(model: nn.Module, folder: Path, source: Loaded, to: Exporter | None) -> None:
    files = source.path if source.path.is_dir() else None
    if is_pipeline(source.path):
        write_pipeline(model, folder, source.path)
        return
    if to is not None:
        export_(model, folder, to, source=files, tokenizer=source.tokenizer)
        return
    inner = model.saved_model if isinstance(model, formats.Wrapper) else model
    if formats.source_of(inner) is not None or hasattr(inner, "save_pretrained"):
        formats.write(model, folder, files, tokenizer=source.tokenizer)
        return
    from safetensors.torch import save_model

    save_model(model, str(folder / "model.safetensors"))  # a module of the user's own
    config = {"architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(config) + "\n")


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[bool]:
    """The model as it is stored: adapters come off and go back on. Yields whether there are any."""
    found = [(layer, adapter) for _, layer, adapter in adapters(model)]
    detach(model)
    try:
        yield bool(found)
    finally:
        for layer, adapter in found:
            attach(layer, adapter)


def round_to_storage_(model: nn.Module) -> None:
    """Make the model what its file will hold, so that memory and file give the same numbers:
    tensors rounded to their stored dtype, a head's basis and shifts of norms folded into their
    layers, layers that were trained through their rounding quantized."""
    quantize_(model)
    fold_shifts_(model)
    inside = heads(model)
    for _, layer, _ in list(adapters(model)):
        if id(layer) in inside:
            fold_(layer)
    formats.round_to_storage_(model.saved_model if isinstance(model, formats.Wrapper) else model)


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def from_module(model: nn.Module | Loaded) -> Loaded:
    """A module of the user's own as a loaded model; its files, if any, lie where it came from."""
    if isinstance(model, Loaded):
        return model
    if not isinstance(model, nn.Module):
        raise BadInput(
            f"model is a {type(model).__name__}; give a torch.nn.Module or zotune.load()"
        )
    config = getattr(model, "config", None)
    origin = getattr(config, "_name_or_path", "") or f"<{type(model).__name__}>"
    return Loaded(model.eval(), None, "module", Path(origin), config, "float")


def _prefix(model: nn.Module) -> str:
    return "embed.encoder." if isinstance(model, PooledClassifier) else ""


def use_threads(count: int | None) -> None:
    if count is not None:
        torch.set_num_threads(count)
