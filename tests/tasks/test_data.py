from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zotune.errors import DataError
from zotune.tasks.data import hold_out, read_table, sample, table
from zotune.tasks.sources import Sizes, load

Write = Callable[..., Path]


def test_every_file_type_gives_the_same_rows(write: Write) -> None:
    rows = [{"text": "a b", "label": "x"}, {"text": "é, q", "label": "y"}]
    paths = [
        write("r.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n\n"),
        write("r.json", json.dumps(rows)),
        write("m.json", json.dumps({"0": rows[0], "1": rows[1]})),
        write("r.csv", 'text,label\r\na b,x\r\n"é, q",y\r\n'),
        write("r.tsv", "text\tlabel\na b\tx\né, q\ty\n"),
        write("bom.tsv", "\ufefftext\tlabel\na b\tx\né, q\ty\n"),
    ]
    for path in paths:
        assert list(read_table(path)) == rows, path
    assert list(read_table(write("h.csv", '1,"a, b"\n'), columns=("n", "t"))) == [
        {"n": "1", "t": "a, b"}
    ]
    assert list(read_table(write("r.txt", "one\n\n two\n"))) == [{"text": "one"}, {"text": " two"}]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"text": "a", "label": 1}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    assert list(read_table(tmp_path / "r.parquet")) == rows
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="not a readable parquet"):
        read_table(tmp_path / "bad.parquet")


def test_tsv_does_not_treat_quotes_as_quotes(write: Write) -> None:
    path = write("q.tsv", 'text\tlabel\n"so called\t1\n')
    assert read_table(path)[0] == {"text": '"so called', "label": "1"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not valid JSON"),
        ("b.jsonl", '{"text": "x"}\n[1]\n', r"b\.jsonl, line 2: wanted a JSON object, got a list"),
        ("c.json", "[1, 2]", "wanted a JSON list of objects"),
        ("d.json", "[{]", r"d\.json, line 1: not valid JSON"),
        ("e.csv", "text,label\nx,1,2\n", r"e\.csv, line 2: 3 columns, the header has 2"),
        ("f.csv", "text,label\n", "holds no rows"),
        ("g.jsonl", "\n\n", "holds no rows"),
        ("h.jsonl", b'{"text": "caf\xe9"}\n', r"line 1: byte 13 is not valid utf-8.*latin-1"),
        ("i.docx", "x", r"unknown ending '\.docx'; known: \.jsonl"),
        ("j.csv", 'text,label\n"x,1\n', "malformed"),
    ],
)
def test_bad_files_name_file_line_and_remedy(
    write: Write, name: str, content: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_table(write(name, content))


def test_latin1_reads_when_said(write: Write) -> None:
    path = write("l.jsonl", b'{"text": "caf\xe9"}\n')
    assert read_table(path, "latin-1")[0] == {"text": "café"}
    with pytest.raises(DataError, match="unknown encoding"):
        read_table(path, "latin-99")


def test_missing_files_and_offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"holds no train, dev \(or validation\) or test file"):
        load(tmp_path)

    class Offline:
        @staticmethod
        def load_dataset(*args: object, **options: object) -> None:
            raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", Offline)
    with pytest.raises(DataError, match=r"could not be loaded: ConnectionError: no route.*network"):
        load("some/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        load("hf:some/name")


def test_hub_names_splits_and_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Hub:
        @staticmethod
        def load_dataset(name: str, config: str | None, revision: str | None = None) -> object:
            calls.append((name, config, revision))
            if revision is None:
                raise RuntimeError("Dataset scripts are no longer supported, but found x.py")
            return {"train": [{"text": "a"}], "validation": [{"text": "b"}]}

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    found = load("hf:owner/name:conf")
    assert {k: list(v) for k, v in found.items()} == {
        "train": [{"text": "a"}],
        "dev": [{"text": "b"}],
    }
    assert calls == [
        ("owner/name", "conf", None),
        ("owner/name", "conf", "refs/convert/parquet"),
    ]


def test_folder_splits(write: Write, tmp_path: Path) -> None:
    write("d/train.jsonl", '{"text": "a"}\n')
    write("d/validation.csv", "text\nb\n")
    write("d/readme.md", "x")
    found = load(tmp_path / "d")
    assert {k: [r["text"] for r in v] for k, v in found.items()} == {"train": ["a"], "dev": ["b"]}
    write("d/dev.jsonl", '{"text": "c"}\n')
    with pytest.raises(DataError, match=r"several files for dev: dev\.jsonl, validation\.csv"):
        load(tmp_path / "d")


def test_rows_in_memory() -> None:
    assert list(load([{"text": "a"}])["train"]) == [{"text": "a"}]
    assert set(load({"train": [{"t": 1}], "test": [{"t": 2}]})) == {"train", "test"}
    with pytest.raises(DataError, match="empty"):
        load([])
    with pytest.raises(DataError, match="unknown split 'valid'"):
        load({"valid": [{"t": 1}]})


@given(st.lists(st.integers(0, 30), min_size=4, max_size=40), st.integers(1, 3), st.randoms())
def test_hold_out_is_deterministic_order_free_and_leaks_nothing(
    values: list[int], count: int, random: object
) -> None:
    if len(set(values)) < 5:
        return
    rows = [{"v": v} for v in values]
    kept, held = hold_out(table(rows), count, "s")
    assert len(held) >= count
    assert len(kept) + len(held) == len(rows)
    assert not {r["v"] for r in kept} & {r["v"] for r in held}
    again = hold_out(table(rows[::-1]), count, "s")
    assert {r["v"] for r in again[1]} == {r["v"] for r in held}


def test_hold_out_by_group_and_errors() -> None:
    rows = table([{"g": i % 5, "v": i} for i in range(20)])
    kept, held = hold_out(rows, 6, "s", group=lambda row: row["g"])
    assert not {r["g"] for r in kept} & {r["g"] for r in held}
    assert len(held) == 8
    with pytest.raises(DataError, match="cannot hold out 20"):
        hold_out(rows, 20, "s")
    with pytest.raises(DataError, match="cannot hold out 1 of the 1 rows"):
        hold_out(table([{"v": 1}]), 1, "s")


def test_sizes_hold_dev_out_of_train_only() -> None:
    tables = {"train": table([{"v": i} for i in range(100)]), "test": table([{"v": 1000}])}
    cut = Sizes(train=50).apply(tables)
    assert [len(cut[s]) for s in ("train", "dev", "test")] == [50, 10, 1]
    assert not {r["v"] for r in cut["train"]} & {r["v"] for r in cut["dev"]}
    other = Sizes(train=50, seed=1).apply(tables)
    assert {r["v"] for r in other["dev"]} != {r["v"] for r in cut["dev"]}
    assert [r["v"] for r in cut["train"]] == sorted(r["v"] for r in cut["train"])
    assert len(sample(tables["train"], 7, "x")) == 7


def test_overlap_of_train_and_test_is_said(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"v": i} for i in range(10)]
    Sizes(dev=1).apply({"train": table(rows), "test": table([{"v": 3}, {"v": 99}])})
    said = [m for m in caplog.messages if "also stand in train" in m]
    assert len(said) <= 1
    Sizes().apply({"train": table(rows), "dev": table(rows[:1]), "test": table(rows[3:4])})
    assert "1 of the 1 test rows also stand in train" in caplog.text
