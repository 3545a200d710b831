"""Greedy decoding for left-padded prompts with the model's key-value cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def greedy(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor,
    max_new_tokens: int,
    stop: Sequence[int],
    pad: int,
) -> list[list[int]]:
    """The most likely continuation of every row, one token at a time, no gradients.

    A row ends at the first token of `stop` (not returned); all rows step together, so rows of a
    stacked batch stay aligned with their probes.

    Args:
        ids: (rows, L) prompts padded on the left.
        mask: (rows, L), 0 for padding.
        max_new_tokens: most tokens generated per row.
        stop: token ids that end a row.
        pad: id fed to rows that have ended.

    Returns:
        The generated token ids of each row.
    """
    rows = ids.shape[0]
    ends = torch.tensor(list(stop), dtype=torch.long, device=ids.device)
    done = torch.zeros(rows, dtype=torch.bool, device=ids.device)
    made: list[Tensor] = []
    past, current = None, ids
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    known = inspect.signature(model.forward).parameters
    with torch.no_grad():
        for _ in range(max_new_tokens):
            extra = {"position_ids": positions, "logits_to_keep": 1}
            out = model(
                input_ids=current,
                attention_mask=mask,
                past_key_values=past,
                use_cache=True,
                **{name: value for name, value in extra.items() if name in known},
            )
            past = out.past_key_values
            chosen = out.logits[:, -1].float().argmax(-1)
            done = done | torch.isin(chosen, ends)
            made.append(torch.where(done, torch.full_like(chosen, -1), chosen))
            if bool(done.all()):
                break
            current = torch.where(done, torch.full_like(chosen, pad), chosen).unsqueeze(1)
            mask = torch.cat([mask, torch.ones_like(current)], dim=1)
            positions = positions[:, -1:] + 1
    columns = torch.stack(made, dim=1).tolist()
    return [[token for token in row if token >= 0] for row in columns]
