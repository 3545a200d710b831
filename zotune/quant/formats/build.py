"""Building a transformers model without its weights, and giving it tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zotune.errors import BadInput, FormatError
from zotune.quant.formats.tensors import listing, read_json
from zotune.quant.model import float_dtype


@contextmanager
def quiet_random_state() -> Iterator[None]:
    """Leave torch's global generator as it was, whatever a library draws inside."""
    with torch.random.fork_rng(devices=[]):
        yield


def model_config(folder: Path, trust_remote_code: bool) -> Any:
    """A folder's configuration, without what says how its weights are stored.

    A transformers object; diffusers, whose files name their class, keeps a plain mapping.
    """
    own = read_json(folder / "config.json")
    if "_class_name" in own:
        return {name: value for name, value in own.items() if name != "quantization_config"}
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        folder, trust_remote_code=trust_remote_code, local_files_only=True
    )
    for extra in ("quantization_config", "zotune_head"):
        if hasattr(config, extra):
            delattr(config, extra)
    return config


def empty_model(config: Any, auto: Any, names: list[str], trust_remote_code: bool) -> nn.Module:
    """The model of `config` with parameters on the meta device and real buffers.

    Buffers are computed for good, as those left out of checkpoints (rotary frequencies, position
    ids) would otherwise have no values.

    Args:
        config: a transformers configuration.
        auto: the Auto class that picks the model class.
        names: the checkpoint's tensor names; an encoder saved without its pooler is built so.
        trust_remote_code: whether the folder's own Python may run.
    """
    options: dict[str, Any] = {}
    model = _build(config, auto, options, trust_remote_code)
    pooler = [n for n, _ in model.named_parameters() if n.startswith("pooler.")]
    if pooler and not any(name.startswith("pooler.") for name in names):
        model = _build(config, auto, {"add_pooling_layer": False}, trust_remote_code)
    return model


def _build(config: Any, auto: Any, options: dict[str, Any], trust_remote_code: bool) -> nn.Module:
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with quiet_random_state(), no_init_weights(), init_empty_weights(include_buffers=False):
        model: nn.Module = auto.from_config(
            config, trust_remote_code=trust_remote_code or None, **options
        )
    return model


def assign_(model: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Give every parameter and persistent buffer its tensor, tie what is tied, and check.

    Raises:
        FormatError: listing tensors that are missing, unexpected or of another shape.
    """
    wanted = model.state_dict()
    wrong = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in tensors
        if name in wanted and tensors[name].shape != wanted[name].shape
    ]
    if wrong:
        raise FormatError(
            f"tensors of {folder} have other shapes than its config: {listing(wrong)}"
        )
    result = model.load_state_dict(tensors, strict=False, assign=True)
    tie = getattr(model, "tie_weights", None)
    if callable(tie):
        tie()
    absent = {name for name, p in model.named_parameters() if p.is_meta}
    absent |= {name for name, b in model.named_buffers() if b.is_meta}
    absent |= set(result.missing_keys) & {name for name, _ in model.named_buffers()}
    extra = set(result.unexpected_keys)
    if absent or extra:
        raise FormatError(
            f"tensors of {folder} do not fit its config: missing [{listing(absent)}], "
            f"unexpected [{listing(extra)}]"
        )


def write_config(model: nn.Module, folder: Path, record: Mapping[str, Any]) -> None:
    """Write a model's config.json with `record` as its quantization_config.

    Raises:
        BadInput: if the model has no config.
    """
    saved = {**_save_config(model, folder), "quantization_config": dict(record)}
    text = json.dumps(saved, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _save_config(model: Any, folder: Path) -> dict[str, Any]:
    """Write a model's config.json by its own library; gives back what it holds.

    Raises:
        BadInput: if the model has no config.
    """
    config = getattr(model, "config", None)
    if hasattr(model, "save_config"):  # diffusers
        model.save_config(folder)
        return read_json(folder / "config.json")
    if config is None or not hasattr(config, "save_pretrained"):
        raise BadInput(f"{type(model).__name__} has no config to save; give a transformers model")
    config.save_pretrained(folder)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    dtype = str(float_dtype(model)).removeprefix("torch.")
    saved = read_json(folder / "config.json")
    return {**saved, "architectures": [type(model).__name__], "dtype": dtype}


def restore_generation_config_(model: nn.Module, folder: Path) -> None:
    """Give the model the folder's own generation settings, if there are any."""
    if (folder / "generation_config.json").exists() and hasattr(model, "generation_config"):
        from transformers import GenerationConfig

        found = GenerationConfig.from_pretrained(folder, local_files_only=True)
        setattr(model, "generation_config", found)  # noqa: B010 - unknown to nn.Module's types
