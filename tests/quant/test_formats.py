"""Checkpoint files and folders, without any model. Run: pytest tests/quant/test_formats.py"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zotune.errors import BadInput, FormatError
from zotune.quant import formats
from zotune.quant.formats.folder import copy_companions, replace_folder
from zotune.quant.formats.shards import entries
from zotune.quant.formats.tensors import check_files, read_json


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder with two shards and an index."""
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3), "c": torch.ones(1)}, tmp_path / "two.safetensors")
    index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    return tmp_path


def index(folder: Path, weight_map: object) -> None:
    text = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def test_shards_are_read_as_one(sharded: Path) -> None:
    assert check_files(sharded) == ["a", "b", "c"]
    assert {k: e.read().tolist() for k, e in entries(sharded).items()} == {
        "a": [1, 1], "b": [0, 0, 0], "c": [1],
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["../one.safetensors", "/etc/passwd", "sub/one.safetensors", "a\\b.safetensors", "x.bin"],
)
def test_shards_named_by_paths_are_refused(sharded: Path, name: str) -> None:
    index(sharded, {"a": name})
    with pytest.raises(FormatError, match="plain file name"):
        check_files(sharded)


def test_index_and_shards_must_agree(sharded: Path) -> None:
    index(sharded, {"a": "one.safetensors", "b": "two.safetensors", "d": "two.safetensors"})
    with pytest.raises(FormatError, match=r"missing tensors \[d\], unexpected tensors \[c\]"):
        check_files(sharded)
    (sharded / "two.safetensors").unlink()
    with pytest.raises(FormatError, match=r"two\.safetensors is missing, but the index names it"):
        check_files(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(1)}, sharded / "two.safetensors")
    with pytest.raises(FormatError, match="'a' is in both"):
        check_files(sharded)


@pytest.mark.parametrize("weight_map", [None, {}, ["a"]])
def test_an_index_without_a_map_is_refused(sharded: Path, weight_map: object) -> None:
    index(sharded, weight_map)
    with pytest.raises(FormatError, match="has no weight_map"):
        check_files(sharded)


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_truncated_files_are_refused_by_name(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(64)}, path)
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(FormatError, match=r"model\.safetensors is not a whole safetensors file"):
        check_files(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b'{"a": {"dtype": "F32", "shape": [64], "data_offsets": [0, 512]}}',
        b'{"a": {"dtype": "F32", "shape": [999], "data_offsets": [0, 256]}}',
        b'{"a": {"dtype": "F99", "shape": [64], "data_offsets": [0, 256]}}',
    ],
)
def test_tampered_headers_are_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(256))
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        check_files(tmp_path)


def test_pickles_are_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(FormatError, match=r"pytorch_model\.bin.*safe_serialization=True"):
        check_files(tmp_path)


def test_an_empty_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="holds no weights"):
        check_files(tmp_path)
    with pytest.raises(FormatError, match=r"config\.json is missing"):
        formats.detect(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\udcff"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(FormatError, match=r"config\.json"):
        read_json(path)


@pytest.mark.parametrize(
    ("quantization", "name"), [(None, "float"), ({"quant_method": "zotune"}, "zotune")]
)
def test_formats_are_told_by_the_config(tmp_path: Path, quantization: object, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    assert formats.detect(tmp_path) == name


def test_a_foreign_quantizer_is_named(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "mystery"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="quantized by 'mystery', which no format reads"):
        formats.detect(tmp_path)


def make_checkpoint(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model-00001-of-00002.safetensors").write_text("old")
    (folder / "model.safetensors.index.json").write_text("old")
    (folder / "journal.txt").write_text("kept")


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "model"
    folder.parent.mkdir()
    make_checkpoint(folder)
    with replace_folder(folder) as fresh:
        (fresh / "config.json").write_text("new")
        (fresh / "model.safetensors").write_text("new")
        assert (folder / "config.json").read_text() == "{}"
    found = {p.name: p.read_text() for p in folder.iterdir()}
    assert found == {"config.json": "new", "model.safetensors": "new", "journal.txt": "kept"}
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_a_failure_leaves_the_old_folder_and_no_litter(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_checkpoint(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fill_the_disk() -> None:
        with replace_folder(folder) as fresh:
            (fresh / "config.json").write_text("new")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fill_the_disk()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_failing_rename_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    make_checkpoint(folder)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if ".new-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"), replace_folder(folder) as fresh:
        (fresh / "config.json").write_text("new")
    assert (folder / "config.json").read_text() == "{}"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_folders_that_are_no_checkpoint_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="holds no checkpoint"), replace_folder(tmp_path):
        pass
    with pytest.raises(BadInput, match="is a file"), replace_folder(tmp_path / "notes.txt"):
        pass
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_new_folders_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    with replace_folder(tmp_path / "model") as fresh:
        (fresh / "config.json").write_text("{}")
    assert os.stat(tmp_path / "model").st_mode == os.stat(tmp_path / "usual").st_mode


def test_tokenizer_files_travel_and_weights_do_not(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "1_Pooling").mkdir(parents=True)
    target.mkdir()
    for name in (
        "tokenizer.json", "merges.txt", "chat_template.jinja", "model.safetensors", "config.json",
        "model.safetensors.index.json", "pytorch_model.bin", "notes.md", "1_Pooling/config.json",
    ):  # fmt: skip
        (source / name).write_text(name)
    copy_companions(source, target)
    found = sorted(str(p.relative_to(target)) for p in target.rglob("*") if p.is_file())
    assert found == ["1_Pooling/config.json", "chat_template.jinja", "merges.txt", "tokenizer.json"]
    with pytest.raises(FormatError, match="is not a folder"):
        copy_companions(tmp_path / "nowhere", target)
