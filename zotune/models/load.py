"""Loading a model and its tokenizer from a folder or the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from zotune.errors import BadInput, FormatError
from zotune.models.encoder import HEAD_KEY, PooledClassifier, read_head
from zotune.models.pipeline import is_pipeline, read_denoiser
from zotune.models.tokenizer import load_tokenizer, with_padding
from zotune.quant import QuantLayer, Scheme, formats, quantize_model_
from zotune.quant.formats.tensors import read_json
from zotune.quant.model import default_exclude

KINDS: Final = ("causal", "encoder", "classifier", "vision")
DTYPES: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model with what is needed to run and save it.

    Attributes:
        model: in eval mode.
        tokenizer: None if the folder has none.
        kind: "causal", "encoder", "classifier" (of texts), "vision" (a classifier of images) or
            "diffusion" (a pipeline's denoiser).
        path: the local folder, or the model's file; pass it as `source` when writing.
        config: the model's configuration, as its library holds it.
        format: name of the checkpoint's format.
        prepared: what was made of the checkpoint before its training, for the run's journal.
    """

    model: nn.Module
    tokenizer: Any
    kind: str
    path: Path
    config: Any
    format: str
    prepared: Mapping[str, Any] = field(default_factory=dict)


def load(
    path: str | Path,
    *,
    kind: str = "auto",
    dtype: str | torch.dtype = "auto",
    scheme: str | Scheme | None = None,
    exclude: tuple[str, ...] | None = None,
    compute_dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    device: str | torch.device = "cpu",
    shelf: formats.Shelf | None = None,
) -> Loaded:
    """Load a model and its tokenizer.

    Args:
        path: a local folder, a .gguf or .onnx file, or a hub id such as "org/name". The folder of a
            diffusers pipeline gives its denoiser, of kind "diffusion".
        kind: one of `KINDS`, or "auto" to tell from the config. A folder written
            from a `PooledClassifier` loads as one, of kind "classifier"; with kind="encoder" the
            encoder alone.
        dtype: of float tensors: "float32", "bfloat16", "float16", or "auto": what is stored for
            quantized folders, else float32 on the CPU and the config's dtype elsewhere.
        scheme: quantize a float model to nearest while loading, such as "int4-g64".
        exclude: layers that `scheme` leaves alone; the output layer when None.
        compute_dtype: dtype of quantized layers' products: "auto" takes bfloat16 where the CPU
            multiplies it in hardware, "float32" and "bfloat16" as they say.
        trust_remote_code: whether Python files of the checkpoint may run.
        device: where the model goes.
        shelf: where its tensors go as they are read (`zotune.models.streaming.Store`); None for
            memory. They stay there, whatever `device` is.

    Raises:
        BadInput: for an unknown kind or dtype, or a scheme that does not fit.
        FormatError: for a folder that is missing, damaged or of an unknown format.
    """
    folder = find_folder(path, trust_remote_code)
    if shelf is not None and (scheme is not None or is_pipeline(folder)):
        what = "a pipeline" if scheme is None else f"quantizing to {scheme} while loading"
        raise BadInput(
            f"{what} needs the whole model in memory, which streaming avoids; quantize first "
            "(`zotune quantize`), or drop --stream"
        )
    if is_pipeline(folder):
        loaded = _denoiser(folder, dtype)
    else:
        loaded = _checkpoint(folder, kind, dtype, trust_remote_code, device, shelf)
    if scheme is not None:
        _quantize_(loaded, scheme, exclude)
    set_compute_dtype_(loaded.model, compute_dtype)
    if shelf is None:
        loaded.model.to(device)
    loaded.model.eval()
    return loaded


def _denoiser(folder: Path, dtype: str | torch.dtype) -> Loaded:
    model, found = read_denoiser(folder, None if dtype == "auto" else parse_dtype(dtype))
    return Loaded(model, None, "diffusion", folder, model.config, found)


def _checkpoint(
    folder: Path,
    kind: str,
    dtype: str | torch.dtype,
    trust_remote_code: bool,
    device: str | torch.device,
    shelf: formats.Shelf | None,
) -> Loaded:
    """Of one of the formats, with its tokenizer."""
    found = formats.detect(folder)
    own = formats.formats()[found]
    whole = own if isinstance(own, formats.SelfContained) else None
    home = formats.home_of(folder)
    config = whole.config(folder) if whole else read_json(home / "config.json")
    resolved = resolve_kind(config, kind, folder)
    pooled = HEAD_KEY in config and resolved == "classifier"
    model = formats.read(
        folder,
        _auto_class("encoder" if pooled else resolved),
        dtype=_resolve_dtype(dtype, found, device, config),
        trust_remote_code=trust_remote_code,
        shelf=shelf,
    )
    inner_config = model.config
    if pooled:
        model = PooledClassifier(model, *read_head(home))
    tokenizer = None
    if whole:
        tokenizer = with_padding(whole.tokenizer(folder), folder)
    elif resolved != "vision":
        tokenizer = load_tokenizer(home, trust_remote_code)
    return Loaded(model, tokenizer, resolved, folder, inner_config, found)


