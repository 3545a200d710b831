"""Low-rank adapters beside a model's linear layers, stored as PEFT's LoRA layout.

An adapter hangs on its layer by a forward hook, so the layer keeps its type and its tensors keep
their names: what is underneath can be float or quantized, and is saved as it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.errors import BadInput, FormatError
from zotune.quant.linear import is_conv1d

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
                f"adapter of {tuple(a.shape)} and {tuple(b.shape)}; want (rank, in), (out, rank)"
            )
        self.A = nn.Parameter(a.float(), requires_grad=False)
        self.B = nn.Parameter(b.float(), requires_grad=False)
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.A.to(x.dtype))
        return F.linear(hidden, self.scaling * self.B.to(x.dtype))

    def joined(self, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """What the layer gives with this beside it."""
        added: Tensor = self(args[0])
        return output + added


def device_of(layer: nn.Module) -> torch.device:
    """Where a layer's tensors lie; the CPU if it has none."""
    return next((t.device for t in (*layer.parameters(), *layer.buffers())), torch.device("cpu"))


class Joined(Protocol):
    """What hangs on a layer and changes what it gives."""

    def joined(self, args: tuple[Any, ...], output: Tensor) -> Tensor: ...


def attach(layer: nn.Module, adapter: nn.Module) -> None:
    """Join the adapter's output with the layer's from now on; a second adapter is an error."""
    if hasattr(layer, CHILD):
        raise BadInput("this layer has an adapter already; detach it before attaching another")
    layer.add_module(CHILD, adapter)
    handle = layer.register_forward_hook(_join)
    object.__setattr__(layer, "_zotune_hook", handle)


def _join(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    adapter = cast(Joined, layer._modules[CHILD])
    return adapter.joined(args, output)


def detach(model: nn.Module) -> None:
    """Remove every adapter from the model."""
    for _, layer, _ in list(adapters(model)):
        remove(layer)


def remove(layer: nn.Module) -> None:
    """Take what hangs on the layer off."""
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
        if is_conv1d(layer):
            product = product.t()
        weight.copy_((weight.double() + product).to(weight.dtype))
    remove(layer)


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
        raise BadInput(
            f"adapters on {outside[:3]} lie outside {prefix!r}: PEFT would not find them"
        )
    names = [path.removeprefix(prefix) for path, _, _ in found]
    tensors = {}
    for name, (_, _, adapter) in zip(names, found, strict=True):
        tensors[f"base_model.model.{name}.lora_A.weight"] = adapter.A.detach().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = adapter.B.detach().contiguous()
    config = {
        "peft_type": "LORA", "base_model_name_or_path": base, "r": rank,
        "lora_alpha": rank * scaling, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(names), "task_type": None, "inference_mode": True,
        "fan_in_fan_out": any(is_conv1d(layer) for _, layer, _ in found),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_peft(model: nn.Module, folder: Path, prefix: str = "") -> None:
    """Attach the LoRA adapters that a folder holds; everything is checked before the first.

    The scaling is alpha / rank, alpha / sqrt(rank) for rank-stabilised LoRA, with each layer's
    own rank. What would be lost (biases, whole modules, DoRA's magnitudes) is an error.
    """
    config, tensors = _read_peft(folder)
    start, ends = "base_model.model.", (".lora_A.weight", ".lora_B.weight")
    paths = sorted(
        {k.removeprefix(start).removesuffix(e) for k in tensors for e in ends if k.endswith(e)}
    )
    names = {path: [f"{start}{path}{end}" for end in ends] for path in paths}
    unread = sorted(set(tensors) - {n for pair in names.values() for n in pair})
    if unread or not paths:
        raise FormatError(
            f"{folder}: adapter tensors {unread[:3] or 'none'}; only LoRA factors of linear "
            "layers are read. Merge the adapter into its model instead"
        )
    layers = dict(model.named_modules())
    missing = [p for p in paths if prefix + p not in layers]
    if missing:
        raise FormatError(f"{folder}: adapter layers {missing[:3]} are not in this model")
    found = []
    for path, (a, b) in names.items():
        layer, factors = layers[prefix + path], (tensors.get(a), tensors.get(b))
        rank = _rank(folder, path, layer, *factors)
        scaling = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
        found.append((layer, LowRank(*factors, scaling)))  # type: ignore[arg-type]
    for layer, adapter in found:
        attach(layer, adapter.to(device_of(layer)))


def _read_peft(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and tensors of a plain LoRA folder."""
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
    if not isinstance(config.get("lora_alpha"), int | float) or config.get("alpha_pattern"):
        raise FormatError(f"{folder}: want one lora_alpha for all layers and no alpha_pattern")
    return config, tensors


def _rank(folder: Path, path: str, layer: nn.Module, a: Tensor | None, b: Tensor | None) -> int:
    """The rank of a layer's factors, which fit the layer and each other."""
    inputs = getattr(layer, "in_features", getattr(layer, "nx", None))
    outputs = getattr(layer, "out_features", getattr(layer, "nf", None))
    shapes = [None if t is None else tuple(t.shape) for t in (a, b)]
    if a is None or b is None or shapes != [(len(a), inputs), (outputs, len(a))]:
        raise FormatError(
            f"{folder}: adapter factors of {path!r} have shapes {shapes}; want (rank, {inputs}) "
            f"and ({outputs}, rank)"
        )
    return len(a)
