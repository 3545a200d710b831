"""Tokens that rows of a batch begin with are computed once: of all rows once per copy of the
batch, of an example's candidates once per example.

    common prompt (copies rows) ─► own prompt (copies x examples) ─► the rest (all rows)

Each forward reads the keys and values of the one before it. A causal model computes the same
either way, up to rounding; it is done where it saves tokens, those of padding included.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zotune.tasks.batch import Batch

FORWARD = 256
"""Tokens of all probes that one more forward has to save: it reads all weights again."""
_WINDOWS = ("sliding_window", "window_size", "attention_chunk_size")


@dataclass(frozen=True)
class Plan:
    """common: tokens that every row begins with and that run by themselves. own: how many tokens
    of each example's rows do (copies x examples,), those in common included; None for no more."""

    common: int
    own: Tensor | None

    @property
    def shares(self) -> bool:
        """Whether anything runs by itself."""
        return self.common > 0 or self.own is not None

    @property
    def starts(self) -> Tensor | int:
        """Where the rest of the rows of each example begins."""
        return self.common if self.own is None else self.own


def plan(
    batch: Batch, positions: Tensor, wanted: Tensor | None, forward: int | None = None
) -> Plan:
    """The cheapest way to the states at `positions` (rows, T), where `wanted` is not 0."""
    forward = FORWARD if forward is None else forward
    narrow, ids, mask = batch.narrow, batch["input_ids"], batch["attention_mask"].bool()
    if narrow is None or not bool(mask[:, 0].all()):  # padded on the left
        return Plan(0, None)
    rows, length = ids.shape
    last = positions if wanted is None else positions.masked_fill(wanted == 0, length)
    own = _shared(ids.view(batch.size, -1, length), mask, last.view(batch.size, -1))
    common = 0
    if narrow.least <= 1:
        common = int(_shared(ids[None], mask, last.view(1, -1)))
    sizes = mask.sum(1).view(batch.size, -1)

    def cost(found: Plan) -> int:
        starts = found.own if found.own is not None else torch.full_like(own, found.common)
        total = rows * int((sizes - starts.unsqueeze(1)).amax())
        if found.own is not None:
            total += batch.size * (int(found.own.amax()) - found.common) + forward
        return total + (batch.copies * found.common + forward if found.common else 0)

    plans = [Plan(0, None), Plan(common, None)]
    for front in {0, common}:
        if rows > batch.size and int(own.amin()) >= max(1, front) and int(own.amax()) > front:
            plans.append(Plan(front, own))
    return min(plans, key=cost)


def _shared(ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """Of groups of rows (groups, k, length): how many tokens all of a group begin with, none of
    which is at or behind one of the group's positions."""
    same = (ids == ids[:, :1]) & mask.view(ids.shape)
    return torch.minimum(same.all(1).long().cumprod(1).sum(1), positions.amin(1))


def states(body: nn.Module, last: nn.Module, batch: Batch, found: Plan) -> tuple[Any, Tensor | int]:
    """(the output of `last` for the rest of each row, where each row's rest begins).

    body: the model without its output layer, for what only keys and values are wanted of.
    """
    from zotune.tasks import keys

    ids, mask, narrow = batch["input_ids"], batch["attention_mask"], batch.narrow
    assert narrow is not None
    rows, copies, cache, before = len(ids), batch.copies, keys.first(), batch.copies
    front = mask.new_ones(rows, found.common)
    if found.common:
        with narrow.held(1):
            _run(body, ids[:: rows // copies, : found.common], front[:copies], 0, cache)
    if found.own is not None:
        each, longest = batch.width("input_ids"), int(found.own.amax())
        places = torch.arange(found.common, longest, device=ids.device)
        own = (places < found.own.unsqueeze(1)).to(mask.dtype)
        if found.common:
            cache = keys.behind(cache, before, batch.size, copies, keep=True)
        seen = torch.cat([front[: batch.size], own], 1)
        with narrow.held(batch.size // copies):
            _run(body, ids[::each, found.common : longest], seen, found.common, cache)
        before, front = batch.size, seen.repeat_interleave(each, 0)
    starts = found.starts
    if isinstance(starts, Tensor):
        starts = starts.repeat_interleave(batch.width("input_ids")).unsqueeze(1)
    rest, known = _behind(ids, mask, starts)
    cache = keys.behind(cache, before, rows, copies, keep=False)
    return _run(last, rest, torch.cat([front, known], 1), starts, cache), starts


def _behind(ids: Tensor, mask: Tensor, starts: Tensor | int) -> tuple[Tensor, Tensor]:
    """Each row from its start on, with its mask."""
    length = ids.shape[1]
    longest = int((mask.sum(1, keepdim=True) - starts).amax())
    places = torch.arange(longest, device=ids.device).expand(len(ids), -1) + starts
    inside = places.clamp_max(length - 1)
    return ids.gather(1, inside), mask.gather(1, inside) * (places < length)


def _run(module: nn.Module, ids: Tensor, mask: Tensor, start: Tensor | int, cache: Any) -> Any:
    # One row of positions per row of tokens: a layer that looks them up may be tuned.
    positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape) + start
    return module(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
        use_cache=True,
    )  # fmt: skip


def takes_keys(module: nn.Module) -> bool:
    """Whether the forward of a causal model takes positions and keys of earlier tokens."""
    known = inspect.signature(module.forward).parameters
    return {"past_key_values", "position_ids", "attention_mask", "use_cache"} <= set(known)


def windowed(model: nn.Module, length: int) -> bool:
    """Whether so many tokens do not all see each other, so that places in a row count."""
    config = getattr(model, "config", None)
    windows = [getattr(config, name, None) for name in _WINDOWS]
    return any(isinstance(w, int) and length > w for w in windows)
