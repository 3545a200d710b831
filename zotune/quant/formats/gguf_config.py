"""A transformers configuration out of a GGUF file's metadata, held against its tensors.

Transformers reads such metadata too, but leaves out the width of heads and scaled rotations, and
trusts what it reads.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn

from zotune.errors import FormatError
from zotune.quant.formats.gguf_file import GgufHeader

# Architectures and the transformers model that each is.
MODELS: Final = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
# Factors that divide the rotary frequencies (Llama 3.1).
HIDDEN_ROPE: Final = "rope_freqs.weight"
MISSING: Final = object()


def model_config(header: GgufHeader) -> Any:
    """The configuration of the file's model.

    Raises:
        FormatError: for other architectures, experts, rotations that are not read, or numbers that
            do not fit the file's tensors.
    """
    from transformers import AutoConfig

    found = _Metadata(header)
    architecture = header.metadata.get("general.architecture")
    if architecture not in MODELS:
        raise FormatError(f"{header.path} is a {architecture!r}; GGUF is read for {sorted(MODELS)}")
    if found.whole("split.count", 1) > 1:
        raise FormatError(
            f"{header.path} is one of several parts; join them with llama-gguf-split --merge"
        )
    if found.whole("expert_count", 0):
        raise FormatError(f"{header.path} has experts, which are not read")
    heads, hidden = found.whole("attention.head_count"), found.whole("embedding_length")
    width = found.whole("attention.key_length", hidden // max(heads, 1))
    sizes = {
        "num_hidden_layers": found.whole("block_count"),
        "hidden_size": hidden,
        "intermediate_size": found.whole("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": found.whole("attention.head_count_kv", heads),
        "head_dim": width,
        "vocab_size": found.shape("token_embd.weight")[0],
    }
    _check(found, sizes)
    model_type, class_name = MODELS[architecture]
    return AutoConfig.for_model(
        model_type,
        **sizes,
        architectures=[class_name],
        max_position_embeddings=found.whole("context_length"),
        rms_norm_eps=found.real("attention.layer_norm_rms_epsilon"),
        rope_parameters=_rotation(found),
        attention_bias="blk.0.attn_q.bias" in header.tensors,
        tie_word_embeddings="output.weight" not in header.tensors,
        **{
            f"{own}_token_id": found.whole(f"tokenizer.ggml.{name}_token_id", None)
            for own, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        },
    )


def frequencies_(model: nn.Module, header: GgufHeader) -> None:
    """Divide the rotary frequencies by the file's factors, if it has any.

    Raises:
        FormatError: if they do not fit.
    """
    tensor = header.tensors.get(HIDDEN_ROPE)
    if tensor is None:
        return
    if tensor.type != "F32":
        raise FormatError(f"tensor {HIDDEN_ROPE!r} of {header.path} is {tensor.type}; wanted F32")
    factors = tensor.read().view(torch.float32).flatten()
    for module in model.modules():
        inverse = getattr(module, "inv_freq", None)
        if isinstance(inverse, torch.Tensor):
            if inverse.shape != factors.shape:
                raise FormatError(
                    f"tensor {HIDDEN_ROPE!r} of {header.path} has {len(factors)} numbers; "
                    f"wanted {len(inverse)}"
                )
            inverse /= factors


def _rotation(found: _Metadata) -> dict[str, Any]:
    kind = found.get("rope.scaling.type", "none")
    rotation = {"rope_theta": found.real("rope.freq_base", 10000.0)}
    if kind == "linear":
        return {**rotation, "rope_type": "linear", "factor": found.real("rope.scaling.factor")}
    if kind != "none":
        raise FormatError(
            f"{found.header.path} scales its rotations by {kind!r}, which is not read; "
            "'linear' is, and Llama 3's factors"
        )
    return {**rotation, "rope_type": "default"}


def _check(found: _Metadata, sizes: dict[str, int]) -> None:
    """Compare with the first layer's tensors what would set the size of anything."""
    layers = {name.split(".")[1] for name in found.header.tensors if name.startswith("blk.")}
    heads, kv = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    hidden, width = sizes["hidden_size"], sizes["head_dim"]
    wanted = {
        "token_embd.weight": (sizes["vocab_size"], hidden),
        "blk.0.attn_q.weight": (heads * width, hidden),
        "blk.0.attn_k.weight": (kv * width, hidden),
        "blk.0.ffn_down.weight": (hidden, sizes["intermediate_size"]),
    }
    wrong = [n for n, shape in wanted.items() if found.shape(n) != shape]
    if len(layers) != sizes["num_hidden_layers"]:
        wrong.append(f"{len(layers)} layers")
    if (
        heads < 1
        or kv < 1
        or heads % kv
        or width % 2
        or width != found.whole("rope.dimension_count", width)
    ):
        wrong.append(f"{heads} heads of {width}, {kv} of them kept")
    if wrong:
        raise FormatError(f"{found.header.path} contradicts its own metadata: {wrong}")


class _Metadata:
    """Metadata by name, those of the architecture without its name in front."""

    def __init__(self, header: GgufHeader) -> None:
        self.header = header

    def get(self, name: str, default: Any = MISSING) -> Any:
        known = self.header.metadata
        own = f"{known.get('general.architecture')}.{name}"
        value = known.get(own, known.get(name, default))
        if value is MISSING:
            raise FormatError(f"{self.header.path} does not say {own!r}; convert it again")
        return value

    def whole(self, name: str, default: Any = MISSING) -> Any:
        value = self.get(name, default)
        if value is default and default is not MISSING:
            return value
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise FormatError(f"{self.header.path} has {name}={value!r}; wanted one whole number")
        return value

    def real(self, name: str, default: Any = MISSING) -> float:
        value = self.get(name, default)
        if not isinstance(value, float) or not 0 < value < float("inf"):
            raise FormatError(f"{self.header.path} has {name}={value!r}; wanted a number > 0")
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        tensor = self.header.tensors.get(name)
        if tensor is None:
            raise FormatError(f"{self.header.path} has no tensor {name!r}; it is not whole")
        return tensor.shape
