"""Low-rank adapters beside a model's linear layers, stored as PEFT's LoRA layout.

An adapter hangs on its layer by a forward hook, so the layer keeps its type and its tensors keep
their names: what is underneath can be float or quantized, and is saved as it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.errors import BadInput, FormatError

CHILD = "zotune_adapter"


class LowRank(nn.Module):
    """x -> scaling * (x A^T) B^T with A (rank, in), B (out, rank) in float32.

    >>> adapter = LowRank(torch.randn(2, 8), torch.zeros(4, 2))
    >>> adapter(torch.randn(3, 8)).abs().sum().item()
    0.0
    """

    def __init__(self, a: Tensor, b: Tensor, scaling: float = 1.0) -> None:
        super().__init__()
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise BadInput(
                f"adapter factors {tuple(a.shape)} and {tuple(b.shape)}; want (rank, in), (out, rank)"
            )
        self.A = nn.Parameter(a.float(), requires_grad=False)
        self.B = nn.Parameter(b.float(), requires_grad=False)
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.A.to(x.dtype))
        return F.linear(hidden, self.scaling * self.B.to(x.dtype))


def attach(layer: nn.Module, adapter: LowRank) -> None:
    """Add the adapter's output to the layer's from now on; a second adapter is an error."""
    if hasattr(layer, CHILD):
        raise BadInput("this layer has an adapter already; detach it before attaching another")
    layer.add_module(CHILD, adapter)
    handle = layer.register_forward_hook(_add)
    object.__setattr__(layer, "_zotune_hook", handle)


def _add(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    adapter = layer._modules[CHILD]
    assert adapter is not None
    return output + adapter(args[0])


def detach(model: nn.Module) -> None:
    """Remove every adapter from the model."""
    for _, layer, _ in list(adapters(model)):
        _remove(layer)


def _remove(layer: nn.Module) -> None:
    layer._zotune_hook.remove()  # type: ignore[union-attr,operator]
    del layer._zotune_hook
    del layer._modules[CHILD]


def fold_(layer: nn.Module) -> None:
    """Add the adapter's product to a float layer's own weight, and remove the adapter."""
    adapter = layer._modules[CHILD]
    assert isinstance(adapter, LowRank)
    weight = layer.get_parameter("weight")
    with torch.no_grad():
        product = adapter.scaling * adapter.B.double() @ adapter.A.double()
        weight.copy_((weight.double() + product).to(weight.dtype))
    _remove(layer)


def adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module, LowRank]]:
    """(layer path, layer, adapter) of every adapter in the model."""
    for path, module in model.named_modules():
        child = module._modules.get(CHILD)
        if isinstance(child, LowRank):
            yield path, module, child


def save_peft(model: nn.Module, folder: Path, base: str, prefix: str = "") -> None:
    """Write adapter_config.json and adapter_model.safetensors as PEFT's LoRA does.

    `prefix` is stripped from layer paths ("encoder." of a classifier), so that PEFT finds the
    layers in the bare model. All adapters of a model share rank and scaling.
    """
    from safetensors.torch import save_file

    found = list(adapters(model))
    if not found:
        raise BadInput("the model has no adapters to save")
    ranks = {a.A.shape[0] for _, _, a in found}
    scalings = {a.scaling for _, _, a in found}
    if len(ranks) > 1 or len(scalings) > 1:
        raise BadInput(
            f"adapters of ranks {ranks}, scalings {scalings}; PEFT's layout wants one each"
        )
    rank, scaling = ranks.pop(), scalings.pop()
    outside = [path for path, _, _ in found if not path.startswith(prefix)]
    if outside:
        raise BadInput(f"adapters on {outside[:3]} lie outside {prefix!r}: PEFT would not find them")
    names = [path.removeprefix(prefix) for path, _, _ in found]
    tensors = {}
    for name, (_, _, adapter) in zip(names, found, strict=True):
        tensors[f"base_model.model.{name}.lora_A.weight"] = adapter.A.detach().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = adapter.B.detach().contiguous()
    config = {
        "peft_type": "LORA", "base_model_name_or_path": base, "r": rank,
        "lora_alpha": rank * scaling, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(names), "task_type": None, "inference_mode": True,
        "fan_in_fan_out": any(type(layer).__name__ == "Conv1D" for _, layer, _ in found),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_peft(model: nn.Module, folder: Path, prefix: str = "") -> None:
    """Attach the LoRA adapters that a folder holds; shapes and layer names are checked first."""
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError) as error:
        raise FormatError(f"{folder}: not a readable PEFT adapter folder: {error}") from error
    except Exception as error:  # safetensors raises its own type for damaged files
        raise FormatError(f"{folder}/adapter_model.safetensors: {error}") from error
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise FormatError(
            f"{folder}: peft_type {config.get('peft_type')!r}; only plain LoRA is read"
        )
    scaling = config["lora_alpha"] / config["r"]
    layers = dict(model.named_modules())
    start, ends = "base_model.model.", (".lora_A.weight", ".lora_B.weight")
    paths = sorted(
        {k.removeprefix(start).removesuffix(ends[0]) for k in tensors if k.endswith(ends[0])}
    )
    missing = [p for p in paths if prefix + p not in layers]
    if missing or not paths:
        raise FormatError(f"{folder}: adapter layers {missing[:3] or 'none'} are not in this model")
    for path in paths:
        a, b = (tensors[f"{start}{path}{end}"] for end in ends)
        attach(layers[prefix + path], LowRank(a, b, scaling))
