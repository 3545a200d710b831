"""The repository's root on the path, where the package `benchmarks` lies, and a tiny model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a BERT of 64 units with a tokenizer, wide enough for every scheme in use."""
    import torch
    from tasks.tiny import fill_, make_tokenizer
    from transformers import BertConfig, BertModel

    tokenizer = make_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=128, max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = BertModel(config)
    folder = tmp_path_factory.mktemp("encoder")
    fill_(model, 0.1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
