"""QZO's step at the shapes of Stable Diffusion 3.5 Large, with random int4 weights.

    python benchmarks/diffusion.py --shapes sd35

The transformer alone (8.06 billion parameters), int4-g64, one 1024 x 1024 image, 333 text tokens,
bfloat16 activations: what a run holds once latents and embeddings are cached and the encoders are
gone. Without a GPU it says what the model would take, and measures nothing.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Row
from zotune import methods
from zotune.core.evaluator import TorchEvaluator
from zotune.core.spaces import get
from zotune.core.step import Tuner
from zotune.quant import QuantLinear, Scheme
from zotune.quant.model import float_layers, replace_
from zotune.tasks.batch import Batch
from zotune.tasks.sampling import run

LARGE: dict[str, Any] = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 38,
    "attention_head_dim": 64, "num_attention_heads": 38, "joint_attention_dim": 4096,
    "caption_projection_dim": 2432, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}  # fmt: skip
SCHEME = Scheme.parse("int4-g64")
TOKENS = 333
LIMIT = 24.0  # GB
STEPS = 3


def rows(sizes: dict[str, Any]) -> list[Row]:
    """Bytes of the model; on a GPU also peak memory and seconds of QZO's step."""
    model = random_model(sizes, "meta")
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) / 1e9
    found = [Row("SD 3.5 Large, int4-g64: the transformer's tensors", held, "GB")]
    name = "SD 3.5 Large: peak memory of a QZO step, both probes stacked"
    if not torch.cuda.is_available():
        return [*found, Row(name, None, "GB", "no GPU here; needs one of 24 GB", LIMIT)]
    seconds = steps(random_model(sizes, "cuda"), sizes, "cuda")
    peak = torch.cuda.max_memory_allocated() / 1e9
    return [*found, Row(name, peak, "GB", None, LIMIT), Row("SD 3.5 Large: a step", seconds, "s")]


def random_model(sizes: dict[str, Any], device: str) -> nn.Module:
    """The transformer with codes at random; float tensors are made layer by layer on the device."""
    from accelerate import init_empty_weights
    from diffusers import SD3Transformer2DModel

    with init_empty_weights(include_buffers=False):
        model: nn.Module = SD3Transformer2DModel(**sizes)
    linears = [(name, m) for name, m in float_layers(model) if isinstance(m, nn.Linear)]
    for name, old in linears:
        layer = QuantLinear(
            old.in_features, old.out_features, SCHEME, bias=old.bias is not None, name=name,
            dtype=torch.bfloat16, device=device,
        )  # fmt: skip
        if device != "meta":
            layer.codes.random_(0, 256)
            layer.scale.fill_(0.2 * old.in_features**-0.5)
        replace_(model, name, layer)
    for module in model.modules():
        for name, tensor in list(module.named_parameters(recurse=False)):
            if tensor.is_meta and device != "meta":
                values = torch.ones(tensor.shape, dtype=torch.bfloat16, device=device)
                setattr(module, name, nn.Parameter(values if tensor.dim() == 1 else 0.02 * values))
    return model.to(device) if device != "meta" else model


def steps(model: nn.Module, sizes: dict[str, Any], device: str) -> float:
    """Seconds of a step, the first one left out."""
    draw = torch.Generator().manual_seed(0)
    side, wide = sizes["sample_size"], sizes["joint_attention_dim"]
    tensors = {
        "noisy": torch.randn(1, sizes["in_channels"], side, side, generator=draw),
        "target": torch.randn(1, sizes["in_channels"], side, side, generator=draw),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, TOKENS, wide, generator=draw),
        "pooled_projections": torch.randn(1, sizes["pooled_projection_dim"], generator=draw),
    }
    batch = Batch(tensors, 1).to(device)

    def losses(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        known = {n: batch[n] for n in ("encoder_hidden_states", "pooled_projections")}
        made = run(model, batch["noisy"], batch["timestep"], known)
        loss = (made - batch["target"]).square().flatten(1).mean(1)
        return loss, torch.ones_like(loss)

    space = get("scales").build(model)
    tuner = Tuner(space, methods.parse("qzo"), 0, evaluator=TorchEvaluator(model, space, losses),
                  total=STEPS + 1)  # fmt: skip
    began = 0.0
    for step in range(STEPS + 1):
        if step == 1:
            began = time.perf_counter()
        tuner.step(batch)
    return (time.perf_counter() - began) / STEPS
