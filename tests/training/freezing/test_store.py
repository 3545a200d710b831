"""Chunks are whole or absent, checked as they are read, and never those of another run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zotune.errors import BadInput, FormatError, ZotuneError
from zotune.training import snapshots
from zotune.training.freezing import store as stores
from zotune.training.freezing.codec import Lossless, Zfp
from zotune.training.freezing.plan import parse_bytes
from zotune.training.freezing.store import CacheFull, Missing, Store, folder_bytes

COUNT = 11
WHOSE = {"model": "abc", "depth": 4, "codec": "Lossless(bound=0.0)"}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "CHUNK", 4)


def features() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n % 5, 6, generator=generator) for n in range(COUNT)]


def store(folder: Path, **options: Any) -> Store:
    given = {"identity": WHOSE, "count": COUNT, "codec": Lossless(), "dtype": torch.float32}
    return Store(folder / "cache" / "depth-04", **{**given, **options})


def filled(folder: Path, **options: Any) -> Store:
    made = store(folder, **options)
    made.claim()
    for number in range(made.chunks):
        made.put(number, [features()[i] for i in made.members(number)])
    return made


@pytest.mark.parametrize("codec", [Lossless(), Zfp(tolerance=0.1).fitted(1.0, 0)])
def test_every_example_comes_back_whatever_its_length(tmp_path: Path, codec: Any) -> None:
    filled(tmp_path, codec=codec)
    again = store(tmp_path, codec=codec)
    for index, wanted in enumerate(features()):
        found = again.get(index)
        assert found.shape == wanted.shape
        assert not wanted.numel() or float((found - wanted).abs().max()) <= codec.bound


def test_chunks_hold_every_example_once_in_a_shuffled_order(tmp_path: Path) -> None:
    made = store(tmp_path)
    members = [i for number in range(made.chunks) for i in made.members(number)]
    assert sorted(members) == list(range(COUNT))
    assert members != list(range(COUNT))


@pytest.mark.parametrize("where", [0.02, 0.3, 0.5, 0.7, 0.999])
def test_a_flipped_byte_anywhere_makes_the_chunk_missing(tmp_path: Path, where: float) -> None:
    made = filled(tmp_path)
    path = made._path(1)
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1
    path.write_bytes(data)
    again, lost, numbers = store(tmp_path), list[int](), set[int]()
    for index, wanted in enumerate(features()):
        try:
            assert torch.equal(again.get(index), wanted)
        except Missing as missing:
            lost.append(index)
            numbers.add(missing.number)
    assert numbers == {1}
    assert set(lost) <= set(made.members(1))


def test_a_chunk_cut_short_or_absent_is_missing(tmp_path: Path) -> None:
    made = filled(tmp_path)
    made._path(0).write_bytes(made._path(0).read_bytes()[:-7])
    made._path(2).unlink()
    again = store(tmp_path)
    assert [again.holds(n) for n in range(3)] == [False, True, False]


@pytest.mark.parametrize("key", [*WHOSE, "new"])
def test_a_cache_of_anything_else_is_refused_by_name(tmp_path: Path, key: str) -> None:
    filled(tmp_path)
    with pytest.raises(BadInput, match=f"features of another run: {key} "):
        store(tmp_path, identity={**WHOSE, key: "other"}).claim()


def test_chunks_under_a_foreign_header_count_as_missing(tmp_path: Path) -> None:
    made = filled(tmp_path)
    (made.folder / stores.HEADER).unlink()
    other = store(tmp_path, identity={**WHOSE, "model": "other"})
    other.claim()
    assert not any(other.holds(number) for number in range(other.chunks))


def test_a_header_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    made = filled(tmp_path)
    for text in ("{", json.dumps([1])):
        (made.folder / stores.HEADER).write_text(text)
        with pytest.raises((FormatError, BadInput), match="remove"):
            store(tmp_path).claim()


def test_the_limit_stops_cleanly_and_what_is_there_stays(tmp_path: Path) -> None:
    whole = folder_bytes(filled(tmp_path / "whole").folder)
    with pytest.raises(CacheFull, match="cache_limit="):
        filled(tmp_path, limit=whole - 1)
    made = store(tmp_path)
    assert [made.holds(n) for n in range(3)] == [True, True, False]
    assert folder_bytes(made.folder.parent) < whole
    filled(tmp_path, limit=whole)


def test_a_full_disk_leaves_no_half_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = store(tmp_path)
    made.claim()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshots.os, "fsync", full)
    with pytest.raises(ZotuneError, match="No space left on device"):
        made.put(0, [features()[i] for i in made.members(0)])
    assert [p.name for p in made.folder.iterdir()] == [stores.HEADER]


def test_sizes_are_read_as_people_write_them() -> None:
    assert parse_bytes("2.5kB") == 2500
    for text in ("", "GB", "-1", "2 apples", "nan", "inf"):
        with pytest.raises(BadInput, match="no number of bytes"):
            parse_bytes(text)
