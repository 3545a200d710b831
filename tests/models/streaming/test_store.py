"""Tensors in files: the same values, at places that training may write."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from zotune.errors import ZotuneError
from zotune.models.streaming import Store
from zotune.models.streaming.store import ALIGNED, bring
from zotune.quant.formats.shards import entries

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool]


@given(
    shape=st.lists(st.integers(0, 40), max_size=3), dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_what_is_put_comes_back_whatever_leaves_memory(
    shape: list[int], dtype: torch.dtype, seed: int
) -> None:
    store = Store()
    generator = torch.Generator().manual_seed(seed)
    tensor = (torch.rand(shape, generator=generator) * 90).to(dtype)
    held = store.put(tensor)
    assert held.dtype == dtype
    assert held.shape == tensor.shape
    if (place := store.place(held)) is not None:
        bring([place])
        place.let_go()
        place.forget()
    assert torch.equal(held.view(torch.uint8), tensor.view(torch.uint8)) if shape else True
    assert held.data_ptr() % ALIGNED == 0


def test_what_is_written_stays_written() -> None:
    store = Store()
    held = store.put(torch.zeros(5000))
    place = store.place(held)
    assert place is not None
    assert place.writable
    for value in (1.0, 2.0):
        held.fill_(value)
        place.let_go()
        place.forget()
        assert bool((held == value).all())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tensors = {"a": torch.arange(9, dtype=torch.int8), "b": torch.rand(33), "c": torch.rand(0)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_a_checkpoint_is_mapped_where_it_lies_well_and_never_written(folder: Path) -> None:
    store, before = Store(), (folder / "model.safetensors").read_bytes()
    found = entries(folder)
    held = {name: store.take(entry) for name, entry in found.items()}
    assert all(torch.equal(held[name], found[name].read()) for name in found)
    codes = store.place(held["a"])
    assert codes is not None
    assert not codes.writable
    well = found["b"].start % ALIGNED == 0
    floats = store.place(held["b"])
    assert floats is not None
    assert floats.writable is not well
    held["a"].fill_(7)
    assert (folder / "model.safetensors").read_bytes() == before


def test_what_is_tuned_moves_to_where_it_may_be_written(folder: Path) -> None:
    store = Store()
    codes = store.take(entries(folder)["a"])
    view, wanted = codes, codes.tolist()
    store.own_(codes)
    place = store.place(codes)
    assert place is not None
    assert place.writable
    assert view is codes
    assert codes.tolist() == wanted


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="space is not reserved here")
def test_a_full_disk_is_said_before_a_page_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ZotuneError, match=r"No space left.*offload_folder"):
        Store().put(torch.ones(3))


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ZotuneError, match="nowhere"):
        Store(tmp_path / "nowhere")
