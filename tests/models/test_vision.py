"""Image classifiers as folders. Run: pytest tests/models/test_vision.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from zotune.errors import BadInput, FormatError
from zotune.models import fingerprint, load, write
from zotune.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from zotune.quant import QuantConv2d, QuantLinear
from zotune.quant.formats.tensors import read_json


def seeded_(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(noise + 0.5 if "var" in name else (noise - 0.5) * 0.5)
    return model.eval()


def cifar() -> nn.Module:
    config = CifarResNetConfig(depth=8, width=4, num_labels=3)
    return CifarResNetForImageClassification(config)


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return ResNetForImageClassification(config)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        image_size=32, patch_size=8, num_labels=3,
    )  # fmt: skip
    return ViTForImageClassification(config)


def mobilenet() -> nn.Module:
    from transformers import MobileNetV1Config, MobileNetV1ForImageClassification

    config = MobileNetV1Config(depth_multiplier=0.0625, min_depth=2, image_size=32, num_labels=3)
    return MobileNetV1ForImageClassification(config)


MAKERS = [cifar, resnet, vit, mobilenet]


@pytest.fixture(params=MAKERS, ids=lambda make: make.__name__)
def folder(request: Any, tmp_path: Path) -> Path:
    with torch.random.fork_rng():
        model = seeded_(request.param())
    write(model, tmp_path / "model")
    processor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "model/preprocessor_config.json").write_text(json.dumps(processor))
    return tmp_path / "model"


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    out: torch.Tensor = model(pixels()).logits
    return out


def test_a_folder_of_an_image_classifier_is_one(folder: Path) -> None:
    loaded = load(folder)
    assert (loaded.kind, loaded.format, loaded.tokenizer) == ("vision", "float", None)
    assert logits(loaded.model).shape == (2, 3)


def test_convolutions_are_quantized_and_the_output_layer_is_not(folder: Path) -> None:
    model = load(folder, scheme="int8-channel").model
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d | QuantConv2d)]
    assert convolutions
    assert all(isinstance(m, QuantConv2d) for m in convolutions)
    last = [m for m in model.modules() if isinstance(m, nn.Linear | QuantLinear)][-1]
    assert type(last) is nn.Linear
    exact = logits(load(folder).model)
    assert float((logits(model) - exact).abs().max()) < 0.1 * float(exact.abs().max()) + 1e-3


@pytest.mark.parametrize("scheme", ["int8-channel", "int4-channel-asym", "int8-channel-a8"])
def test_a_quantized_model_comes_back_as_it_was(folder: Path, tmp_path: Path, scheme: str) -> None:
    first = load(folder, scheme=scheme)
    again = load(write(first.model, tmp_path / "quantized", folder))
    assert (again.kind, again.format) == ("vision", "zotune")
    assert fingerprint(again.model) == fingerprint(first.model)
    assert torch.equal(logits(again.model), logits(first.model))
    assert (tmp_path / "quantized/preprocessor_config.json").is_file()


def test_a_layer_that_is_no_layer_is_refused(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        model = seeded_(cifar())
    write(model, tmp_path / "float")
    write(load(tmp_path / "float", scheme="int8-channel").model, tmp_path / "model")
    config = read_json(tmp_path / "model/config.json")
    config["quantization_config"]["modules"].append("bn1")
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"have as linear layers or convolutions: \[bn1\]"):
        load(tmp_path / "model")


def test_a_group_that_fits_no_patch_names_its_layer(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        write(seeded_(cifar()), tmp_path / "model")
    with pytest.raises(BadInput, match="group_size=64 does not divide in_features=27 of 'conv1'"):
        load(tmp_path / "model", scheme="int4-g64")


@pytest.mark.parametrize("depth", [7, 18, 2])
def test_depths_that_are_no_cifar_resnet_are_refused(depth: int) -> None:
    with pytest.raises(BadInput, match=f"depth={depth} is not 6 n"):
        CifarResNetForImageClassification(CifarResNetConfig(depth=depth))


def test_the_cifar_resnet_is_the_papers() -> None:
    """270,000 parameters, and shortcuts without any (He et al. 2015, table 6)."""
    model = CifarResNetForImageClassification(CifarResNetConfig(depth=20))
    assert sum(p.numel() for p in model.parameters()) == 269_722
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 20


def test_hidden_states_are_those_of_the_blocks() -> None:
    with torch.random.fork_rng():
        model = seeded_(cifar())
    out = model(pixels(), output_hidden_states=True)
    assert [tuple(s.shape[1:]) for s in out.hidden_states] == [
        (4, 32, 32), (4, 32, 32), (8, 16, 16), (16, 8, 8),
    ]  # fmt: skip
    means = out.hidden_states[-1].mean((2, 3))
    torch.testing.assert_close(model.classifier(means), out.logits)


def test_a_classifier_may_read_every_state() -> None:
    config = CifarResNetConfig(depth=14, width=4, num_labels=3, head_states="all")
    with torch.random.fork_rng():
        model = seeded_(CifarResNetForImageClassification(config))
    out = model(pixels(), output_hidden_states=True)
    means = torch.cat([state.mean((2, 3)) for state in out.hidden_states], dim=1)
    torch.testing.assert_close(model.classifier(means), out.logits)
    with pytest.raises(BadInput, match="head_states='some'; want 'last' or 'all'"):
        CifarResNetConfig(head_states="some")
