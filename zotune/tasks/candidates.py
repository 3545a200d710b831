"""Candidate answers behind a prompt, scored by a causal model as in MeZO (arXiv 2305.17333)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.tasks.batch import Batch, pad_stack
from zotune.tasks.encoding import TextEncoder
from zotune.tasks.scoring import CausalScorer, Target, answer_target, stack_targets


@dataclass(frozen=True)
class Candidates:
    """One encoded example: a scored sequence per candidate, and which one is right."""

    targets: tuple[Target, ...]
    label: int

    @property
    def single(self) -> bool:
        """All candidates are one token behind one shared prompt."""
        first = self.targets[0]
        return all(
            len(t.scored) == 1 and t.scored[0] == len(t.ids) - 1 and t.ids[:-1] == first.ids[:-1]
            for t in self.targets
        )

    @property
    def extent(self) -> tuple[int, int]:
        """(rows, tokens of the longest) in a batch."""
        longest = max(len(t.ids) for t in self.targets)
        return (1, longest - 1) if self.single else (len(self.targets), longest)


@dataclass(frozen=True)
class CandidateScorer:
    """Scores (N, K) of candidates: the sum (or mean) of their tokens' log-probabilities.

    Candidates of one token each take a fast path: one sequence per example, logits at its last
    place only. The softmax over candidates is the same on both paths.
    """

    encoder: TextEncoder
    scorer: CausalScorer
    reduce: str = "sum"
    fast: bool = True

    def __post_init__(self) -> None:
        if self.reduce not in ("sum", "mean"):
            raise BadInput(f"reduce={self.reduce!r} is not known; use 'sum' or 'mean'")

    def encode(self, prompt: str, answers: Sequence[str], join: str, label: int) -> Candidates:
        """Tokenize prompt + answer for every answer; all are cut to the same prompt."""
        pairs = self.encoder.pairs(prompt, answers, join)
        longest = max(pairs, key=lambda pair: len(pair[0]) + len(pair[1]))
        excess = len(longest[0]) + len(longest[1]) - self.encoder.limit
        if excess > 0:
            self.encoder.fit(*longest)  # counts the example once, raises if an answer is too long
            pairs = [(self._cut(head, excess), answer) for head, answer in pairs]
        return Candidates(tuple(answer_target(*pair) for pair in pairs), label)

    def _cut(self, prompt: list[int], excess: int) -> list[int]:
        keep = len(self.encoder.head)
        return prompt[:keep] + prompt[keep + excess :]

    def collate(self, features: Sequence[Candidates]) -> Batch:
        """One row per example (fast) or per candidate, padded to the most candidates."""
        size, width = len(features), max(len(f.targets) for f in features)
        label = torch.tensor([f.label for f in features])
        if self.fast and all(f.single and len(f.targets) == width for f in features):
            # the answer is input to nothing: the sequence ends at the place that predicts it
            ids, attention = pad_stack([f.targets[0].ids[:-1] for f in features], self.encoder.pad)
            tensors = {
                "input_ids": ids,
                "attention_mask": attention,
                "target_positions": attention.sum(1, keepdim=True) - 1,
                "candidate_ids": torch.tensor([[t.ids[-1] for t in f.targets] for f in features]),
                "label": label,
            }
            return Batch(tensors, size)
        rows = [f.targets[j if j < len(f.targets) else 0] for f in features for j in range(width)]
        tensors = stack_targets(rows, self.encoder.pad)
        present = [[j < len(f.targets) for j in range(width)] for f in features]
        tensors |= {"candidate_mask": torch.tensor(present), "label": label}
        return Batch(tensors, size)

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """(batch.size, K) float32; -inf for padding candidates. Known up to a row constant."""
        if "candidate_ids" in batch:
            return self.scorer.label_logits(model, batch).float()
        total = self.scorer.token_logprobs(model, batch).sum(-1)
        if self.reduce == "mean":
            total = total / batch["target_mask"].sum(-1)
        return total.view(batch.size, -1).masked_fill(~batch["candidate_mask"], float("-inf"))
