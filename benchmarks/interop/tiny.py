"""A tiny Llama with a tokenizer of characters, from which the golden checkpoints are made."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "quant" / "golden"
PROMPT = "Once upon a time there was a tiny model."
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def make(folder: Path, dtype: torch.dtype = torch.float16, **options: Any) -> Any:
    """Save the model (seed 0) and its tokenizer, and give the model back."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**SIZES, "tie_word_embeddings": True, "eos_token_id": 95, **options})
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model = model.to(dtype).eval()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def tokenizer() -> Any:
    """One token for each printable ASCII character; 95 ends a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {chr(32 + k): k for k in range(95)} | {"<eos>": 95}
    found = Tokenizer(models.WordLevel(words, unk_token="?"))
    found.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=found, eos_token="<eos>", unk_token="?", pad_token="<eos>"
    )


def keep(folder: Path, name: str, model: Any, *packages: str) -> None:
    """Copy a checkpoint to the golden folder, and put what its own library computes beside it.

    `name`.expected holds the prompt's ids and logits, and as metadata the versions of the packages.
    """
    from importlib.metadata import version

    from safetensors.torch import save_file

    shutil.rmtree(GOLDEN / name, ignore_errors=True)
    shutil.copytree(folder, GOLDEN / name)
    with torch.no_grad():
        logits = model(tokens()).logits.float().contiguous()
    versions = {p: version(p) for p in ("torch", "transformers", *packages)}
    stored = {"logits": logits, "tokens": tokens()}
    save_file(stored, GOLDEN / f"{name}.expected", metadata=versions)


def tokens() -> torch.Tensor:
    """The prompt as ids (1, characters)."""
    return torch.tensor([[ord(c) - 32 for c in PROMPT]])
