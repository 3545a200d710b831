"""Log-probabilities of chosen tokens under a causal model, without logits for whole sequences."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.tasks import prefixes
from zotune.tasks.batch import Batch, Narrow, pad_stack
from zotune.tasks.task import device_of, evaluating

log = logging.getLogger("zotune")
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-8, torch.float16: 2e-2, torch.bfloat16: 6e-2}
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

    @property
    def extent(self) -> tuple[int, int]:
        """(rows, tokens of the longest) in a batch."""
        return 1, len(self.ids)


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
    because some models scale or cap their logits behind the output layer. `cached`: tokens that
    rows share may run by themselves (`prefixes`), decided likewise.
    """

    split: bool
    cached: bool = False

    @staticmethod
    def probe(model: nn.Module) -> CausalScorer:
        """Compare head(body(x)) with model(x), and shared prefixes with whole rows, on a few
        tokens."""
        parts = _parts(model)
        if parts is None:
            return CausalScorer(split=False)
        batch = _trial(device_of(model))
        with evaluating(model):
            whole = CausalScorer(split=False).logits(model, batch)
            split = _close(CausalScorer(split=True).logits(model, batch), whole, 1e-5)
            cached = prefixes.takes_keys(parts[0]) and _same_cached(model, batch, split, whole)
        return CausalScorer(split, cached)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits at the batch's target_positions, (rows, T, vocabulary), in the model's dtype."""
        states, head, positions = self._states(model, batch)
        return head(_gather(states, positions))

    def label_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits (rows, K) of each row's `candidate_ids` at its one target position: only these
        rows of the output layer are multiplied, where the layer is a plain product."""
        states, head, positions = self._states(model, batch)
        state, ids = _gather(states, positions), batch["candidate_ids"]
        if not _plain(head):
            return head(state).squeeze(1).gather(-1, ids)
        out = (head.weight[ids] @ state.mT).squeeze(-1)
        return out if head.bias is None else out + head.bias[ids]

    def token_logprobs(self, model: nn.Module, batch: Batch) -> Tensor:
        """log p of every target token, (rows, T) float32, 0 where target_mask is 0."""
        states, head, positions = self._states(model, batch)
        wanted = batch["target_ids"]
        width = _piece(positions.shape[0], model)
        parts = [
            _logprob(head(_gather(states, positions[:, i : i + width])), wanted[:, i : i + width])
            for i in range(0, positions.shape[1], width)
        ]
        return torch.cat(parts, dim=1) * batch["target_mask"]

    def _states(
        self, model: nn.Module, batch: Batch, forward: int | None = None
    ) -> tuple[Tensor, Any, Tensor]:
        """(states (rows, L, n), what makes logits of them, where each row's wanted ones are)."""
        parts = _parts(model)
        ids, mask, positions = (
            batch[name] for name in ("input_ids", "attention_mask", "target_positions")
        )
        body, head = parts if self.split and parts is not None else (model, nn.Identity())
        if self.cached and parts is not None and not prefixes.windowed(model, ids.shape[1]):
            wanted = batch.tensors.get("target_mask")
            found = prefixes.plan(batch, positions, wanted, forward)
            if found.shares:
                out, starts = prefixes.states(parts[0], body, batch, found)
                return _first(out), head, (positions - starts).clamp_min(0)
        kept, positions = _kept(body, positions)
        out = body(input_ids=ids, attention_mask=mask, use_cache=False, **kept)
        return _first(out), head, positions


def _kept(body: nn.Module, positions: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Lets a model with its own output layer make logits at the wanted places alone; and where
    these are then."""
    if "logits_to_keep" not in inspect.signature(body.forward).parameters:
        return {}, positions
    places, index = torch.unique(positions, return_inverse=True)
    return {"logits_to_keep": places}, index


def _first(out: Any) -> Tensor:
    """Logits, or the hidden states of a body without them."""
    return out.logits if hasattr(out, "logits") else out[0]


def _trial(device: torch.device) -> Batch:
    """Two examples of two rows, all of which begin with two tokens and then differ by example."""
    rows = [[1, 2, 3, 1, 2], [1, 2, 3, 1, 1], [1, 2, 1, 3], [1, 2, 1, 1]]
    targets = [Target(row, [len(row) - 1]) for row in rows]
    return Batch(stack_targets(targets, 0), 2, narrow=Narrow(lambda _: nullcontext())).to(device)


def _same_cached(model: nn.Module, batch: Batch, split: bool, whole: Tensor) -> bool:
    try:
        states, head, positions = CausalScorer(split, cached=True)._states(model, batch, -100)
        return _close(head(_gather(states, positions)), whole, _ROUNDING[whole.dtype])
    except Exception as error:  # whatever stumbles over keys that it has not made itself
        log.debug("this model does not share prefixes", exc_info=error)
        return False


def _close(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    same = found.shape == wanted.shape
    scale = max(1.0, float(wanted.abs().max()))
    return same and bool((found.float() - wanted.float()).abs().max() <= tolerance * scale)


def _plain(head: Any) -> bool:
    """Whether a layer is nothing but its weight: not probed, not wrapped, without an adapter."""
    hooks = head._forward_hooks or head._forward_pre_hooks
    changed = vars(head).get("forward")
    same = changed is None or getattr(changed, "own", None) == head.__class__.forward.__get__(head)
    return type(head) is nn.Linear and not hooks and same


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
