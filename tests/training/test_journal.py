"""The journal: round trips, sizes, every cut and every flipped byte found."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zotune.errors import JournalError
from zotune.training import journal as module
from zotune.training.journal import Journal, JournalWriter, record_bytes

HEADER = {"coefficients": 2, "config": {}, "total": 9}
STEPS = [((1.5, -2.0), 0.25), ((math.nan, 1.0), math.inf), ((1e-300, 3.0), 7.0)]


def written(path: Path, steps: Any = STEPS, kept: int | None = None, n: int = 2) -> int:
    """Write a journal; returns where its records begin."""
    attached = {"head.weight": torch.ones(2, 3)}
    writer = JournalWriter.create(path, {**HEADER, "coefficients": n}, attached)
    begin = writer.size
    for coefficients, loss in steps:
        writer.append(coefficients, loss)
    if kept is not None:
        writer.finish(kept)
    writer.close()
    return begin


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written(tmp_path / "j", kept=2)
    read = Journal.read(tmp_path / "j")
    assert read.header["total"] == 9
    assert read.kept == 2
    assert torch.equal(read.attached["head.weight"], torch.ones(2, 3))
    assert [r.loss for r in read.records] == [0.25, math.inf, 7.0]
    assert read.records[0].coefficients == (1.5, -2.0)
    assert math.isnan(read.records[1].coefficients[0])


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_step_costs_16_bytes_and_8_per_further_coefficient(tmp_path: Path, n: int) -> None:
    begin = written(tmp_path / "j", [((0.5,) * n, 1.0)] * 10, n=n)
    assert (tmp_path / "j").stat().st_size - begin == 10 * (16 + 8 * (n - 1))
    assert record_bytes(n) == 16 + 8 * (n - 1)


def test_a_run_without_coefficients_keeps_its_losses(tmp_path: Path) -> None:
    written(tmp_path / "j", [((), 1.0), ((), 2.0)], n=0)
    assert [r.loss for r in Journal.read(tmp_path / "j").records] == [1.0, 2.0]


def test_a_finite_loss_beyond_float32_stays_finite(tmp_path: Path) -> None:
    written(tmp_path / "j", [((1.0, 1.0), 1e300)])
    assert math.isfinite(Journal.read(tmp_path / "j").records[0].loss)


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(tmp_path_factory: Any, place: float, bit: int) -> None:
    path = tmp_path_factory.mktemp("j") / "j"
    begin = written(path, kept=1)
    data = bytearray(path.read_bytes())
    at = int(place * len(data))
    data[at] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(JournalError):
        Journal.read(path)
    if at >= begin:
        good = min((at - begin) // record_bytes(2), 3)
        assert len(Journal.read(path, repair=True).records) == good


@given(cut=st.integers(1, 24 * 4 - 1))
def test_a_cut_inside_a_record_is_found_and_the_good_prefix_offered(
    tmp_path_factory: Any, cut: int
) -> None:
    path = tmp_path_factory.mktemp("j") / "j"
    written(path, [*STEPS, ((1.0, 2.0), 3.0)])
    path.write_bytes(path.read_bytes()[:-cut])
    good = (4 * 24 - cut) // 24
    if cut % 24:
        with pytest.raises(JournalError, match=f"first {good} steps are good"):
            Journal.read(path)
    assert len(Journal.read(path, repair=True).records) == good
    assert len(Journal.read(path, torn=True).records) == good


def test_going_on_writes_over_the_torn_record(tmp_path: Path) -> None:
    path = tmp_path / "j"
    written(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    writer = JournalWriter.reopen(Journal.read(path, torn=True))
    writer.append(*STEPS[2])
    writer.close()
    assert path.read_bytes() == whole


def test_going_on_after_the_end_mark_replaces_it(tmp_path: Path) -> None:
    path = tmp_path / "j"
    written(path, kept=3)
    writer = JournalWriter.reopen(Journal.read(path))
    writer.append((4.0, 4.0), 4.0)
    writer.finish(4)
    writer.close()
    read = Journal.read(path)
    assert (len(read.records), read.kept) == (4, 4)


def test_records_of_another_run_do_not_fit(tmp_path: Path) -> None:
    begin = written(tmp_path / "a")
    other = written(tmp_path / "b", [((9.0, 9.0), 9.0)], n=2)
    data = (tmp_path / "a").read_bytes()[:begin].replace(b'"total": 9', b'"total": 8')
    (tmp_path / "c").write_bytes(data + (tmp_path / "b").read_bytes()[other:])
    with pytest.raises(JournalError):
        Journal.read(tmp_path / "c")


def test_two_writers_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    writer = JournalWriter.create(tmp_path / "j", HEADER, {})
    with pytest.raises(JournalError, match="another process"):
        JournalWriter.reopen(Journal.read(tmp_path / "j"))
    writer.close()
    JournalWriter.reopen(Journal.read(tmp_path / "j")).close()


def test_a_full_disk_leaves_whole_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = JournalWriter.create(tmp_path / "j", HEADER, {})
    writer.append((1.0, 2.0), 3.0)
    real = module.os.pwrite
    monkeypatch.setattr(module.os, "pwrite", lambda file, data, at: real(file, data[:7], at))
    with pytest.raises(JournalError, match="every step so far is safe"):
        writer.append((1.0, 2.0), 3.0)
    monkeypatch.undo()
    writer.append((5.0, 5.0), 5.0)
    writer.close()
    assert [r.loss for r in Journal.read(tmp_path / "j").records] == [3.0, 5.0]


@pytest.mark.parametrize(
    "content", [b"", b"zotune", b"\x00" * 200, b"zotune-journal\x00\x01" + b"\xff" * 99]
)
def test_what_is_no_journal_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(JournalError):
        Journal.read(tmp_path / "j")


def test_a_newer_version_is_named(tmp_path: Path) -> None:
    written(tmp_path / "j")
    data = bytearray((tmp_path / "j").read_bytes())
    data[len(module.MAGIC) - 1] = 2
    (tmp_path / "j").write_bytes(data)
    with pytest.raises(JournalError, match="version 2"):
        Journal.read(tmp_path / "j")


def test_sizes_in_the_head_are_bounded(tmp_path: Path) -> None:
    written(tmp_path / "j")
    data = bytearray((tmp_path / "j").read_bytes())
    struct.pack_into("<Q", data, len(module.MAGIC), 1 << 60)
    (tmp_path / "j").write_bytes(data)
    with pytest.raises(JournalError, match="header"):
        Journal.read(tmp_path / "j")
