"""Format "zotune": a transformers folder whose layers hold codes and scales.

`config.json` carries
`"quantization_config": {"quant_method": "zotune", "version": 1, "scheme": "int4-g64",
"modules": [...], "scale_dtype": "float32"}`, and `model.safetensors` the tensors
`<module>.codes`, `.scale`, `.zero`, `.bias` besides the float ones. Tied tensors are stored once.
Modules of another scheme than the first are listed under "schemes": {module: scheme}.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from zotune.errors import BadInput, FormatError
from zotune.quant.formats.build import (
    assign_,
    empty_model,
    model_config,
    restore_generation_config_,
    write_config,
)
from zotune.quant.formats.shards import Entry, entries
from zotune.quant.formats.shelf import Memory, Shelf, taken
from zotune.quant.formats.tensors import (
    SINGLE,
    check_files,
    listing,
    quantization,
    read_json,
)
from zotune.quant.layer import QuantLayer
from zotune.quant.model import empty_twin, float_layers, replace_
from zotune.quant.scheme import Scheme

log = logging.getLogger("zotune")
VERSION: Final = 1
SCALE_DTYPES: Final = {"float32": torch.float32, "float16": torch.float16}


class NativeFormat:
    """zotune's own checkpoints."""

    name = "zotune"
    tunable = ("scales", "zeros", "codes", "norms", "biases", "weights")

    def detect(self, folder: Path) -> bool:
        """Whether the folder's config names zotune as its quantizer."""
        return quantization(folder).get("quant_method") == "zotune"

    def read(
        self, folder: Path, auto: Any, dtype: torch.dtype | None, trust_remote_code: bool
    ) -> nn.Module:
        """The model with quantized layers; `dtype` None keeps float tensors as they are stored.

        Raises:
            FormatError: for a damaged file, an unknown version, or tensors that do not fit.
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
        """As `read`, one tensor at a time."""
        schemes, scale_dtype = _read_record(folder)
        names = check_files(folder)
        config = model_config(folder, trust_remote_code)
        model = empty_model(config, auto, names, trust_remote_code)
        _place_layers_(model, schemes, scale_dtype, names, folder)
        tensors = _shelved(shelf, entries(folder), schemes, scale_dtype, dtype, folder)
        assign_(model, tensors, folder)
        restore_generation_config_(model, folder)
        return model.eval()

    def write(self, model: nn.Module, folder: Path) -> None:
        """Save config and weights into an existing folder.

        Raises:
            BadInput: if the model has no config, or its layers disagree on `scale_dtype`.
        """
        from safetensors.torch import save_file

        layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLayer)}
        record = _make_record(layers)
        write_config(model, folder, record)
        save_file(_on_disk(model, layers), folder / SINGLE, metadata={"format": "pt"})


def _read_record(folder: Path) -> tuple[dict[str, Scheme], torch.dtype]:
    record = read_json(folder / "config.json").get("quantization_config") or {}
    where = f"quantization_config of {folder / 'config.json'}"
    if record.get("version") != VERSION:
        raise FormatError(
            f"{where} has version={record.get('version')!r}; this zotune reads {VERSION}: update it"
        )
    modules, other = record.get("modules"), record.get("schemes", {})
    if not isinstance(modules, list) or not isinstance(other, dict):
        raise FormatError(f"{where} has no list of modules; fetch it again")
    if record.get("scale_dtype") not in SCALE_DTYPES:
        raise FormatError(
            f"{where} has scale_dtype={record.get('scale_dtype')!r}; wanted {sorted(SCALE_DTYPES)}"
        )
    try:
        first = str(record.get("scheme"))
        schemes = {str(name): Scheme.parse(str(other.get(name, first))) for name in modules}
    except BadInput as error:
        raise FormatError(f"{where}: {error}") from error
    return schemes, SCALE_DTYPES[record["scale_dtype"]]


def _make_record(layers: dict[str, QuantLayer]) -> dict[str, Any]:
    dtypes = {layer.scale_dtype for layer in layers.values()}
    if len(dtypes) != 1 or not dtypes <= set(SCALE_DTYPES.values()):
        raise BadInput(
            f"layers have scale_dtype {sorted(map(str, dtypes))}; set one of "
            f"{sorted(SCALE_DTYPES)} on all of them"
        )
    schemes = {name: str(layer.scheme) for name, layer in layers.items()}
    first = next(iter(schemes.values()))
    record: dict[str, Any] = {
        "quant_method": "zotune",
        "version": VERSION,
        "scheme": first,
        "modules": list(layers),
        "scale_dtype": str(dtypes.pop()).removeprefix("torch."),
    }
    other = {name: scheme for name, scheme in schemes.items() if scheme != first}
    return {**record, "schemes": other} if other else record


def _place_layers_(
    model: nn.Module,
    schemes: dict[str, Scheme],
    scale_dtype: torch.dtype,
    stored: list[str],
    folder: Path,
) -> None:
    layers = dict(float_layers(model))
    wrong = set(schemes) - set(layers)
    if wrong:
        raise FormatError(
            f"config.json of {folder} lists quantized modules that {type(model).__name__} does not "
            f"have as linear layers or convolutions: [{listing(wrong)}]"
        )
    for name, scheme in schemes.items():
        layer = empty_twin(layers[name], scheme)
        scheme.check_divides(layer.columns, name)
        layer.scale_dtype = scale_dtype
        if f"{name}.input_clip" in stored:
            layer.input_clip = torch.empty(1, device="meta")
        replace_(model, name, layer)


def _shelved(
    shelf: Shelf,
    stored: dict[str, Entry],
    schemes: dict[str, Scheme],
    scale_dtype: torch.dtype,
    dtype: torch.dtype | None,
    folder: Path,
) -> dict[str, Tensor]:
    """Scales to float32, other float tensors to `dtype`; checks the stored dtypes of a layer."""
    grid: dict[str, torch.dtype] = {}
    for name, scheme in schemes.items():
        grid[f"{name}.codes"] = scheme.stored
        grid[f"{name}.scale"] = grid[f"{name}.zero"] = scale_dtype
    found = {}
    for name, entry in stored.items():
        if name in grid and entry.dtype != grid[name]:
            raise FormatError(f"tensor {name!r} of {folder} is {entry.dtype}; wanted {grid[name]}")
        if name.endswith(".codes") and name in grid:
            found[name] = shelf.take(entry)
        else:
            found[name] = taken(shelf, entry, torch.float32 if name in grid else dtype)
    return found


def _on_disk(model: nn.Module, layers: dict[str, QuantLayer]) -> dict[str, Tensor]:
    """Tensors as they are stored: scales in `scale_dtype`, each shared tensor under one name."""
    scales = {f"{n}.{part}": layer for n, layer in layers.items() for part in ("scale", "zero")}
    stored: dict[str, Tensor] = {}
    seen: set[tuple[Any, ...]] = set()
    lossy = []
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        if name in scales:
            rounded = tensor.to(scales[name].scale_dtype)
            if not torch.equal(rounded.float(), tensor):
                lossy.append(name)
            tensor = rounded
        stored[name] = tensor.detach().cpu().contiguous()
    if lossy:
        log.warning(
            "scales are rounded to the checkpoint's scale_dtype in [%s]; call round_to_storage_() "
            "on the layers before measuring the model to measure what is saved",
            listing(lossy),
        )
    return stored


FORMAT = NativeFormat()
