"""A transformers configuration as GGUF metadata."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from zotune.errors import BadInput

# transformers' names for models, and llama.cpp's.
ARCHITECTURES: Final = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# Rotations that are written: as they are, by one factor, or by a factor per frequency.
ROTATIONS: Final = ("default", "linear", "llama3")


def check_config(model: nn.Module) -> None:
    """Refuse what the metadata below cannot say.

    Raises:
        BadInput: for another architecture, a model without output layer, or other rotations.
    """
    config: Any = getattr(model, "config", None)
    name, kind = type(model).__name__, getattr(config, "model_type", None)
    if kind not in ARCHITECTURES or not name.endswith("ForCausalLM"):
        raise BadInput(
            f"a {name} of type {kind!r} is not written as GGUF; causal models of type "
            f"{sorted(ARCHITECTURES)} are: use format 'gptq' or 'compressed-tensors'"
        )
    rotation = config.rope_parameters.get("rope_type", "default")
    if rotation not in ROTATIONS:
        raise BadInput(
            f"rotations of type {rotation!r} are not written as GGUF; {ROTATIONS} are: use "
            "llama.cpp's convert_hf_to_gguf.py on the float model"
        )


def add_config(writer: Any, config: Any, file_type: Any) -> None:
    """Sizes, norms and rotations."""
    rotation = config.rope_parameters
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_file_type(file_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rotation["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(2)
    if rotation.get("rope_type") == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rotation["factor"]))


def rope_factors(model: nn.Module) -> Tensor | None:
    """What Llama 3 divides each rotary frequency by, (width / 2,); None in other models."""
    config: Any = model.config
    if config.rope_parameters.get("rope_type") != "llama3":
        return None
    frequencies = (getattr(module, "inv_freq", None) for module in model.modules())
    scaled = next(f for f in frequencies if isinstance(f, Tensor)).float().cpu()
    steps = torch.arange(len(scaled), dtype=torch.float32) / len(scaled)
    return config.rope_parameters["rope_theta"] ** -steps / scaled
