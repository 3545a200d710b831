"""Which module can take up a transform of which layers' inputs, by the shapes of known blocks.

A norm behind which only linear layers read can: its gain and bias are divided. So can a value
projection (attention only averages its outputs) and the up projection of a gated MLP (they are
multiplied, channel by channel), or a layer in front of a ReLU, for scales alone. A norm whose
output is also added to a residual stream (BERT's) can not: the transform would change that too.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from zotune.quant.linear import QuantLinear, is_conv1d
from zotune.quant.qat.layer import FakeQuantLinear
from zotune.quant.qat.prepare import Link

_LLAMA = ("q_proj", "k_proj", "v_proj")
# (norm, its readers) below a block, for blocks that normalise before they read.
_NORMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("input_layernorm", tuple(f"self_attn.{n}" for n in _LLAMA)),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("self_attn_layer_norm", tuple(f"self_attn.{n}" for n in _LLAMA)),
    ("final_layer_norm", ("fc1",)),
    ("ln_1", ("attn.c_attn",)),
    ("ln_2", ("mlp.c_fc",)),
)
# (linear layer, its reader, whether the channels may be shifted)
_PAIRS: tuple[tuple[str, str, bool], ...] = (
    ("self_attn.v_proj", "self_attn.o_proj", True),
    ("self_attn.v_proj", "self_attn.out_proj", True),
    ("attn.c_attn", "attn.c_proj", True),
    ("attention.self.value", "attention.output.dense", True),
    ("mlp.up_proj", "mlp.down_proj", False),
)


def links(model: nn.Module) -> tuple[Link, ...]:
    """Every link of a Llama, Mistral, Qwen, OPT, GPT-2 or BERT, in the model's order."""
    found = {name: module for name, module in model.named_modules()}
    return tuple(link for name in found for link in _of_block(name, found))


def _of_block(block: str, modules: dict[str, nn.Module]) -> Iterator[Link]:
    """The links inside one block, if it is one."""
    start = f"{block}." if block else ""
    relu = getattr(getattr(modules[block], "activation_fn", None), "__class__", None) is nn.ReLU
    after = getattr(modules[block], "do_layer_norm_before", True) is False  # as BERT: see above
    for norm, names in _NORMS:
        readers = [f"{start}{name}" for name in names]
        module = modules.get(start + norm)
        if module is None or after or not all(map(_linear, map(modules.get, readers))):
            continue
        plain = not type(module).__name__.startswith("Gemma")  # its gain is 1 + weight
        if plain:
            biased = all(_has_bias(modules[name]) for name in (start + norm, *readers))
            yield Link(start + norm, tuple(readers), _sizes(modules[readers[0]])[0],
                       shiftable=biased)  # fmt: skip
    pairs = (*_PAIRS, ("fc1", "fc2", False)) if relu else _PAIRS
    for name, reader, shiftable in pairs:
        pair = modules.get(start + name), modules.get(start + reader)
        if all(map(_linear, pair)):
            yield _pair(start + name, start + reader, *pair, shiftable, modules[block])  # type: ignore[arg-type]


def _pair(
    name: str, reader: str, producer: nn.Module, module: nn.Module, shift: bool, block: nn.Module
) -> Link:
    outputs, columns = _sizes(producer)[1], _sizes(module)[0]
    shiftable = shift and _has_bias(producer) and _has_bias(module)
    if outputs == 3 * columns:  # queries, keys and values in one layer
        return Link(name, (reader,), columns, 2 * columns, None, shiftable)
    if outputs == columns:
        return Link(name, (reader,), columns, 0, None, shiftable)
    size = int(block.self_attn.head_dim)  # type: ignore[union-attr,arg-type]
    repeats = columns // outputs
    places = tuple((c // size // repeats) * size + c % size for c in range(columns))
    return Link(name, (reader,), outputs, 0, places, shiftable)


def _linear(module: object) -> bool:
    return isinstance(module, nn.Linear | FakeQuantLinear | QuantLinear) or is_conv1d(module)


def _has_bias(module: nn.Module) -> bool:
    return getattr(module, "bias", None) is not None


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    if is_conv1d(module):
        return int(module.nx), int(module.nf)  # type: ignore[arg-type]
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
