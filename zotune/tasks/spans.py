"""Losses over scored spans of token sequences; what language modelling, SFT and QA share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zotune.tasks.batch import Batch
from zotune.tasks.scoring import CausalScorer, Target, stack_targets
from zotune.tasks.task import chunks, device_of, evaluating


def collate_targets(targets: Sequence[Target], pad: int) -> Batch:
    """Right-padded batch, one row per sequence."""
    return Batch(stack_targets(targets, pad), len(targets))


def span_losses(scorer: CausalScorer, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """(mean nll of a sequence's scored tokens, their count), both (batch.size,) float32.

    sum(w * l) / sum(w) is then the mean nll over all tokens, however a batch is cut.
    """
    weight = batch["target_mask"].sum(-1).float()
    return -scorer.token_logprobs(model, batch).sum(-1) / weight, weight


def evaluate_spans(
    scorer: CausalScorer,
    model: nn.Module,
    targets: Sequence[Target],
    batch_size: int,
    pad: int,
) -> dict[str, float]:
    """loss = sum nll / sum tokens, perplexity = exp(loss), tokens."""
    nll, tokens = 0.0, 0.0
    device = device_of(model)
    with evaluating(model):
        for part in chunks([len(t.ids) for t in targets], batch_size):
            batch = collate_targets([targets[i] for i in part], pad).to(device)
            loss, weight = span_losses(scorer, model, batch)
            nll += float((loss.double() * weight.double()).sum())
            tokens += float(weight.sum())
    loss_mean = nll / tokens
    perplexity = math.exp(loss_mean) if loss_mean < 700 else math.inf
    return {"loss": loss_mean, "perplexity": perplexity, "tokens": tokens}


def bytes_rows(texts: Sequence[str]) -> Tensor:
    """Texts as a (rows, bytes) uint8 tensor, padded with 0, so that they travel with a batch.

    >>> rows_texts(bytes_rows(["été", "a"]))
    ['été', 'a']
    """
    encoded = [text.encode() for text in texts]
    padded = torch.zeros((len(encoded), max(1, *map(len, encoded))), dtype=torch.uint8)
    for row, content in zip(padded, encoded, strict=True):
        row[: len(content)] = torch.tensor(list(content), dtype=torch.uint8)
    return padded


def rows_texts(rows: Tensor) -> list[str]:
    """The inverse of `bytes_rows`."""
    return [bytes(row).rstrip(b"\0").decode() for row in rows.cpu().tolist()]
