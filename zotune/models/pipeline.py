"""Diffusers pipelines: a folder of components, one of which, the denoiser, is the model.

`model_index.json` names each component's library and class. They are loaded one by one from
`diffusers` and `transformers` alone, weights as safetensors only: code that lies in the folder is
never run.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from zotune.errors import BadInput, FormatError
from zotune.quant import formats
from zotune.quant.formats.build import quiet_random_state
from zotune.quant.formats.folder import WEIGHTS
from zotune.quant.formats.plain import no_progress_bar
from zotune.quant.formats.tensors import read_json

INDEX: Final = "model_index.json"
LIBRARIES: Final = ("diffusers", "transformers")


@dataclass(frozen=True)
class Kind:
    """Names of a pipeline's denoiser and of what reads its captions (none: unconditional)."""

    denoiser: str
    texts: tuple[str, ...] = ()


_TEXT = ("text_encoder", "tokenizer")
KINDS: Final = {
    "DDPMPipeline": Kind("unet"),
    "DDIMPipeline": Kind("unet"),
    "StableDiffusionPipeline": Kind("unet", _TEXT),
    "StableDiffusion3Pipeline": Kind(
        "transformer", tuple(f"{name}{number}" for number in ("", "_2", "_3") for name in _TEXT)
    ),
}


@dataclass(frozen=True)
class Denoiser:
    """A diffusers model class with the two methods of a transformers Auto class."""

    kind: Any

    def from_config(self, config: dict[str, Any], **options: Any) -> nn.Module:
        model: nn.Module = self.kind.from_config(config)
        return model

    def from_pretrained(self, folder: Path, *, dtype: torch.dtype, **options: Any) -> Any:
        model, info = self.kind.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, output_loading_info=True,
            local_files_only=True,
        )  # fmt: skip
        model.register_to_config(_name_or_path="")  # where it lies is not part of what it is
        return model, info


def is_pipeline(folder: Path) -> bool:
    return (folder / INDEX).is_file()


def model_folder(folder: Path) -> Path:
    """Where the files of a folder's model lie: a pipeline's denoiser has a folder of its own."""
    return folder / read_index(folder)[1].denoiser if is_pipeline(folder) else folder


def read_index(folder: Path) -> tuple[str, Kind, dict[str, tuple[str, str]]]:
    """Class name, kind, and (library, class) of every component that is there.

    Raises:
        BadInput: a pipeline class that is not known.
        FormatError: no pipeline folder, or a component of another library.
    """
    index = read_json(folder / INDEX)
    name = str(index.get("_class_name"))
    if name not in KINDS:
        raise BadInput(f"{folder} is a {name}; of diffusers' pipelines {', '.join(KINDS)} are read")
    pairs = {k: v for k, v in index.items() if isinstance(v, list) and len(v) == 2 and v[1]}
    foreign = sorted(k for k, v in pairs.items() if v[0] not in LIBRARIES)
    kind = KINDS[name]
    if set(foreign) & {kind.denoiser, "vae", "scheduler", *kind.texts}:
        raise FormatError(
            f"{folder / INDEX}: components {', '.join(foreign)} are not classes of "
            f"{' or '.join(LIBRARIES)}; code from a checkpoint is not run"
        )
    return name, kind, {k: (str(v[0]), str(v[1])) for k, v in pairs.items()}


def component(folder: Path, name: str, dtype: torch.dtype | None = None) -> Any:
    """One part of a pipeline, such as "scheduler" or "vae"; None where the pipeline has none.

    `dtype` of a module's weights; None is float32.

    Raises:
        FormatError: the part is damaged, missing, or holds pickles only.
    """
    parts = read_index(folder)[2]
    if name not in parts:
        return None
    library, kind = parts[name]
    found = getattr(_library(library), kind, None)
    if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
        raise FormatError(f"{folder / INDEX}: {library} has no {kind}; is it up to date?")
    options: dict[str, Any] = {"local_files_only": True}
    if issubclass(found, nn.Module):
        key = "torch_dtype" if library == "diffusers" else "dtype"
        options |= {"use_safetensors": True, key: dtype or torch.float32}
    try:
        with quiet_random_state(), no_progress_bar():
            part = found.from_pretrained(folder / name, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise FormatError(f"{folder / name} cannot be loaded: {error}") from error
    return part.eval().requires_grad_(False) if isinstance(part, nn.Module) else part


def read_denoiser(folder: Path, dtype: torch.dtype | None) -> tuple[nn.Module, str]:
    """A pipeline's denoiser in eval mode, and the name of the format it is stored in."""
    name, kind, parts = read_index(folder)
    place = folder / kind.denoiser
    if kind.denoiser not in parts or not place.is_dir():
        raise FormatError(f"{folder} is a {name} without its {kind.denoiser!r}; fetch it again")
    found = getattr(_library("diffusers"), parts[kind.denoiser][1], None)
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        raise FormatError(f"{folder / INDEX}: diffusers has no {parts[kind.denoiser][1]}")
    return formats.read(place, Denoiser(found), dtype=dtype), formats.detect(place)


def write_pipeline(model: nn.Module, folder: Path, source: Path) -> None:
    """Save a denoiser among copies of its pipeline's other files, into an existing folder.

    The other components are copied byte for byte. Whole checkpoints that lie beside them are not:
    they hold the denoiser as it was.

    Raises:
        FormatError: the pipeline the model was read from is gone.
    """
    _, kind, parts = read_index(source)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix.lower() not in WEIGHTS and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)
        elif path.is_dir() and path.name in parts and path.name != kind.denoiser:
            shutil.copytree(path, folder / path.name)
    formats.write(model, folder / kind.denoiser)


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise BadInput(f"diffusion models need {name}; pip install 'zotune[diffusion]'") from error
