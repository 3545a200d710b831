"""Small models, batches and objectives that the tests of several folders share.

Weights come from a generator of their own, so that no test touches the global one.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.core import spaces
from zotune.core.block import Block, CodeBlock, FloatBlock
from zotune.core.noise import Key
from zotune.core.perturbation import Perturbation
from zotune.core.space import Space, SpaceSpec
from zotune.quant import quantize_model_
from zotune.quant.calibrate.folding import Fold
from zotune.quant.qat import attach_, fake_quantize_
from zotune.tasks.batch import Batch

VOCABULARY, HIDDEN, LENGTH, LABELS = 29, 16, 6, 3


def fill_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter from a generator of its own: gains near 1, the rest of std 0.2."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = "norm" in name.lower() and name.endswith("weight")
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise + (1.0 if gain else 0.0))
    return model.eval().requires_grad_(False)


def _built(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng():
        return fill_(make(), seed)


def bert(seed: int = 0, labels: int = LABELS) -> nn.Module:
    """A classifier with LayerNorms, biases, and position embeddings called on a (1, T) input."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=labels,
    )  # fmt: skip
    return _built(lambda: BertForSequenceClassification(config), seed)


def llama(seed: int = 0, tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        tie_word_embeddings=tied, use_cache=False,
    )  # fmt: skip
    return _built(lambda: LlamaForCausalLM(config), seed)


def gpt2(seed: int = 0) -> nn.Module:
    """Conv1D layers, learned positions called on (1, T), a head tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=2, n_head=2, n_positions=32, use_cache=False
    )
    return _built(lambda: GPT2LMHeadModel(config), seed)


class Small(nn.Module):
    """Embedding, LayerNorm, two linear layers, a head: the cheapest model with every block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, LABELS)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        out: Tensor = self.head(x.mean(1))
        return out


class Body(nn.Module):
    """x + down(tanh(up(norm(x)))), as a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return out


class Layered(nn.Module):
    """`Small` with a row of layers."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Body() for _ in range(layers))
        self.head = nn.Linear(HIDDEN, LABELS)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(x.mean(1))
        return out


def layered(seed: int = 0, layers: int = 4) -> nn.Module:
    return fill_(Layered(layers), seed)


def small(seed: int = 0, scheme: str | None = None) -> Small:
    model = fill_(Small(), seed)
    assert isinstance(model, Small)
    if scheme is not None:
        quantize_model_(model, scheme, exclude=("head",))
    return model


def faked(seed: int = 0, scheme: str = "int4-g8-a8") -> Small:
    """The same with fake-quantized layers, one of which shares a transform with the norm."""
    model = small(seed)
    fake_quantize_(model, scheme, exclude=("head",))
    attach_(model, [Fold("norm", ("up",), (0, HIDDEN), shifts=True)])
    return model


def batch(size: int = 5, seed: int = 0, length: int = LENGTH) -> Batch:
    generator = torch.Generator().manual_seed(1000 + seed)
    ids = torch.randint(1, VOCABULARY, (size, length), generator=generator)
    return Batch({"input_ids": ids, "label": ids.sum(1) % LABELS}, size)


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    out = model(input_ids=ids)
    out = out if isinstance(out, Tensor) else out.logits
    return out if out.dim() == 2 else out[:, -1, :LABELS]


def cross_entropy(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss per example, in float32 whatever the model's dtype; every example weighs the same."""
    logits = logits_of(model, batch["input_ids"]).float()
    loss = F.cross_entropy(logits, batch["label"], reduction="none")
    return loss, torch.ones_like(loss)


def observe(
    model: nn.Module, after: Callable[[Any], None] | None = None, examples: int | None = None
) -> None:
    for seed in range(3):
        seen = batch(8, seed)
        logits_of(model, seen["input_ids"])
        if after is not None:
            after(seen)


@dataclass(frozen=True)
class Case:
    """A space by its short name over a model that has such blocks; `fake` ones round only while
    they run."""

    space: str
    scheme: str | None = None
    fake: bool = False

    def model(self, seed: int = 0) -> Small:
        return faked(seed, str(self.scheme)) if self.fake else small(seed, self.scheme)

    def build(self, model: nn.Module, **options: Any) -> Space:
        spec = spaces.parse(self.space)
        assert isinstance(spec, SpaceSpec)
        return spec.build(model, observe)

    def __str__(self) -> str:
        return self.space if self.scheme is None else f"{self.space}@{self.scheme}"


CASES = [
    Case("weights"),
    Case("norms"),
    Case("biases"),
    Case("head"),
    Case("head(basis='classes')"),
    Case("head(basis='white')"),
    Case("lora(targets='up|down')"),
    Case("adapter(rank=2)"),
    Case("scales", "int4-g8"),
    Case("scales", "int8-channel-a8"),
    Case("zeros", "int4-g8-asym-a6asym"),
    Case("codes", "int4-g8"),
    Case("codes", "int3-channel"),
    Case("codes", "int8-channel-a8"),
    Case("adapter(rank=2) + head(lr=0.1) + scales", "int4-g8"),
    Case("latents", "int3-g8-asym", fake=True),
    Case("clipping", "int3-channel", fake=True),
    Case("clipping + transforms + latents + activations", "int4-g8-a4asym", fake=True),
]


def perturbations() -> list[Perturbation]:
    """One of every concrete law of directions of the core; those of images, and methods' own, have
    their own tests."""

    def kinds(kind: type[Perturbation]) -> Iterator[type[Perturbation]]:
        for child in kind.__subclasses__():
            yield from kinds(child)
            private = inspect.isabstract(child) or child.__name__.startswith("_")
            own = child.__module__.startswith("zotune.core")
            if own and not private and not child.__module__.endswith("image_laws"):
                yield child

    return [kind() for kind in kinds(Perturbation)]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def digest(model: nn.Module) -> dict[str, str]:
    """A hash of the bytes of every parameter and buffer."""
    return {
        name: hashlib.sha256(
            t.detach().contiguous().view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, t in tensors_of(model).items()
        if t.dim()
    }


def point(block: Block) -> Tensor:
    """Where a block stands, in its own coordinates, as float64."""
    if isinstance(block, CodeBlock):
        return block.value().double()
    assert isinstance(block, FloatBlock)
    return block.master.double().clone()


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))


def float_block(name: str, *shape: int, fill: float = 0.0, **options: Any) -> FloatBlock:
    return FloatBlock.of(name, torch.full(shape, fill), **options)


def keys(count: int, seed: int = 0) -> list[Key]:
    return [Key(seed, step=t) for t in range(count)]
