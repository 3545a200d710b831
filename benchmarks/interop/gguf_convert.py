"""A GGUF file out of a Llama folder with a SentencePiece tokenizer, by the gguf package alone.

    pip install gguf==0.19.0 sentencepiece
    python benchmarks/interop/gguf_convert.py FOLDER OUT.gguf [Q8_0]

Matrices whose rows are whole blocks are quantized by the package's own quantizers, others stay F32.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch


def convert(folder: Path, out: Path, kind: str = "F32") -> None:
    """Write the model and its tokenizer.model."""
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoModelForCausalLM

    words = SentencePieceProcessor(str(folder / "tokenizer.model"))
    pieces = [
        (
            words.id_to_piece(k),
            words.get_score(k),
            gguf.TokenType.UNKNOWN if words.is_unknown(k)
            else gguf.TokenType.CONTROL if words.is_control(k)
            else gguf.TokenType.BYTE if words.is_byte(k)
            else gguf.TokenType.NORMAL,
        )
        for k in range(words.vocab_size())
    ]  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = {"bos": words.bos_id(), "eos": words.eos_id(), "unk": words.unk_id()}
    write(model, out, kind, pieces, ids)


def write(
    model: Any, out: Path, kind: str, pieces: list[tuple[str, float, Any]], ids: dict[str, int]
) -> None:
    """Write a transformers Llama or Qwen3 with these words, scores and kinds of words."""
    config = model.config
    architecture = config.model_type
    writer = gguf.GGUFWriter(out, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    texts, scores, kinds = zip(*pieces, strict=True)
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(ids["bos"])
    writer.add_eos_token_id(ids["eos"])
    writer.add_unk_token_id(ids["unk"])
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers
    )
    shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and shared:
            continue
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        array = tensor.float().numpy()
        if architecture == "llama" and own.split(".")[-2] in ("attn_q", "attn_k"):
            array = interleaved(array, width)
        type_ = gguf.GGMLQuantizationType[kind]
        block = gguf.GGML_QUANT_SIZES[type_][0]
        if array.ndim < 2 or array.shape[-1] % block:
            type_ = gguf.GGMLQuantizationType.F32
        data = gguf.quantize(np.ascontiguousarray(array), type_)
        writer.add_tensor(own, data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(array: Any, width: int) -> Any:
    """Rows of every head as llama.cpp turns them: halves become neighbours."""
    halves = array.reshape(-1, 2, width // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
