"""What a denoiser works on: images as latents, captions as embeddings, without gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.models.pipeline import component, read_index

Conditions = dict[str, Tensor]
"""Arguments of the denoiser besides the noisy latents and the timestep, for one example."""


@dataclass(frozen=True, eq=False)
class Canvas:
    """The images a pipeline makes, and the space it makes them in.

    latents = (mean of the encoder's law - shift) * scaling for a pipeline with a VAE (`shape` is
    theirs), the pixels in [-1, 1] for one without.
    """

    vae: nn.Module | None
    shape: tuple[int, int, int]
    channels: int
    size: tuple[int, int]

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """uint8 (n, channels, height, width) to float32 (n, *shape)."""
        images = pixels.float() / 127.5 - 1
        if self.vae is None:
            return images
        config: Any = self.vae.config
        images = images.to(next(self.vae.parameters()))
        means = self.vae.encode(images).latent_dist.mode()  # type: ignore[operator]
        return ((means.float() - (config.shift_factor or 0.0)) * config.scaling_factor).cpu()

    @torch.no_grad()
    def pixels(self, latents: Tensor) -> Tensor:
        """float32 (n, *shape) to uint8 (n, channels, height, width)."""
        images = latents.float()
        if self.vae is not None:
            config: Any = self.vae.config
            images = images / config.scaling_factor + (config.shift_factor or 0.0)
            images = self.vae.decode(images.to(next(self.vae.parameters()))).sample  # type: ignore[operator]
        return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def canvas_of(folder: Path, model: Any, resolution: int | None, device: torch.device) -> Canvas:
    """How a pipeline's images look; `resolution` in pixels, the model's own when None.

    Raises:
        BadInput: no resolution is known or it does not fit, or images have neither 1 nor 3
            channels.
    """
    vae, config = component(folder, "vae"), model.config
    if vae is not None:
        vae.to(device).enable_slicing()  # one image at a time: large ones take gigabytes
    factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    own = config.sample_size
    if resolution is None and own is None:
        raise BadInput(f"{folder} does not say the size of its images; give resolution=")
    sides = (own, own) if isinstance(own, int) else tuple(own or ())
    height, width = sides if resolution is None else 2 * (resolution // factor,)
    if resolution is not None and resolution % factor:
        raise BadInput(f"resolution={resolution} is no multiple of {factor}, the VAE's factor")
    channels = config.in_channels if vae is None else vae.config.in_channels
    if channels not in (1, 3):
        raise BadInput(f"{folder} makes images of {channels} channels; want 1 (grey) or 3 (RGB)")
    if config.out_channels != config.in_channels:
        raise BadInput(
            f"{folder}: the denoiser has {config.in_channels} channels in and "
            f"{config.out_channels} out; models that inpaint or learn a variance are not tuned"
        )
    shape = (config.in_channels, height, width)
    return Canvas(vae, shape, channels, (height * factor, width * factor))


@torch.no_grad()
def embed(folder: Path, captions: Sequence[str], device: torch.device) -> dict[str, Conditions]:
    """What a pipeline's text encoders make of each caption; on the CPU, the encoders are dropped.

    Weights are float32 on the CPU, bfloat16 elsewhere.
    """
    import diffusers

    name, kind, _ = read_index(folder)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    texts = {part: component(folder, part, dtype) for part in kind.texts}
    for part in texts.values():
        if isinstance(part, nn.Module):
            part.to(device)
    scheduler = component(folder, "scheduler")
    options: dict[str, Any] = {"scheduler": scheduler, kind.denoiser: None, "vae": None, **texts}
    if name == "StableDiffusionPipeline":
        options |= {"safety_checker": None, "feature_extractor": None}
        options["requires_safety_checker"] = False
    pipeline = getattr(diffusers, name)(**options)
    return {caption: _embedded(pipeline, name, caption, device) for caption in captions}


def _embedded(pipeline: Any, name: str, caption: str, device: torch.device) -> Conditions:
    plain: dict[str, Any] = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    if name == "StableDiffusionPipeline":
        states, _ = pipeline.encode_prompt(caption, device, **plain)
        return {"encoder_hidden_states": states[0].cpu()}
    states, _, pooled, _ = pipeline.encode_prompt(caption, caption, caption, device, **plain)
    return {"encoder_hidden_states": states[0].cpu(), "pooled_projections": pooled[0].cpu()}
