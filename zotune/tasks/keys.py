"""Keys and values of tokens that rows share, as transformers' models take them.

Imported when a prefix is first shared, because transformers is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from zotune.errors import BadInput


class Behind(DynamicLayer):  # type: ignore[misc,no-untyped-call]
    """One layer's keys and values for rows that begin with what fewer rows have computed.

    The rows of a forward are copies x units x k, those of the forward before it copies x units.
    Below the first tuned layer either of them may have run for one copy alone.
    """

    def __init__(self, before: Any, rows_before: int, rows: int, copies: int, keep: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype, self.device = before.dtype, before.device
        self.keys, self.values, self.is_initialized = before.keys, before.values, True
        self.rows_before, self.rows, self.copies, self.keep = rows_before, rows, copies, keep

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Those of the shared tokens in front; kept only where another forward will ask."""
        assert self.keys is not None
        assert self.values is not None
        keys = torch.cat([self._each(self.keys, len(key_states)), key_states], dim=-2)
        values = torch.cat([self._each(self.values, len(value_states)), value_states], dim=-2)
        if self.keep:
            self.keys, self.values = keys, values
        return keys, values

    def _each(self, held: Tensor, rows: int) -> Tensor:
        """What is held, for each of these rows."""
        whole, alone = self.rows, self.rows // self.copies
        if rows not in (whole, alone):
            raise BadInput(
                f"a layer sees {rows} rows of {whole}; its model cannot share a prefix of them"
            )
        if rows == alone:
            held = held[: self.rows_before // self.copies]
        elif len(held) < self.rows_before:
            held = torch.cat([held] * self.copies)
        return held.repeat_interleave(rows // len(held), 0)


def first() -> Cache:
    """Holds what the first forward computes."""
    return Cache(layer_class_to_replicate=DynamicLayer)


def behind(before: Cache, rows_before: int, rows: int, copies: int, keep: bool) -> Cache:
    """For a forward of `rows` rows behind one of `rows_before`."""
    return Cache([Behind(layer, rows_before, rows, copies, keep) for layer in before.layers])
