"""Log-probabilities of chosen tokens under a causal model, without logits for whole sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.tasks.batch import Batch, pad_stack
from zotune.tasks.task import device_of, evaluating

MAX_LOGITS = 1 << 25
"""Logits held at once, in numbers (128 MiB of float32); more are made in pieces along time."""


@dataclass(frozen=True)
class Target:
    """One token sequence and the span of it that is scored: ids[start:] where mask is True."""

    ids: list[int]
    scored: list[int]
    """Indices into `ids` (each >= 1) of the tokens whose log-probability is wanted."""

    def __post_init__(self) -> None:
        if not self.scored:
            raise BadInput("a sequence without any scored token has no loss")
        if min(self.scored) < 1:
            raise BadInput("the first token has nothing before it and cannot be scored; use bos")


def answer_target(prompt: list[int], answer: list[int]) -> Target:
    """The answer's tokens, scored behind the prompt (from the second on when it is empty)."""
    first = max(len(prompt), 1)
    return Target(prompt + answer, list(range(first, len(prompt) + len(answer))))


def stack_targets(targets: Sequence[Target], pad: int) -> dict[str, Tensor]:
    """Right-padded tensors: input_ids, attention_mask (rows, L); target_* (rows, T).

    `target_positions` are the places whose logits predict the scored tokens (index - 1).
    """
    ids, attention = pad_stack([t.ids for t in targets], pad)
    positions, mask = pad_stack([[i - 1 for i in t.scored] for t in targets], 0)
    wanted, _ = pad_stack([[t.ids[i] for i in t.scored] for t in targets], 0)
    return {
        "input_ids": ids,
        "attention_mask": attention,
        "target_positions": positions,
        "target_ids": wanted,
        "target_mask": mask,
    }


@dataclass(frozen=True)
class CausalScorer:
    """How to get logits at given positions from one kind of causal model.

    Where `split` is true the hidden states are gathered before the output layer, so that logits
    exist only at the wanted positions; it is decided once by `probe`, which compares numbers,
    because some models scale or cap their logits behind the output layer.
    """

    split: bool

    @staticmethod
    def probe(model: nn.Module) -> CausalScorer:
        """Compare head(body(x)) with model(x) on four tokens."""
        if _parts(model) is None:
            return CausalScorer(split=False)
        ids = torch.tensor([[1, 2, 3, 1]], device=device_of(model))
        mask = torch.ones_like(ids)
        with evaluating(model):
            whole, _ = CausalScorer(split=False)._states(model, ids, mask)
            hidden, head = CausalScorer(split=True)._states(model, ids, mask)
            parts = head(hidden)
        same = whole.shape == parts.shape and torch.allclose(
            whole.float(), parts.float(), rtol=1e-5, atol=1e-5
        )
        return CausalScorer(split=bool(same))

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits at the batch's target_positions, (rows, T, vocabulary), in the model's dtype."""
        states, head = self._states(model, batch["input_ids"], batch["attention_mask"])
        return head(_gather(states, batch["target_positions"]))

    def token_logprobs(self, model: nn.Module, batch: Batch) -> Tensor:
        """log p of every target token, (rows, T) float32, 0 where target_mask is 0."""
        states, head = self._states(model, batch["input_ids"], batch["attention_mask"])
        positions, wanted = batch["target_positions"], batch["target_ids"]
        width = _piece(positions.shape[0], model)
        parts = [
            _logprob(head(_gather(states, positions[:, i : i + width])), wanted[:, i : i + width])
            for i in range(0, positions.shape[1], width)
        ]
        return torch.cat(parts, dim=1) * batch["target_mask"]

    def _states(
        self, model: nn.Module, ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """(states (rows, L, n), the function from states to logits)."""
        parts = _parts(model) if self.split else None
        if parts is None:
            out = model(input_ids=ids, attention_mask=mask, use_cache=False)
            return out.logits, lambda states: states
        body, head = parts
        return body(input_ids=ids, attention_mask=mask, use_cache=False)[0], head


def _parts(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """(body, output layer) of a causal model; None where it does not tell them."""
    head_of = getattr(model, "get_output_embeddings", None)
    body = getattr(model, "base_model", None)
    head = head_of() if callable(head_of) else None
    if head is None or not isinstance(body, nn.Module) or body is model:
        return None
    return body, head


def _gather(values: Tensor, positions: Tensor) -> Tensor:
    """values (rows, L, n) at positions (rows, T) -> (rows, T, n)."""
    return values.gather(1, positions.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def _logprob(logits: Tensor, wanted: Tensor) -> Tensor:
    """log softmax(logits)[wanted] in float32."""
    logits = logits.float()
    picked = logits.gather(-1, wanted.unsqueeze(-1)).squeeze(-1)
    return picked - logits.logsumexp(-1)


def _piece(rows: int, model: nn.Module) -> int:
    """Positions per piece so that one piece's logits stay below MAX_LOGITS numbers."""
    vocabulary = int(getattr(getattr(model, "config", None), "vocab_size", 0) or 32768)
    return max(1, MAX_LOGITS // (rows * vocabulary))
