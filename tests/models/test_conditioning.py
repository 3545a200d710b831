"""Latents and embeddings against diffusers' own. Run: pytest tests/models/test_conditioning.py"""

from __future__ import annotations

import json
from pathlib import Path

import pipelines
import pytest
import torch
from diffusers import DiffusionPipeline

from zotune.errors import BadInput
from zotune.models import load
from zotune.models.conditioning import canvas_of, embed

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.sd3(tmp_path_factory.mktemp("sd3") / "pipeline")


def test_captions_are_embedded_as_the_whole_pipeline_does(sd3: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(sd3)
    captions = ["", "a drawing of one", "two"]
    found = embed(sd3, captions, CPU)
    assert list(found) == captions
    for caption, known in found.items():
        with torch.no_grad():
            states, _, pooled, _ = pipeline.encode_prompt(
                caption, caption, caption, do_classifier_free_guidance=False
            )
        assert torch.equal(known["encoder_hidden_states"], states[0])
        assert torch.equal(known["pooled_projections"], pooled[0])
    assert not torch.equal(*(found[c]["pooled_projections"] for c in captions[1:]))


def test_latents_and_pixels_are_the_vaes(sd3: Path) -> None:
    loaded = load(sd3)
    canvas = canvas_of(sd3, loaded.model, None, CPU)
    assert (canvas.shape, canvas.size, canvas.channels) == ((4, 8, 8), (16, 16), 3)
    pixels = torch.arange(2 * 768, dtype=torch.int32).view(2, 3, 16, 16).remainder(256)
    vae = DiffusionPipeline.from_pretrained(sd3).vae
    with torch.no_grad():
        mean = vae.encode(pixels / 127.5 - 1).latent_dist.mode()
        wanted = (mean - 0.06) * 1.5
        latents = canvas.latents(pixels.to(torch.uint8))
        torch.testing.assert_close(latents, wanted)
        image = vae.decode(latents / 1.5 + 0.06).sample
        made = canvas.pixels(latents)
    assert (made - ((image.clamp(-1, 1) + 1) * 127.5)).abs().max() <= 0.51


def test_pixels_are_their_own_latents_without_a_vae(tmp_path: Path) -> None:
    folder = pipelines.ddpm(tmp_path / "ddpm")
    canvas = canvas_of(folder, load(folder).model, None, CPU)
    pixels = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8) * 4
    assert canvas.latents(pixels).min() == -1
    assert torch.equal(canvas.pixels(canvas.latents(pixels)), pixels)


def test_a_resolution_that_does_not_fit_is_refused(sd3: Path, tmp_path: Path) -> None:
    model = load(sd3).model
    assert canvas_of(sd3, model, 24, CPU).shape == (4, 12, 12)
    with pytest.raises(BadInput, match="resolution=25 is no multiple of 2"):
        canvas_of(sd3, model, 25, CPU)
    folder = pipelines.ddpm(tmp_path / "ddpm", pipelines.unet(size=None))  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="does not say the size of its images; give resolution="):
        canvas_of(folder, load(folder).model, None, CPU)


def test_models_with_other_channels_are_refused(tmp_path: Path) -> None:
    folder = pipelines.ddpm(tmp_path / "four", pipelines.unet(channels=4))
    with pytest.raises(BadInput, match="images of 4 channels; want 1"):
        canvas_of(folder, load(folder).model, None, CPU)
    folder = pipelines.ddpm(tmp_path / "variance", pipelines.unet(out_channels=2))
    with pytest.raises(BadInput, match="1 channels in and 2 out"):
        canvas_of(folder, load(folder).model, None, CPU)
    assert json.loads((folder / "unet" / "config.json").read_text())["out_channels"] == 2
