"""Checkpoints of other programs as folders: damage, foreign parts, memory.

Run: pytest tests/quant/test_source.py
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from zotune.errors import BadInput, FormatError
from zotune.quant import QuantLinear, formats, quantize_model_
from zotune.quant.formats import shards
from zotune.quant.formats.shards import entries

GOLDEN = Path(__file__).parent / "golden"
ACT, SHARDED = GOLDEN / "gptq-4bit-asym-act", GOLDEN / "gptq-8bit-sharded"
UP = "model.layers.0.mlp.up_proj"


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target, dirs_exist_ok=True))


def read(folder: Path, **options: Any) -> nn.Module:
    return formats.read(folder, AutoModelForCausalLM, **options)


def edit_header(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "name", ["model-00002-of-00003.safetensors", "model.safetensors.index.json"]
)
def test_a_missing_shard_is_named(tmp_path: Path, name: str) -> None:
    folder = copy(SHARDED, tmp_path)
    (folder / name).unlink()
    with pytest.raises(
        FormatError, match="fetch it again" if "000" in name else "holds no weights"
    ):
        read(folder)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = copy(ACT, tmp_path)
    name = f"{UP}.qzeros"
    edit_header(folder / "model.safetensors", lambda h: h.update({f"{UP}.other": h.pop(name)}))
    with pytest.raises(FormatError, match=f"tensor '{name}' is missing"):
        read(folder)


def test_act_order_without_g_idx_is_refused(tmp_path: Path) -> None:
    folder = copy(ACT, tmp_path)
    name = f"{UP}.g_idx"
    edit_header(folder / "model.safetensors", lambda h: h.update({"unused": h.pop(name)}))
    with pytest.raises(FormatError, match="no g_idx, but the config says desc_act"):
        read(folder)


def test_layers_that_the_model_does_not_have_are_named(tmp_path: Path) -> None:
    folder = copy(ACT, tmp_path)

    def rename(header: dict[str, Any]) -> None:
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            header[f"model.layers.0.gate.{part}"] = header.pop(f"{UP}.{part}")

    edit_header(folder / "model.safetensors", rename)
    with pytest.raises(FormatError, match=r"quantized layers that LlamaForCausalLM .*\.gate"):
        read(folder)


def test_a_config_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = copy(ACT, tmp_path)
    edit_config(folder, lambda c: c.update(intermediate_size=160))
    with pytest.raises(FormatError, match=r"mlp\.\w+_proj.* wanted"):
        read(folder)


def test_a_folder_without_its_quantized_layers_is_refused(tmp_path: Path) -> None:
    folder = copy(ACT, tmp_path)
    read(folder).to(torch.float16)
    (folder / "model.safetensors").unlink()
    from safetensors.torch import save_file

    save_file({"model.norm.weight": torch.ones(64)}, folder / "model.safetensors")
    with pytest.raises(FormatError, match="none of its tensors ends in qweight"):
        read(folder)


def test_tensors_that_the_model_does_not_use_are_kept(tmp_path: Path) -> None:
    folder = copy(ACT, tmp_path / "in")

    def add(header: dict[str, Any]) -> None:
        end = max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
        header["rotary.inv_freq"] = {"dtype": "F32", "shape": [2], "data_offsets": [end, end + 8]}

    edit_header(folder / "model.safetensors", add)
    with (folder / "model.safetensors").open("ab") as file:
        file.write(bytes(range(8)))
    out = formats.write(read(folder), tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@settings(max_examples=150)
@given(data=st.data())
def test_tampered_headers_are_refused_or_read_but_never_crash(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = copy(ACT, tmp_path_factory.mktemp("tampered"))
    wild = st.integers(-(2**63), 2**64) | st.sampled_from((0, 1, 2**31, 2**40))

    def edit(header: dict[str, Any]) -> None:
        name = data.draw(st.sampled_from(sorted(header)))
        kind = data.draw(st.sampled_from(("dtype", "shape", "data_offsets", "name", "all")))
        if kind == "name":
            header[data.draw(st.text(max_size=9) | st.just(f"{UP}.scales"))] = header.pop(name)
        elif kind == "all":
            header[name] = data.draw(st.none() | st.integers() | st.just({}) | st.just([]))
        elif kind == "dtype":
            header[name][kind] = data.draw(st.sampled_from(("F64", "I8", "U16", "F99", "", "C64")))
        else:
            header[name][kind] = data.draw(st.lists(wild, max_size=3))

    edit_header(folder / "model.safetensors", edit)
    try:
        model = read(folder)
    except (FormatError, BadInput):
        return
    assert isinstance(model.get_submodule(UP), QuantLinear)


def test_a_header_that_lies_about_a_tensor_s_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the library let it pass: nothing is allocated by what a header says alone."""
    folder = copy(ACT, tmp_path)
    monkeypatch.setattr(shards, "check_files", lambda folder: [])

    def edit(header: dict[str, Any]) -> None:
        header[f"{UP}.scales"]["shape"] = [2, 2**40]

    edit_header(folder / "model.safetensors", edit)
    with pytest.raises(FormatError, match="has other bytes than its shape"):
        entries(folder)


