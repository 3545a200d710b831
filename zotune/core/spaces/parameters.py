"""Spaces over float parameters: all of them, biases; and how their blocks are found."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zotune.core.block import FloatBlock, Owner
from zotune.core.space import Observe, Space, SpaceSpec, matching, owners_of
from zotune.errors import BadInput
from zotune.models.adapter import CHILD, LowRank, adapters
from zotune.models.linears import linears
from zotune.quant.graph import Graph
from zotune.quant.linear import is_conv1d

_DECAYED = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)
_LARGE = 1 << 20  # elements, beyond which squares are taken run by run: a forward takes less
_ZERO_UNIT = 0.02  # unit of a block that is all zeros: the usual std of initial weights

Keep = Callable[[Owner], bool]


def blocks_of(
    model: nn.Module,
    spec: SpaceSpec,
    keep: Keep,
    pattern: str | None,
    what: str,
    keep_master: bool = True,
) -> Space:
    """Float blocks over the parameters whose first owner passes `keep` and whose name matches.

    Tied parameters are one block. The unit of a block is the rms of its values.
    """
    owners = owners_of(model)
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
        and CHILD not in name
        and any(keep(o) for o in owners[id(parameter)])
    }
    if not found:
        raise BadInput(f"this model has no {what} to tune; see `zotune list spaces`")
    wanted = matching(found, pattern)
    blocks = []
    for name, parameter in found.items():
        if wanted(name):
            held = tuple(owners[id(parameter)])
            blocks.append(
                FloatBlock.of(
                    name, parameter, held, unit=rms(parameter), decay=_decays(held),
                    keep_master=keep_master, **spec.options,
                )
            )  # fmt: skip
    return Space(blocks)


def rms(tensor: Tensor) -> float:
    """Root mean square, with a floor for tensors of zeros."""
    if tensor.numel() > _LARGE:
        parts = torch.split(tensor.detach().flatten(), _LARGE)
        total = sum(float(part.float().square().sum(dtype=torch.float64)) for part in parts)
        return math.sqrt(total / tensor.numel()) or _ZERO_UNIT
    value = float(tensor.detach().float().square().mean().sqrt()) if tensor.numel() else 0.0
    return value or _ZERO_UNIT


def _decays(owners: tuple[Owner, ...]) -> bool:
    """Weight decay is for matrices of layers, told by module type, never by name."""
    conv1d = any(is_conv1d(o.module) for o in owners)
    typed = any(isinstance(o.module, _DECAYED) for o in owners)
    graphs = [o.module.roles[o.attribute] for o in owners if isinstance(o.module, Graph)]
    if graphs:
        return graphs == ["weight"]
    return (typed or conv1d) and all(o.attribute == "weight" for o in owners)


def is_norm(owner: Owner) -> bool:
    """Whether a parameter's module normalises, told by its class (LayerNorm, LlamaRMSNorm...)."""
    if isinstance(owner.module, Graph):
        return owner.module.roles[owner.attribute] == "norm"
    return "norm" in type(owner.module).__name__.lower()


def is_bias(owner: Owner) -> bool:
    """Whether a parameter is a bias, but not a norm's."""
    if isinstance(owner.module, Graph):
        return owner.module.roles[owner.attribute] == "bias"
    return owner.attribute == "bias" and not is_norm(owner)


def is_quantized(owner: Owner) -> bool:
    """Whether a parameter belongs to stored codes; in torch's modules those are buffers."""
    graph = owner.module
    return isinstance(graph, Graph) and graph.roles[owner.attribute] in ("scale", "zero")


def heads(model: nn.Module) -> set[int]:
    """ids of the modules that make the output: a classifier by name, or the output embedding."""
    names = ("head", "score", "classifier", "fc", "qa_outputs")
    found = {id(m) for n in names if isinstance(m := getattr(model, n, None), nn.Module)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        found.add(id(output))
    return found | {id(child) for m in model.children() if id(m) in found for child in m.modules()}


@dataclass(frozen=True)
class Weights(SpaceSpec):
    """Every float parameter, or those whose name matches `pattern`: MeZO's full tuning.

    16-bit weights are moved by stochastic rounding, so that there is no second copy of them.
    """

    pattern: str | None = None

    def build(self, model: nn.Module, observe: Observe | None = None) -> Space:
        def keep(owner: Owner) -> bool:
            return not is_quantized(owner)

        return blocks_of(model, self, keep, self.pattern, "float parameters", False)


@dataclass(frozen=True)
class Biases(SpaceSpec):
    """Biases of all layers but norms."""

    pattern: str | None = None

    def build(self, model: nn.Module, observe: Observe | None = None) -> Space:
        return blocks_of(model, self, is_bias, self.pattern, "biases")


def body_adapters(model: nn.Module) -> list[tuple[str, nn.Module, LowRank]]:
    """The model's adapters but those on its output layer, which the head's space tunes."""
    inside = heads(model)
    return [found for found in adapters(model) if id(found[1]) not in inside]


def body_linears(model: nn.Module, targets: str | None) -> dict[str, nn.Module]:
    """The linear layers that adapters go on, by path: those that match, but for the output layer,
    which is a space of its own.

    Raises:
        BadInput: where the model has none.
    """
    inside = heads(model)
    layers = {path: layer for path, layer in linears(model) if id(layer) not in inside}
    if not layers:
        raise BadInput(
            "adapters go on linear layers, and this model shows none but its output layer; tune "
            "its scales, norms, biases, weights or head"
        )
    wanted = matching(layers, targets)
    return {path: layer for path, layer in layers.items() if wanted(path)}
