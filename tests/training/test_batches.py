"""Batches are a pure function of (seed, step)."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from zotune.training.batches import indices, spread
from zotune.training.order import permutation


@given(st.integers(0, 9), st.integers(1, 7), st.integers(1, 20))
def test_every_epoch_shows_each_example_once(seed: int, size: int, count: int) -> None:
    seen = [i for step in range(3 * count) for i in indices(seed, step, size, count)]
    for epoch in range(len(seen) // count):
        assert Counter(seen[epoch * count : (epoch + 1) * count]) == Counter(range(count))


@given(st.integers(0, 9), st.integers(1, 7), st.integers(0, 40))
def test_batches_are_always_full(seed: int, size: int, step: int) -> None:
    assert len(indices(seed, step, size, 5)) == size


def test_seeds_and_epochs_give_other_orders() -> None:
    orders = {tuple(permutation(seed, epoch, 50)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_the_order_is_fixed_for_good() -> None:
    assert permutation(7, 0, 8).tolist() == [4, 1, 6, 3, 2, 7, 5, 0]


def test_spread_covers_the_data() -> None:
    assert list(spread(range(100), 4)) == [0, 25, 50, 75]
    assert len(spread(range(3), 10)) == 3