def _quantize_(loaded: Loaded, scheme: str | Scheme, exclude: tuple[str, ...] | None) -> None:
    if loaded.format != "float":
        raise BadInput(
            f"{loaded.path} is already quantized; leave scheme out or load a float checkpoint"
        )
    inner = loaded.model.saved_model if isinstance(loaded.model, formats.Wrapper) else loaded.model
    quantize_model_(inner, scheme, default_exclude(loaded.kind) if exclude is None else exclude)


def find_folder(path: str | Path, trust_remote_code: bool = False) -> Path:
    """The local folder of a checkpoint, or the .gguf or .onnx file that is one.

    A hub id is downloaded, weights as safetensors only.

    "package:NAME/FOLDER" is a folder inside an installed Python package (which is not imported).

    Raises:
        FormatError: if there is no such folder and the hub does not deliver.
    """
    if str(path).startswith("package:"):
        return _package_folder(str(path).removeprefix("package:"))
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file() and folder.suffix in (".gguf", ".onnx"):
        return folder
    if folder.exists():
        raise FormatError(
            f"{folder} is a file; give a .gguf or .onnx file or a checkpoint's folder"
        )
    if not _HUB_ID.fullmatch(str(path)):
        raise FormatError(f"{folder} does not exist; give a checkpoint folder or a hub id")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
    try:
        return Path(
            snapshot_download(
                str(path),
                allow_patterns=[*wanted, "*.py"] if trust_remote_code else wanted,
                ignore_patterns=["*/*"],
            )
        )
    except Exception as error:  # the hub client's errors have no common base
        raise FormatError(
            f"{path!r} is no folder here, and the hub did not deliver it ({error})"
        ) from error


def _package_folder(path: str) -> Path:
    from importlib.util import find_spec

    name, _, inside = path.partition("/")
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise FormatError(f"Python package {name!r} is not installed; pip install it first")
    folder = Path(spec.submodule_search_locations[0]) / inside
    if not folder.is_dir():
        raise FormatError(f"Python package {name!r} has no folder {inside!r}")
    return folder


def resolve_kind(config: dict[str, Any], kind: str, folder: Path) -> str:
    """The kind asked for or, for "auto", the one the configuration tells.

    >>> resolve_kind({"architectures": ["LlamaForCausalLM"]}, "auto", Path("."))
    'causal'
    """
    if kind in KINDS:
        return kind
    if kind != "auto":
        raise BadInput(f"kind={kind!r} is unknown; use 'auto' or one of {KINDS}")
    names = config.get("architectures") or [""]
    if HEAD_KEY in config or names[0].endswith("ForSequenceClassification"):
        return "classifier"
    if names[0].endswith("ForImageClassification") or "pretrained_cfg" in config:  # timm's
        return "vision"
    if names[0].endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    from transformers.models.auto import modeling_auto as auto

    model_type = config.get("model_type")
    if not names[0] and model_type in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return "vision"
    if model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "encoder"
    if model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "causal"
    raise BadInput(
        f"{folder} is a {names[0] or model_type!r}, whose kind is not known; "
        f"give kind= one of {KINDS}"
    )


def set_compute_dtype_(model: nn.Module, compute_dtype: str | torch.dtype = "auto") -> None:
    """Set the dtype in which quantized layers multiply.

    "auto" is bfloat16 where the CPU has instructions for it, else the input's dtype.

    Raises:
        BadInput: for an unknown dtype.
    """
    if compute_dtype == "auto":
        chosen = torch.bfloat16 if multiplies_bfloat16() else None
    else:
        chosen = parse_dtype(compute_dtype)
    for module in model.modules():
        if isinstance(module, QuantLayer):
            module.compute_dtype = chosen


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 products."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch dtype from its name.

    >>> parse_dtype("bfloat16")
    torch.bfloat16
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise BadInput(f"dtype={name!r} is not supported; use 'auto' or one of {sorted(DTYPES)}")
    return DTYPES[name]


def _resolve_dtype(
    dtype: str | torch.dtype, found: str, device: str | torch.device, config: dict[str, Any]
) -> torch.dtype | None:
    if dtype != "auto":
        return parse_dtype(dtype)
    if found != "float" or torch.device(device).type == "cpu":
        return None
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    return DTYPES.get(str(stored), torch.float32)


def _auto_class(kind: str) -> Any:
    import transformers

    if kind == "vision":
        import_module("zotune.models.cifar_resnet")  # known to the Auto classes from now on
        return transformers.AutoModelForImageClassification
    return {
        "causal": transformers.AutoModelForCausalLM,
        "encoder": transformers.AutoModel,
        "classifier": transformers.AutoModelForSequenceClassification,
    }[kind]