def test_layers_and_tensors_that_came_later_have_no_place(tmp_path: Path) -> None:
    model = read(ACT)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # no longer tied
    with pytest.raises(BadInput, match=r"\[lm_head.weight\] have no place in"):
        formats.write(model, tmp_path / "out")
    model = read(ACT)
    model.extra = nn.Linear(32, 32)
    quantize_model_(model, "int4-g8", exclude=())
    with pytest.raises(BadInput, match=r"\[extra, extra.bias\] have no place in"):
        formats.write(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_gone_is_said(tmp_path: Path) -> None:
    folder = copy(ACT, tmp_path / "in")
    model = read(folder)
    shutil.rmtree(folder)
    with pytest.raises(FormatError, match="holds no weights"):
        formats.write(model, tmp_path / "out")


def test_weights_of_another_kind_and_hidden_files_stay_behind(tmp_path: Path) -> None:
    folder = copy(ACT, tmp_path / "in")
    for name in ("pytorch_model.bin", "other.safetensors", ".secret", "notes.md"):
        (folder / name).write_text("x")
    out = formats.write(read(folder), tmp_path / "out")
    names = {p.name for p in out.iterdir()}
    assert names == {p.name for p in ACT.iterdir()} | {"notes.md"}


def test_no_file_is_open_and_one_layer_at_a_time_is_decoded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Memory: what is alive beside the model is the tensors of one layer."""
    alive: list[int] = []
    original = shards.Entry.read

    def counted(self: shards.Entry) -> torch.Tensor:
        import weakref

        tensor = original(self)
        alive.append(1)
        weakref.finalize(tensor, alive.pop)
        peak[0] = max(peak[0], len(alive))
        return tensor

    peak = [0]
    monkeypatch.setattr(shards.Entry, "read", counted)
    model = read(ACT)
    floats = sum(1 for _ in model.parameters())
    assert peak[0] <= 4 + floats
    peak[0] = 0
    formats.write(model, tmp_path / "out")
    assert peak[0] <= 4 + floats


@pytest.mark.parametrize(
    ("name", "factor", "said"),
    [("ct-nvfp4a16", 1.02, True), ("ct-nvfp4a16", 1.0, False), ("gptq-4bit-sym", 1.02, False)],
)
def test_coarse_scales_are_said_when_steps_are_lost(
    name: str, factor: float, said: bool, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    model = read(GOLDEN / name)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.scale.mul_(factor)
    formats.write(model, tmp_path / "out")
    assert ("are rounded" in caplog.text) == (factor != 1.0)
    caplog.clear()
    formats.round_to_storage_(model)
    assert ("stores scales coarsely" in caplog.text) == said
    formats.write(model, tmp_path / "out")
    assert "are rounded" not in caplog.text
