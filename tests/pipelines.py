"""Tiny diffusers pipelines with seeded weights, made from the library's own classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import toys

WORDS = ("a", "drawing", "of", "zero", "one", "two", "three")


def unet(channels: int = 1, size: int = 8, **options: Any) -> Any:
    """An unconditional U-Net with attention, convolutions and group norms."""
    from diffusers import UNet2DModel

    settings = {
        "sample_size": size, "in_channels": channels, "out_channels": channels,
        "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "attention_head_dim": 8, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), **options,
    }  # fmt: skip
    return _seeded(lambda: UNet2DModel(**settings))


def ddpm(folder: Path, model: Any = None, **scheduler: Any) -> Path:
    """A DDPM pipeline of grey 8 x 8 images."""
    from diffusers import DDPMPipeline, DDPMScheduler

    settings = {"num_train_timesteps": 100, **scheduler}
    DDPMPipeline(model or unet(), DDPMScheduler(**settings)).save_pretrained(folder)
    return folder


def sd3(folder: Path) -> Path:
    """A Stable Diffusion 3 pipeline: 16 x 16 RGB images, 8 x 8 latents, three text encoders."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    transformer = _seeded(
        lambda: SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
            attention_head_dim=8, num_attention_heads=2, joint_attention_dim=32,
            caption_projection_dim=16, pooled_projection_dim=48, pos_embed_max_size=8,
            qk_norm="rms_norm", dual_attention_layers=(0,),
        )
    )  # fmt: skip
    vae = _seeded(
        lambda: AutoencoderKL(
            block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, shift_factor=0.06,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False,
        )
    )  # fmt: skip
    parts = texts(folder.parent)
    StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, **parts
    ).save_pretrained(folder)
    return folder


def texts(folder: Path) -> dict[str, Any]:
    """Two CLIP text encoders and a T5 with one vocabulary of words."""
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        T5Config,
        T5EncoderModel,
    )

    def clip(width: int) -> Any:
        config = CLIPTextConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=77, projection_dim=width,
            bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        return _seeded(lambda: CLIPTextModelWithProjection(config))

    config = T5Config(
        vocab_size=64, d_model=32, d_ff=16, d_kv=8, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return {
        "text_encoder": clip(16), "tokenizer": clip_tokenizer(folder),
        "text_encoder_2": clip(32), "tokenizer_2": clip_tokenizer(folder),
        "text_encoder_3": _seeded(lambda: T5EncoderModel(config)), "tokenizer_3": t5_tokenizer(),
    }  # fmt: skip


def clip_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    letters = sorted({letter for word in WORDS for letter in word})
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{x}</w>" for x in letters)]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"),
                         model_max_length=77)  # fmt: skip


def t5_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {t: i for i, t in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def images(
    folder: Path, count: int = 12, size: int = 8, mode: str = "L", captions: Sequence[str] = ()
) -> Path:
    """Bright squares at places that vary, saved as PNG; captions go into metadata.jsonl."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        shape = (size, size) if mode == "L" else (size, size, 3)
        pixels = np.full(shape, 20 + i, np.uint8)
        pixels[i % size : i % size + size // 2, : size // 2] = 220 - i
        Image.fromarray(pixels, mode=mode).save(folder / f"{i:03d}.png")
        if captions:
            row = {"file_name": f"{i:03d}.png", "text": captions[i % len(captions)]}
            lines.append(json.dumps(row))
    if lines:
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def _seeded(make: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        return toys.fill_(make(), 0)
