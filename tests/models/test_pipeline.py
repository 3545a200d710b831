"""Diffusers pipelines as models. Run: pytest tests/models/test_pipeline.py"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pipelines
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from zotune.core.noise import Key
from zotune.core.spaces import get
from zotune.errors import BadInput, FormatError
from zotune.models import fingerprint, load
from zotune.models.pipeline import Denoiser, component, model_folder
from zotune.quant import QuantLinear, formats
from zotune.quant.formats.shards import entries, raw_bytes
from zotune.training import write_model

GOLDEN = Path(__file__).parent / "golden"
NF4 = GOLDEN / "sd3-nf4"


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.sd3(tmp_path_factory.mktemp("sd3") / "pipeline")


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.ddpm(tmp_path_factory.mktemp("ddpm") / "pipeline")


def files(folder: Path, but: str) -> dict[str, bytes]:
    found = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {str(name): data for name, data in found.items() if name.parts[0] != but}


def move_(model: nn.Module, space: str, **options: Any) -> list[str]:
    """Move every number of a space by a tenth of its block's unit; the blocks' names."""
    blocks = list(get(space, **options).build(model))
    for block in blocks:
        step = 0.1 * torch.as_tensor(block.unit).expand(block.shape)
        block.move_(0, block.shape[0], step, Key(0))
    return [block.name for block in blocks]


@pytest.mark.parametrize("scheme", [None, "int4-g8", "int8-channel"])
def test_untouched_components_come_back_byte_for_byte(
    sd3: Path, tmp_path: Path, scheme: str | None
) -> None:
    loaded = load(sd3, scheme=scheme)
    move_(loaded.model, "scales" if scheme else "norms")
    write_model(loaded.model, tmp_path / "out", loaded)
    assert files(tmp_path / "out", "transformer") == files(sd3, "transformer")
    again = load(tmp_path / "out")
    assert again.format == ("zotune" if scheme else "float")
    assert fingerprint(again.model) == fingerprint(loaded.model)


def test_diffusers_loads_a_tuned_float_pipeline(sd3: Path, tmp_path: Path) -> None:
    loaded = load(sd3)
    move_(loaded.model, "norms")
    write_model(loaded.model, tmp_path / "out", loaded)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert fingerprint(pipeline.transformer) == fingerprint(loaded.model)
    assert fingerprint(pipeline.transformer) != fingerprint(load(sd3).model)


def test_an_unconditional_pipeline_is_read_quantized_and_written(
    ddpm: Path, tmp_path: Path
) -> None:
    loaded = load(ddpm, scheme="int4-g4")
    layers = [m for m in loaded.model.modules() if isinstance(m, QuantLinear)]
    floats = [m for m in loaded.model.modules() if isinstance(m, nn.Conv2d)]
    assert layers
    assert floats  # convolutions stay as they are
    assert not any(type(m) is nn.Linear for m in loaded.model.modules())
    write_model(loaded.model, tmp_path / "out", loaded)
    again = load(tmp_path / "out")
    x, t = torch.ones(2, 1, 8, 8), torch.tensor([3, 50])
    with torch.no_grad():
        assert torch.equal(again.model(x, t).sample, loaded.model(x, t).sample)


def test_a_transformer_in_nf4_computes_what_its_library_does() -> None:
    model = formats.read(NF4, Denoiser(diffusers.SD3Transformer2DModel), dtype=torch.float32)
    given = load_file(GOLDEN / "sd3-nf4.expected")
    wanted = given.pop("made")
    with torch.no_grad():
        made = model(**given, return_dict=False)[0]
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 18
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=1e-5)


def test_nf4_goes_back_into_its_own_file_where_only_scales_differ(
    sd3: Path, tmp_path: Path
) -> None:
    pipeline = tmp_path / "nf4"
    shutil.copytree(sd3, pipeline)
    shutil.rmtree(pipeline / "transformer")
    shutil.copytree(NF4, pipeline / "transformer")
    loaded = load(pipeline)
    write_model(loaded.model, tmp_path / "same", loaded)
    assert files(tmp_path / "same", "") == files(pipeline, "")
    move_(loaded.model, "scales")
    write_model(loaded.model, tmp_path / "tuned", loaded)
    old, new = (entries(p / "transformer") for p in (pipeline, tmp_path / "tuned"))
    changed = {
        n for n in old if not torch.equal(raw_bytes(old[n].read()), raw_bytes(new[n].read()))
    }
    assert changed
    assert all(name.endswith(".absmax") for name in changed)
    assert files(tmp_path / "tuned", "transformer") == files(pipeline, "transformer")


def test_an_adapter_lies_beside_the_pipeline_and_peft_loads_it(ddpm: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    from zotune.training import load_model

    loaded = load(ddpm)
    names = move_(loaded.model, "lora", rank=2)
    assert {name.split(".")[-2] for name in names} == {"to_q", "to_v"}
    write_model(loaded.model, tmp_path / "out", loaded)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (ddpm / weights).read_bytes()
    assert str(tmp_path) not in (tmp_path / "out" / "unet" / "config.json").read_text()
    x, t = torch.ones(2, 1, 8, 8), torch.tensor([3, 50])
    with torch.no_grad():
        wanted = loaded.model(x, t).sample
        assert torch.equal(load_model(tmp_path / "out").model(x, t).sample, wanted)
        other: Any = PeftModel.from_pretrained(load(ddpm).model, tmp_path / "out" / "adapter")
        torch.testing.assert_close(other(x, t).sample, wanted)


def test_a_folder_that_is_no_pipeline_is_its_own_model_folder(tmp_path: Path, ddpm: Path) -> None:
    assert model_folder(tmp_path) == tmp_path
    assert model_folder(ddpm) == ddpm / "unet"
    assert component(ddpm, "vae") is None


def spoiled(ddpm: Path, folder: Path, **change: Any) -> Path:
    shutil.copytree(ddpm, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **change}))
    return folder


def test_what_cannot_be_read_is_named(ddpm: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is a FluxPipeline; of diffusers' pipelines DDPMPipeline"):
        load(spoiled(ddpm, tmp_path / "flux", _class_name="FluxPipeline"))
    with pytest.raises(FormatError, match=r"components unet are not classes .* code from a"):
        load(spoiled(ddpm, tmp_path / "code", unet=["unet_code", "MyUNet"]))
    with pytest.raises(FormatError, match="diffusers has no NoModel"):
        load(spoiled(ddpm, tmp_path / "unknown", unet=["diffusers", "NoModel"]))
    with pytest.raises(FormatError, match="without its 'unet'"):
        load(spoiled(ddpm, tmp_path / "less", unet=[None, None]))
    loaded = load(ddpm, scheme="int4-g4")
    write_model(loaded.model, tmp_path / "int4", loaded)
    with pytest.raises(BadInput, match="already quantized"):
        load(tmp_path / "int4", scheme="int4-g4")


def test_weights_that_are_a_pickle_or_cut_off_are_refused(ddpm: Path, tmp_path: Path) -> None:
    pickled = spoiled(ddpm, tmp_path / "pickled")
    weights = pickled / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(FormatError, match="only as pickles"):
        load(pickled)
    cut = spoiled(ddpm, tmp_path / "cut")
    weights = cut / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(FormatError, match="not a whole safetensors file"):
        load(cut)
    less = spoiled(ddpm, tmp_path / "fewer")
    weights = less / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors.pop("conv_in.weight")
    save_file(tensors, weights)
    with pytest.raises(FormatError, match=r"conv_in\.weight"):
        load(less)
