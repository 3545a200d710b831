"""Format "float": a transformers folder with unquantized safetensors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zotune.errors import BadInput, FormatError
from zotune.quant.formats.build import (
    assign_,
    empty_model,
    model_config,
    quiet_random_state,
    restore_generation_config_,
)
from zotune.quant.formats.folder import is_onnx
from zotune.quant.formats.shards import entries
from zotune.quant.formats.shelf import Shelf, taken
from zotune.quant.formats.source import prefix_of
from zotune.quant.formats.tensors import QUANTIZERS, check_files, listing, quantization

log = logging.getLogger("zotune")


class PlainFormat:
    """Unquantized safetensors, read by `from_pretrained` and written by `save_pretrained`."""

    name = "float"
    tunable = ("norms", "biases", "weights")

    def detect(self, folder: Path) -> bool:
        """Whether there is a config, and neither it nor a file beside it tells of quantization."""
        sidecars = is_onnx(folder) or any((folder / name).exists() for name in QUANTIZERS)
        return (folder / "config.json").exists() and not sidecars and not quantization(folder)

    def read(
        self, folder: Path, auto: Any, dtype: torch.dtype | None, trust_remote_code: bool
    ) -> nn.Module:
        """The model in `dtype`, None meaning float32.

        Raises:
            FormatError: for damaged files, or weights of the model that the folder does not hold.
        """
        check_files(folder)
        options: dict[str, Any] = {
            "dtype": dtype or torch.float32,
            "use_safetensors": True,
            "trust_remote_code": trust_remote_code,
            "output_loading_info": True,
            "local_files_only": True,
        }
        model, info = _from_pretrained(folder, auto, options)
        if info["missing_keys"] and all(k.startswith("pooler.") for k in info["missing_keys"]):
            # Encoders saved from a language model have no pooler; nothing here reads it.
            model, info = _from_pretrained(folder, auto, {**options, "add_pooling_layer": False})
        if info["missing_keys"]:
            raise FormatError(
                f"{folder} lacks tensors of {type(model).__name__}: "
                f"[{listing(set(info['missing_keys']))}]; load it as another kind, or complete it"
            )
        _say_unused(set(info["unexpected_keys"]), model, folder)
        return model

    def read_onto(
        self,
        shelf: Shelf,
        folder: Path,
        auto: Any,
        dtype: torch.dtype | None,
        trust_remote_code: bool,
    ) -> nn.Module:
        """As `read`, one tensor at a time, which transformers' own loader does not do.

        Raises:
            FormatError: as `read`, also where transformers would rename or join stored tensors.
        """
        found = entries(folder)
        config = model_config(folder, trust_remote_code)
        config.dtype = dtype or torch.float32
        model = empty_model(config, auto, list(found), trust_remote_code)
        prefix = prefix_of(model, found)
        own = {n.removeprefix(prefix): e for n, e in found.items() if n.startswith(prefix)}
        wanted = set(model.state_dict())
        _say_unused(set(found) - {prefix + name for name in wanted}, model, folder)
        used = {name: entry for name, entry in own.items() if name in wanted}
        tensors = {n: taken(shelf, e, dtype or torch.float32) for n, e in used.items()}
        assign_(model, tensors, folder)
        restore_generation_config_(model, folder)
        return model.eval()

    def write(self, model: nn.Module, folder: Path) -> None:
        """Save config and weights into an existing folder.

        Raises:
            BadInput: if the model is not a transformers model.
        """
        save = getattr(model, "save_pretrained", None)
        if not callable(save):
            raise BadInput(
                f"{type(model).__name__} has no config to save; give a transformers model"
            )
        save(folder)


def _say_unused(names: set[str], model: nn.Module, folder: Path) -> None:
    if names:
        log.warning(
            "%s: tensors that %s does not use are dropped: [%s]",
            folder, type(model).__name__, listing(names),
        )  # fmt: skip


def _from_pretrained(folder: Path, auto: Any, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    with quiet_random_state(), no_progress_bar():
        try:
            model, info = auto.from_pretrained(folder, **options)
        except (OSError, RuntimeError, ValueError) as error:
            raise FormatError(f"{folder} cannot be loaded: {error}") from error
    return model, info


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Silence transformers' "Loading weights" bar, which logs should not hold."""
    from transformers.utils import logging as library

    shown = library.is_progress_bar_enabled()
    library.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            library.enable_progress_bar()  # type: ignore[no-untyped-call]


FORMAT = PlainFormat()
