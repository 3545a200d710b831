"""Every named task against the real files: counts, labels, no leakage. Skips without the data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from tasks.tiny import bert, check_stacking, llama

from zotune import tasks
from zotune.errors import BadInput, DataError
from zotune.tasks import Classification
from zotune.tasks.catalogue import SOURCES
from zotune.tasks.data import fingerprint
from zotune.tasks.prompts import PROMPTS

COUNTS = {  # train + dev (when dev is held out), or train, dev; then test
    "sst2": (67349, 872, 1821),
    "sst5": (8544, 1101, 2210),
    "mr": (10662,),
    "trec": (5452, 500),
    "ag_news": (7600,),
    "rte": (2490, 277),
    "cb": (250, 56),
    "copa": (368, 100),
    "boolq": (32, 32, 3270),
    "wic": (32, 32, 638),
    "wsc": (32, 32, 104),
    "multirc": (154, 167, 4848),
    "snli": (8999, 9842, 9824),
    "mnli": (8999, 1000),
    "squad": (1190,),
    "wikitext2": (60, 60),
    "tinystories": (1000,),
    "ptb": (3370, 3761),
}


def test_every_source_is_counted() -> None:
    assert set(COUNTS) == set(SOURCES)
    assert set(PROMPTS) <= set(SOURCES)


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_counts_labels_and_no_leak(name: str, real_data: Path) -> None:
    task = tasks.get(name, data=str(real_data))
    sizes = [len(task.split(split)) for split in ("train", "dev", "test")]
    wanted = COUNTS[name]
    found = {3: sizes, 2: [sizes[0] + sizes[1], sizes[2]], 1: [sum(sizes)]}[len(wanted)]
    assert tuple(found) == wanted
    seen = {fingerprint(row) for row in task.split("train")}
    assert len(wanted) == 3 or not any(fingerprint(row) in seen for row in task.split("dev"))
    if isinstance(task, Classification):
        labels = {row["label"] for split in task.splits for row in task.split(split)}
        assert labels == set(range(len(task.labels)))
        row = task.split("test")[0]
        assert task.template.fill(row)
        assert all(row[field] for field in task.inputs)


def test_trec_classes_are_balanced_as_published(real_data: Path) -> None:
    task = tasks.get("trec", data=str(real_data))
    counts = [0] * 6
    for row in task.split("test"):
        counts[row["label"]] += 1
    assert counts == [9, 94, 138, 65, 81, 113]
    assert task.split("test")[2] == {"text": "Who was Galileo ?", "label": 3}


def test_environment_names_the_data(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOTUNE_DATA", str(real_data))
    assert len(tasks.get("cb").split("test")) == 56
    monkeypatch.setenv("ZOTUNE_DATA", str(real_data / "nowhere"))
    with pytest.raises(DataError, match="is not a folder; unset it or correct it"):
        tasks.get("cb")


def test_shots_of_other_layouts(real_data: Path) -> None:
    folder = real_data / "text/lmbff-kshot"
    nli = tasks.get("rte", data=str(folder / "RTE/16-13"))
    assert [len(nli.split(s)) for s in nli.splits] == [32, 32, 277]
    order = "description,entity,abbreviation,person,location,number"
    trec = tasks.get("trec", data=str(folder / "trec/16-13"), columns="label,text", labels=order)
    assert len(trec.split("train")) == 96
    rows = {row["text"]: row["label"] for row in trec.split("test")}
    ours = tasks.get("trec", data=str(real_data)).split("test")
    assert all(rows[row["text"]] == row["label"] for row in ours)


def test_sizes_and_seeds_choose_rows(real_data: Path) -> None:
    options = {"data": str(real_data), "train_size": 64, "dev_size": 32, "test_size": 16}
    first, again = tasks.get("trec", **options), tasks.get("trec", **options)
    other = tasks.get("trec", **options, seed=1)
    assert [len(first.split(s)) for s in first.splits] == [64, 32, 16]
    assert list(first.split("train")) == list(again.split("train"))
    assert list(first.split("train")) != list(other.split("train"))


def test_tickets_ship_with_the_package(tokenizer: Any) -> None:
    task = tasks.get("tickets")
    assert isinstance(task, Classification)
    assert len(task.labels) == 10
    assert {row["label"] for row in task.split("train")} == set(range(10))
    assert len(task.split("test")) > 100
    rows = list(task.split("dev"))[:4]
    for found in (llama(tokenizer), bert(tokenizer)):
        check_stacking(task, task.prepare(found), rows)


def test_own_rows_with_a_named_prompt() -> None:
    rows = [{"sentence": f"film {i}", "label": i % 2} for i in range(20)]
    task = tasks.get("sst2", data=rows, dev_size=4)
    assert set(task.split("train")[0]) == {"text", "label"}
    with pytest.raises(BadInput, match="labels of 'sst2' are negative, positive"):
        tasks.get("sst2", data=rows, labels="bad,good")
    with pytest.raises(DataError, match=r"line 1: cannot read the row .*none of the fields text"):
        tasks.get("sst2", data=[{"story": "x", "label": 0}] * 3)
    with pytest.raises(DataError, match="unknown label 'meh'; the labels are negative, positive"):
        tasks.get("sst2", data=[{"text": str(i), "label": "meh"} for i in range(3)])


def test_tinystories_is_local_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZOTUNE_DATA", raising=False)
    with pytest.raises(DataError, match="needs a local folder: data=<folder>, or set ZOTUNE_DATA"):
        tasks.get("tinystories")


def test_unlabelled_hub_rows_are_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"premise": f"p{i}", "hypothesis": "h", "label": i % 3} for i in range(30)]
    hidden = [{"premise": "q", "hypothesis": "h", "label": -1}]
    task = tasks.get("snli", data={"train": rows + hidden, "test": hidden})
    assert "1 rows without a label are left out" in caplog.text
    assert task.splits == ("train", "dev")


def test_hub_splits_and_hidden_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Hub:
        @staticmethod
        def load_dataset(name: str, config: str | None) -> Any:
            asked.append((name, config))
            rows = [{"sentence": f"film {i}", "label": i % 2} for i in range(40)]
            return {"train": rows[:30], "validation": rows[30:], "test": [{"sentence": "x"}]}

    monkeypatch.delenv("ZOTUNE_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", Hub)
    task = tasks.get("sst2")
    assert asked == [("stanfordnlp/sst2", None)]
    assert [len(task.split(s)) for s in task.splits] == [27, 3, 10]
    assert task.split("test")[0] == {"text": "film 30", "label": 0}


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {"tinystories", "ptb"}))
def test_rows_as_the_hub_writes_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fields of the hub's copies, as documented there."""
    fields = {
        "sst2": {"sentence": "s"},
        "trec": {"text": "s", "coarse_label": 1, "fine_label": 7},
        "boolq": {"question": "is it", "passage": "p"},
        "wic": {"word": "w", "sentence1": "a", "sentence2": "b", "start1": 0},
        "wsc": {"text": "t", "span1_text": "a", "span2_text": "b", "span1_index": 0},
        "multirc": {"paragraph": "p", "question": "q", "answer": "a"},
        "copa": {"premise": "P.", "choice1": "A", "choice2": "B", "question": "cause"},
        "squad": {"title": "t", "context": "c", "question": "q", "answers": {"text": ["a"]}},
    }.get(name, {"text": "t", "premise": "p", "hypothesis": "h"})

    class Hub:
        @staticmethod
        def load_dataset(name: str, config: str | None) -> Any:
            rows = [{**fields, "label": i % 2, "idx": i} for i in range(20)]
            for key in ("title", "text", "premise", "passage", "paragraph", "sentence", "word"):
                for i, row in enumerate(rows):
                    row[key] = f"{row[key]} {i}" if key in row else None
            part = rows[:3]
            named = ("validation", "validation_matched", "test")
            return {"train": rows} | dict.fromkeys(named, part)

    monkeypatch.delenv("ZOTUNE_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", Hub)
    task = tasks.get(name)
    assert set(task.splits) == {"train", "dev", "test"}
    if isinstance(task, Classification):
        assert task.template.fill(task.split("train")[0])
