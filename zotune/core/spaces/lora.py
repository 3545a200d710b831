"""LoRA adapters: A and B tuned, or B alone (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from zotune.core import noise
from zotune.core.block import FloatBlock, Owner
from zotune.core.noise import Key
from zotune.core.space import Observe, Space, SpaceSpec, matching
from zotune.core.spaces.parameters import body_adapters, heads, rms
from zotune.errors import BadInput
from zotune.models.adapter import CHILD, LowRank, attach, device_of
from zotune.models.linears import linears

ATTENTION = r"(^|\.)(q|v|c_attn|query|value)(_proj|_lin)?$"
"""MeZO's and PEFT's usual targets: query and value (GPT-2's c_attn holds them)."""


@dataclass(frozen=True)
class Lora(SpaceSpec):
    """y = W x + (alpha / rank) B A x, B from zero, A from U(-1/sqrt in, 1/sqrt in) by `seed`.

    Defaults as MeZO's: query and value, rank 8, alpha 16. Adapters that the model already has
    (loaded from a PEFT folder) are tuned further. Unit of A: its rms; of B: 1/sqrt(rank in).
    With `freeze_a` only B is tuned (LoRA-FA, Zhang et al. 2023, arXiv 2308.03303).
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str | None = ATTENTION
    seed: int = 0
    freeze_a: bool = False

    def build(self, model: nn.Module, observe: Observe | None = None) -> Space:
        if self.rank < 1:
            raise BadInput(f"rank={self.rank}; want rank >= 1")
        if not body_adapters(model):
            for path, layer in body_linears(model, self.targets).items():
                attach(layer, self._fresh(path, layer))
        blocks = []
        for path, _, adapter in body_adapters(model):
            for attribute in ("B",) if self.freeze_a else ("A", "B"):
                tensor = getattr(adapter, attribute)
                unit = rms(tensor) if tensor.any() else (adapter.A.numel()) ** -0.5
                owner = Owner(f"{path}.{CHILD}", adapter, attribute)
                name = f"{path}.lora_{attribute}"
                blocks.append(
                    FloatBlock.of(name, tensor, [owner], unit=unit, decay=True, **self.options)
                )
        return Space(blocks)

    def _fresh(self, path: str, layer: nn.Module) -> LowRank:
        inputs, outputs = sizes(layer)
        u = noise.draw("uniform", Key(self.seed), f"{path}.lora_A#init", 0, self.rank * inputs)
        return LowRank(
            u.view(self.rank, inputs) * inputs**-0.5,
            torch.zeros(outputs, self.rank),
            self.alpha / self.rank,
        ).to(device_of(layer))


def body_linears(model: nn.Module, targets: str | None) -> dict[str, nn.Module]:
    """The linear layers that adapters go on, by path: those that match, but for the output layer,
    which is a space of its own. Raises BadInput where the model has none."""
    inside = heads(model)
    layers = {p: m for p, m in linears(model) if id(m) not in inside}
    if not layers:
        raise BadInput(
            "adapters go on linear layers, and this model has none but its output layer; tune "
            "'norms', 'scales', 'weights' or 'head'"
        )
    wanted = matching(layers, targets)
    return {p: m for p, m in layers.items() if wanted(p)}


def sizes(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer of any kind."""
    if hasattr(layer, "in_features"):
        return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]
    return int(layer.nx), int(layer.nf)  # type: ignore[arg-type]
