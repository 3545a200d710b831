from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zotune.errors import BadInput
from zotune.tasks import Batch, pad_stack


def make(size: int, width: int) -> Batch:
    rows = torch.arange(size * width)
    return Batch({"ids": rows.view(-1, 1), "label": torch.arange(size)}, size)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
def test_row_of_a_stacked_batch_is_copy_example_candidate(size: int, width: int, p: int) -> None:
    batch = make(size, width).repeat(p)
    ids = batch["ids"].view(p, size, width)
    assert batch.size == p * size
    assert batch.copies == p
    for copy in range(p):
        assert torch.equal(ids[copy].flatten(), torch.arange(size * width))


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_repeat_is_undone_by_select(size: int, width: int, p: int) -> None:
    batch = make(size, width)
    stacked = batch.repeat(p)
    for copy in range(p):
        cut = stacked.select(copy * size, (copy + 1) * size)
        assert cut.copies == 1
        assert all(torch.equal(cut[name], batch[name]) for name in batch.tensors)


def test_select_is_a_view_and_keeps_whole_copies() -> None:
    stacked = make(2, 3).repeat(4)
    cut = stacked.select(2, 6)
    assert cut.copies == 2
    assert cut.size == 4
    assert cut["ids"].data_ptr() == stacked["ids"][6:].data_ptr()
    assert stacked.select(1, 4).copies == 1


@pytest.mark.parametrize(("lo", "hi"), [(0, 0), (-1, 1), (1, 3), (2, 1)])
def test_select_outside_is_refused(lo: int, hi: int) -> None:
    with pytest.raises(BadInput, match="not inside a batch of 2"):
        make(2, 1).select(lo, hi)


def test_bad_batches_are_refused() -> None:
    with pytest.raises(BadInput, match="at least one example"):
        Batch({}, 0)
    with pytest.raises(BadInput, match="no whole number of rows"):
        Batch({"ids": torch.zeros(3, 1)}, 2)
    with pytest.raises(BadInput, match="cannot repeat"):
        make(1, 1).repeat(0)


@given(
    st.lists(st.lists(st.integers(1, 9), max_size=5), min_size=1, max_size=4),
    st.sampled_from(["left", "right"]),
)
def test_pad_stack_keeps_every_token_on_its_side(rows: list[list[int]], side: str) -> None:
    ids, mask = pad_stack(rows, 0, side)
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    for i, row in enumerate(rows):
        assert ids[i][mask[i].bool()].tolist() == row
        assert mask[i].tolist() == sorted(mask[i].tolist(), reverse=side == "right")


def test_pad_stack_errors() -> None:
    with pytest.raises(BadInput, match="empty list"):
        pad_stack([], 0)
    with pytest.raises(BadInput, match="padding side"):
        pad_stack([[1]], 0, "top")
    with pytest.raises(BadInput, match="3 tokens does not fit length=2"):
        pad_stack([[1, 2, 3]], 0, length=2)


def test_to_moves_every_tensor() -> None:
    moved = make(2, 2).repeat(2).to("meta")
    assert moved.copies == 2
    assert {t.device.type for t in moved.tensors.values()} == {"meta"}
