"""LoRA by the library `peft`, on float layers or on a frozen quantized base."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

from torch import nn

from zotune.bench.dequantizing import Dequantizing
from zotune.core.space import matching
from zotune.core.spaces.lora import Lora
from zotune.errors import BadInput

MISSING = "needs peft, which is not installed: pip install 'zotune[peft]'"


def has_peft() -> bool:
    """Whether the library is there."""
    return find_spec("peft") is not None


def attach_lora_(model: nn.Module) -> list[nn.Parameter]:
    """Adapters of the usual kind (query and value, rank 8, alpha 16); their factors, to be trained.

    Raises:
        BadInput: if peft is missing.
    """
    if not has_peft():
        raise BadInput(f"LoRA backprop {MISSING}")
    import peft
    from peft.tuners.lora import Linear

    usual = Lora()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Dequantizing)}
    wanted = matching(layers, usual.targets)
    config = peft.LoraConfig(
        r=usual.rank, lora_alpha=int(usual.alpha), lora_dropout=0.0,
        target_modules=[name for name in layers if wanted(name)],
    )  # fmt: skip
    config._register_custom_module({Dequantizing: Linear})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type")  # ours, and meant
        peft.inject_adapter_in_model(config, model)
    return [p for name, p in model.named_parameters() if ".lora_" in name]
