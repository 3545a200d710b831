"""A tiny tokenizer and tiny random models, made here: no network, no files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zotune.models import Loaded
from zotune.tasks import Task

CORPUS = [
    "the film was great fun and I liked it",
    "the film was terrible and dull and I left",
    "It was great It was terrible It was okay It was good It was bad",
    "user assistant system question answer Label: label",
    "Yes No Maybe premise hypothesis because so then",
    "a man eats an apple in Paris and a woman reads a book in Rome",
] * 4
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(eos: str = "</s>") -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token=eos, pad_token="<pad>"
    )


def fill_(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """Deterministic values without touching the global generator."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(
                1 + noise / 3 if "norm" in name.lower() and parameter.dim() == 1 else noise
            )
    return model.eval()


def loaded(model: nn.Module, tokenizer: Any, kind: str) -> Loaded:
    return Loaded(model, tokenizer, kind, Path("tiny"), model.config, "float")


def llama(tokenizer: Any, **options: Any) -> Loaded:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
    } | options
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=2,
        num_key_value_heads=1,
        **({"max_position_embeddings": 96} | sizes),
    )
    return loaded(fill_(LlamaForCausalLM(config)), tokenizer, "causal")


def gpt2(tokenizer: Any) -> Loaded:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=96)
    return loaded(fill_(GPT2LMHeadModel(config)), tokenizer, "causal")


def bert(tokenizer: Any, kind: str = "encoder", **options: Any) -> Loaded:
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        **options,
    )
    model = BertModel(config) if kind == "encoder" else BertForSequenceClassification(config)
    return loaded(fill_(model), tokenizer, kind)


def check_stacking(task: Task, model: nn.Module, examples: Sequence[Any]) -> None:
    """Losses of a stacked batch, of the batch, and of single examples agree to 1e-5."""
    batch = task.batch(examples)
    with torch.inference_mode():
        loss, weight = task.losses(model, batch)
        stacked, stacked_weight = task.losses(model, batch.repeat(3))
        single = [task.losses(model, task.batch([e])) for e in examples]
        part = task.losses(model, batch.select(1, len(examples)))[0]
    assert loss.dtype == weight.dtype == torch.float32
    assert loss.shape == weight.shape == (len(examples),)
    torch.testing.assert_close(stacked, loss.repeat(3), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stacked_weight, weight.repeat(3))
    torch.testing.assert_close(torch.cat([s[0] for s in single]), loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([s[1] for s in single]), weight)
    torch.testing.assert_close(part, loss[1:], rtol=1e-5, atol=1e-5)


def check_gradient(task: Task, model: nn.Module, examples: Sequence[Any]) -> None:
    """The same losses are differentiable."""
    loss, weight = task.losses(model, task.batch(examples))
    ((loss * weight).sum() / weight.sum()).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert all(torch.isfinite(g).all() for g in grads)
    assert any(g.abs().max() > 0 for g in grads)
