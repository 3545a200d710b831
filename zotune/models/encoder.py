"""A text encoder with a linear head: mean pooling, unit length, logits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zotune.errors import BadInput, FormatError
from zotune.quant.formats.tensors import read_file, read_json

HEAD_FILE: Final = "head.safetensors"
HEAD_KEY: Final = "zotune_head"


class Pooled(nn.Module):
    """Sentence embeddings: means of hidden states over real tokens, each to unit length, float32.

    The last layer's, (batch, hidden), or with `every_layer` those of all hidden states, the token
    embeddings' first, side by side: (batch, hidden * (layers + 1)).
    """

    def __init__(self, encoder: nn.Module, every_layer: bool = False) -> None:
        super().__init__()
        self.encoder, self.every_layer = encoder, every_layer

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Embeddings of token ids and mask (batch, tokens)."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        if not self.every_layer:
            return _mean(self.encoder(**inputs)[0], attention_mask)
        states = self.encoder(**inputs, output_hidden_states=True).hidden_states
        return torch.cat([_mean(state, attention_mask) for state in states], dim=-1)


class PooledClassifier(nn.Module):
    """logits = head(e), e the `Pooled` embedding: of the last layer, or of all of them.

    Pooling and head work in float32 whatever the encoder's dtype.

    Args:
        encoder: a transformers encoder, called as encoder(input_ids=..., attention_mask=...).
        labels: the classes' names, in the order of the logits.
        head: nn.Linear(hidden, len(labels)), or nn.Linear(hidden * (layers + 1), len(labels)) to
            read every layer.

    Raises:
        BadInput: if the head does not have one output per label, or inputs of neither size.
    """

    def __init__(self, encoder: nn.Module, labels: Sequence[str], head: nn.Linear) -> None:
        super().__init__()
        if head.out_features != len(labels):
            raise BadInput(
                f"head has {head.out_features} outputs for {len(labels)} labels {list(labels)}; "
                "give one output per label"
            )
        self.embed = Pooled(encoder)
        self.labels, self.head = tuple(labels), head
        if head.in_features != self.hidden_size:
            if head.in_features != self.hidden_size * self.states:
                raise BadInput(
                    f"head has {head.in_features} inputs; want {self.hidden_size} (the last layer) "
                    f"or {self.hidden_size * self.states} (every layer)"
                )
            self.embed.every_layer = True

    @property
    def encoder(self) -> nn.Module:
        """The encoder under the head."""
        return self.embed.encoder

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def states(self) -> int:
        """Hidden states of the encoder: its layers and the token embeddings."""
        return int(self.config.num_hidden_layers) + 1

    def widen_(self) -> None:
        """Let the head read every layer; its logits stay what they are."""
        if self.embed.every_layer:
            return
        old = self.head.weight.detach()
        weight = old.new_zeros(len(old), self.hidden_size * self.states)
        weight[:, -self.hidden_size :] = old
        bias = self.head.bias
        self.head = linear_of(weight, None if bias is None else bias.detach())
        self.embed.every_layer = True

    @classmethod
    def from_texts(
        cls,
        encoder: nn.Module,
        tokenizer: Any,
        labels: Sequence[str],
        texts: Sequence[str] | None = None,
        temperature: float = 20.0,
    ) -> PooledClassifier:
        """A head that compares a text with one text per label: logit = temperature * cosine.

        Args:
            encoder: as above, on the device where the head shall be.
            tokenizer: the encoder's tokenizer.
            labels: the classes' names.
            texts: what each label means, such as "a positive review"; None takes the labels.
            temperature: 1 / the softmax temperature over cosines; 20 as in sentence-transformers'
                contrastive losses.

        Raises:
            BadInput: if the numbers of labels and texts differ.
        """
        texts = list(labels if texts is None else texts)
        if len(texts) != len(labels):
            raise BadInput(f"got {len(texts)} texts for {len(labels)} labels; give one text each")
        encoded = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        device = next(encoder.parameters()).device
        with torch.no_grad():
            inputs = {k: v.to(device) for k, v in encoded.items()}
            weight = temperature * Pooled(encoder)(**inputs)
        return cls(encoder, labels, linear_of(weight, weight.new_zeros(len(texts))))

    @property
    def config(self) -> Any:
        """The encoder's configuration."""
        return self.encoder.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Logits (batch, labels), float32, of token ids and mask (batch, tokens)."""
        logits: Tensor = self.head(self.embed(input_ids, attention_mask, **inputs))
        return logits

    @property
    def saved_model(self) -> nn.Module:
        """The encoder, which a checkpoint stores as a model of its own."""
        return self.encoder

    def save_beside(self, folder: Path) -> None:
        """Add `head.safetensors` and, in `config.json`, the labels under "zotune_head"."""
        from safetensors.torch import save_file

        tensors = {n: t.detach().cpu().contiguous() for n, t in self.head.state_dict().items()}
        save_file(tensors, folder / HEAD_FILE, metadata={"format": "pt"})
        config = read_json(folder / "config.json")
        config[HEAD_KEY] = {
            "labels": list(self.labels),
            "pooling": "mean",
            "normalize": True,
            "layers": "all" if self.embed.every_layer else "last",
        }
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")


def _mean(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean of hidden states (batch, tokens, hidden) over the mask, to unit length, float32."""
    mask = attention_mask.float().unsqueeze(1)
    mean = torch.bmm(mask, hidden.float()).squeeze(1) / mask.sum(-1).clamp(min=1.0)
    return F.normalize(mean, dim=-1)


def read_head(folder: Path) -> tuple[tuple[str, ...], nn.Linear]:
    """Labels and head that `save_beside` stored.

    Raises:
        FormatError: if they are missing or do not fit each other.
    """
    record = read_json(folder / "config.json").get(HEAD_KEY)
    labels = record.get("labels") if isinstance(record, dict) else None
    if not isinstance(labels, list):
        raise FormatError(f"{folder / 'config.json'} has no {HEAD_KEY}.labels; it is no classifier")
    tensors = read_file(folder / HEAD_FILE)
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or weight.dim() != 2 or weight.shape[0] != len(labels):
        raise FormatError(f"{folder / HEAD_FILE} holds no weight with {len(labels)} rows")
    return tuple(map(str, labels)), linear_of(weight, bias)


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """An nn.Linear that holds these tensors; nothing random is drawn on the way."""
    rows, columns = weight.shape
    head = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    head.weight = nn.Parameter(weight)
    if bias is not None:
        head.bias = nn.Parameter(bias)
    return head
