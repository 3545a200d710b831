"""Examples of like length together. Run: pytest tests/training/test_lengths.py"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tasks import tiny
from training import lab

from zotune.errors import BadInput
from zotune.tasks import Task
from zotune.tasks.batch import Batch
from zotune.tasks.choice import Choice
from zotune.tasks.classification import Classification
from zotune.tasks.lm import LanguageModel
from zotune.tasks.qa import QuestionAnswering
from zotune.training import train
from zotune.training.assemble import assemble
from zotune.training.batches import Batches, PoissonBatches, indices, together
from zotune.training.lengths import FORWARD, buckets, grouped

extents = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 600)), min_size=1, max_size=7)


def cost(pieces: list[list[int]], found: list[tuple[int, int]]) -> int:
    return sum(
        sum(found[i][0] for i in piece) * max(found[i][1] for i in piece) + FORWARD
        for piece in pieces
    )


@given(found=extents, most=st.integers(1, 3000))
def test_buckets_are_the_cheapest_runs_of_the_sorted_examples(
    found: list[tuple[int, int]], most: int
) -> None:
    pieces = buckets(found, most)
    assert sorted(i for piece in pieces for i in piece) == list(range(len(found)))

    def fits(piece: list[int]) -> bool:
        tokens = sum(found[i][0] for i in piece) * max(found[i][1] for i in piece)
        return len(piece) == 1 or tokens <= most

    assert all(map(fits, pieces))
    order = sorted(range(len(found)), key=lambda i: -found[i][1])
    others = []
    for cuts in itertools.product((False, True), repeat=len(found) - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(found)]
        runs = [order[a:b] for a, b in itertools.pairwise(edges)]
        if all(map(fits, runs)):
            others.append(cost(runs, found))
    assert cost(pieces, found) == min(others)


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=60),
    size=st.integers(1, 9),
    epoch=st.integers(0, 4),
)
def test_a_grouped_epoch_holds_every_example_once(
    lengths: list[int], size: int, epoch: int
) -> None:
    found = grouped(3, epoch, size, lengths)
    assert sorted(found.tolist()) == list(range(len(lengths)))
    assert found.tolist() == grouped(3, epoch, size, list(lengths)).tolist()


def test_grouped_batches_are_of_like_length_in_every_epoch_and_come_in_no_order() -> None:
    lengths = [(37 * i) % 101 for i in range(203)]
    task: Any = Sized(lengths)
    batches = Batches(task, range(203), 8, seed=1, grouped=True)
    plain = Batches(task, range(203), 8, seed=1)

    def spread(steps: range, of: Batches) -> float:
        drawn = [[lengths[i] for i in of.chosen(step)] for step in steps]
        return sum(max(d) - min(d) for d in drawn) / len(steps)

    # The epochs of 203 do not end where batches of 8 do; batches over a border mix two groups.
    for steps in (range(25), range(26, 50), range(102, 126)):
        assert spread(steps, batches) < 0.15 * spread(steps, plain)
    longest = [max(lengths[i] for i in batches.chosen(step)) for step in range(25)]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)
    again = Batches(task, range(203), 8, seed=1, grouped=True)
    assert again.chosen(113) == batches.chosen(113)  # whatever was asked before
    assert plain.chosen(113) == indices(1, 113, 8, 203)


class Sized:
    """Examples are numbers; example i has lengths[i] tokens."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def encode(self, example: int) -> int:
        return example

    def extent(self, features: int) -> tuple[int, int]:
        return 1, self.lengths[features]

    def collate(self, features: list[int]) -> Batch:
        return Batch({"x": torch.tensor(features)}, len(features))

    def varied(self, batch: Batch, draw: Any) -> Batch:
        return batch


def test_pieces_hold_the_batchs_examples_and_say_which() -> None:
    task: Any = Sized([5 + (i % 3) * 200 for i in range(40)])
    whole = Batches(task, range(40), 12, seed=0)
    cut = Batches(task, range(40), 12, seed=0, most=1000)
    pieces = cut[2]
    assert not isinstance(pieces, Batch)
    assert len(pieces) > 1
    wanted = whole.whole(2)["x"].tolist()
    for piece in pieces:
        assert piece.places is not None
        assert piece["x"].tolist() == [wanted[p] for p in piece.places]
    assert cut.whole(2)["x"].tolist() == wanted
    shifted = together([pieces, whole[3]], 12)
    assert sorted(p for piece in shifted for p in piece.places or ()) == list(range(24))
    assert shifted[-1].places == tuple(range(12, 24))


def test_examples_without_tokens_are_never_cut() -> None:
    assert isinstance(Batches(lab.task(), lab.rows(), 8, seed=0, most=1)[0], Batch)


def tasks() -> dict[str, Task]:
    films = ["fun", "dull", " and ".join(["great fun"] * 9), " and ".join(["terrible"] * 12)]
    rows = [{"text": f"the film was {t}", "label": i % 2} for i, t in enumerate(films * 3)]
    return {
        "head": Classification({"train": rows}, ["bad", "good"], "{text} It was"),
        "words": Classification({"train": rows}, ["bad", "good"], "{text} It was"),
        "choice": Choice(
            {"train": [{"prompt": r["text"], "choices": ["bad film", "good"], "label": r["label"]}
                       for r in rows]}
        ),
        "lm": LanguageModel({"train": rows}),
        "qa": QuestionAnswering(
            {"train": [{"title": "t", "context": r["text"], "question": "q", "answers": ["fun"]}
                       for r in rows]},
            max_new_tokens=4,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("method", ["mezo(eps=0.05)", "mezo(directions='example', eps=0.05)"])
@pytest.mark.parametrize("name", list(tasks()))
def test_a_run_in_pieces_of_like_length_has_the_coefficients_of_whole_batches(
    name: str, method: str, tmp_path: Path
) -> None:
    found = []
    tokenizer = tiny.make_tokenizer()
    make = tiny.bert if name == "head" else tiny.llama
    for most in (None, 64):
        bench = assemble(
            lab.config(tmp_path / str(most), method=method, space="weights", units="relative",
                       learning_rate=1e-3, micro_batch_tokens=most, per_device_train_batch_size=8),
            model=make(tokenizer), task=tasks()[name],
        )  # fmt: skip
        tuner = bench.tuner
        seen: list[Any] = []
        tuner.record = lambda step, estimate, seen=seen: seen.append(estimate)  # type: ignore
        pieces = [bench.batches[step] for step in range(2)]
        for batch in pieces:
            tuner.step(batch)
        assert all(isinstance(p, Batch) == (most is None) for p in pieces)
        found.append(seen)
    for whole, cut in zip(*found, strict=True):
        assert cut.loss == pytest.approx(whole.loss, rel=1e-5)
        wanted = torch.tensor(whole.coefficients)
        close = 2e-3 * float(wanted.abs().max()) + 1e-4
        assert torch.allclose(torch.tensor(cut.coefficients), wanted, rtol=0, atol=close)


REFUSED = [
    {"method": "agzo", "space": "weights(pattern='up')"},
    {"method": "mezo", "cache_dir": "cache", "freeze": "0.5@2"},
]


@pytest.mark.parametrize("options", REFUSED, ids=["activations", "cached"])
def test_pieces_that_would_change_a_step_are_refused(
    options: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="drop micro_batch_tokens"):
        train(lab.config(tmp_path, micro_batch_tokens=64, **options),
              model=lab.base("mezo"), task=lab.task())  # fmt: skip


def test_private_batches_stay_as_chance_draws_them() -> None:
    batches = PoissonBatches(lab.task(), lab.rows(), 4)
    assert batches.read(0) is None
