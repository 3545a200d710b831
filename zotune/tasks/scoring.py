"""Log-probabilities of chosen tokens under a causal model, without logits for whole sequences."""

from __future__ import annotations

from collections.abc import Sequence
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
            whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
            parts = CausalScorer(split=True)._logits(model, ids, mask, None).float()
        same = whole.shape == parts.shape and torch.allclose(whole, parts, rtol=1e-5, atol=1e-5)
        return CausalScorer(split=bool(same))

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits at the batch's target_positions, (rows, T, vocabulary), in the model's dtype."""
        return self._logits(
            model, batch["input_ids"], batch["attention_mask"], batch["target_positions"]
        )

    def _logits(
        self, model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor | None
    ) -> Tensor:
        parts = _parts(model) if self.split else None
        if parts is None:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            return logits if positions is None else _gather(logits, positions)
        body, head = parts
        hidden = body(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        return head(hidden if positions is None else _gather(hidden, positions))

    def token_logprobs(self, model: nn.Module, batch: Batch) -> Tensor:
        """log p of every target token, (rows, T) float32, 0 where target_mask is 0."""
        positions, wanted = batch["target_positions"], batch["target_ids"]
        parts = _parts(model) if self.split else None
        if parts is None:
            logprobs = _logprob(self.logits(model, batch), wanted)
        else:
            body, head = parts
            hidden = body(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
            )[0]
            picked = _gather(hidden, positions)
            pieces = _pieces(positions, model)
            logprobs = torch.cat(
                [
                    _logprob(head(part), want)
                    for part, want in zip(
                        torch.split(picked, pieces, 1),
                        torch.split(wanted, pieces, 1),
                        strict=True,
                    )
                ],
                dim=1,
            )
        return logprobs * batch["target_mask"]


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


def _pieces(positions: Tensor, model: nn.Module) -> int:
    """Positions per piece so that one piece's logits stay below MAX_LOGITS numbers."""
    vocabulary = int(getattr(getattr(model, "config", None), "vocab_size", 0) or 32768)
    return max(1, MAX_LOGITS // (positions.shape[0] * vocabulary))
