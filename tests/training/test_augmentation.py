"""What augmented batches depend on. Run: pytest tests/training/test_augmentation.py"""

from __future__ import annotations

import torch

from zotune import tasks
from zotune.training.batches import Batches, PoissonBatches


def test_a_step_sees_the_same_pictures_whenever_it_is_run() -> None:
    task = tasks.get("digits", flip=True, crop=2)
    first, again = (Batches(task, task.split("train"), 8, seed=5) for _ in range(2))
    straight = [first[step]["pixels"] for step in range(4)]
    torch.rand(3)
    assert all(torch.equal(again[step]["pixels"], straight[step]) for step in (3, 1, 0, 2))
    other = Batches(task, task.split("train"), 8, seed=6)
    assert not torch.equal(other[0]["pixels"], straight[0])


def test_the_pictures_of_a_step_change_with_the_step_and_keep_their_labels() -> None:
    plain, varied = tasks.get("digits"), tasks.get("digits", flip=True, crop=2)
    rows = plain.split("train")[:8]
    batches = [Batches(task, rows, 8, seed=5) for task in (plain, varied)]
    for step in range(2):
        a, b = (each[step] for each in batches)
        assert torch.equal(a["label"], b["label"])
        assert not torch.equal(a["pixels"], b["pixels"])


def test_private_batches_are_augmented_by_numbers_that_do_not_come_again() -> None:
    task = tasks.get("digits", crop=2)
    batches = PoissonBatches(task, task.split("train")[:4], 4)
    seen = {tuple(piece["pixels"].flatten().tolist()) for _ in range(6) for piece in batches[0]}
    assert len(seen) > 4
