"""Llama-2-13B's shapes on one GPU, random weights: memory, and a step beside its own forwards.

    python benchmarks/gpu.py

Contenders: zotune's qzo on int4-g128 scales and mezo on bf16 weights; two plain and two recorded
forwards (CUDA graphs) of the int4 model; MeZO's step on bf16 weights as released, restated. One
process, a few minutes; weights are made on the device layer by layer. Where there is no CUDA
nothing is measured and nothing is written; --tiny goes through the same code at tiny shapes, on
any device, and writes nothing either.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Rounds, Row, Work, begin, interleave, parser, report
from zotune import methods
from zotune.bench import report as reports
from zotune.bench.restated import MeZO
from zotune.core import spaces
from zotune.core.evaluator import TorchEvaluator
from zotune.core.graphs import Cuda
from zotune.core.method import Method
from zotune.core.step import Tuner
from zotune.quant import QuantLinear, Scheme
from zotune.tasks.batch import Batch

SHAPE = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
         "num_attention_heads": 40, "vocab_size": 32000}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 16}  # fmt: skip
SCHEME, TINY_SCHEME = "int4-g128", "int4-g64"
PEAK, OVER_FORWARDS, OVER_MEZO = 8.5, 1.05, 2.0
STEP, DENSE, MEZO = "qzo int4", "mezo bf16", "MeZO bf16 restated"
PLAIN, RECORDED = "two forwards int4, plain", "two forwards int4, recorded"


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    flags = parser(__doc__, batch=1, length=256, rounds=7, calls=3, warmup=4)
    flags.add_argument(
        "--tiny", action="store_true", help="tiny shapes, any device, no result file"
    )
    return flags.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    given = options(words)
    begin(given)
    if not given.tiny and not torch.cuda.is_available():
        raise SystemExit("gpu: this machine has no CUDA GPU; nothing was measured or written")
    found = measure(given)
    if given.tiny:
        reports.show(reports.document("gpu, tiny", found.rows(given), {}, {}))
        print("tiny shapes: nothing was written")
        return
    report(
        "gpu", found.rows(given), given,
        seconds_per_round=found.rounds.seconds, failures=found.failures, **found.facts,
    )  # fmt: skip


@dataclass
class Found:
    """What was measured. gib: peak of allocated memory. difference: of the step's losses from
    those of the generic forward, relative to how far apart they are from each other."""

    rounds: Rounds
    gib: float | None = None
    difference: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def rows(self, given: argparse.Namespace) -> list[Row]:
        size, ratio = f"batch {given.batch} x {given.length}", self.rounds.ratio
        names = (STEP, RECORDED, PLAIN, DENSE, MEZO)
        return [
            Row(f"{STEP}: peak, {size}", self.gib, "GiB", None, PEAK),
            Row(f"{STEP} / forwards", ratio(STEP, RECORDED), "x", RECORDED, OVER_FORWARDS),
            Row(f"{STEP} / plain forwards", ratio(STEP, PLAIN), "x", PLAIN),
            Row(f"MeZO / {STEP}", ratio(MEZO, STEP), "x", MEZO, OVER_MEZO, at_least=True),
            Row(f"MeZO / {DENSE}", ratio(MEZO, DENSE), "x", MEZO),
            *(Row(f"{name}, seconds", self.rounds.median(name), "s") for name in names),
            Row("losses off the generic forward's", self.difference, "x", "their spread"),
        ]


def measure(given: argparse.Namespace) -> Found:
    """Everything, in one process: memory first, while there is nothing but the int4 model."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = tokens(given, device)
    found = Found(Rounds({}))
    works: dict[str, Work] = {}
    quantized = llama(given.tiny, device, int4=True)
    tuner = tuned(quantized, "qzo", "scales")
    found.gib = peak(lambda: tuner.step(batch), given.warmup, device)
    found.difference = difference(tuner, quantized, batch)
    works[STEP] = lambda: tuner.step(batch)
    works[PLAIN] = lambda: (float(forward(quantized, batch)), float(forward(quantized, batch)))
    for name, make in (
        (RECORDED, lambda: recorded(quantized, batch, device)),
        (DENSE, lambda: dense(given, device, batch)),
        (MEZO, lambda: mezo(given, device, batch)),
    ):
        try:
            works[name] = make()
        except (torch.OutOfMemoryError, RuntimeError) as error:
            found.failures[name] = str(error).split("\n")[0]
    timed = {name: finished(work, device) for name, work in works.items()}
    found.rounds = interleave(timed, rounds=given.rounds, calls=given.calls, warmup=given.warmup)
    found.facts = facts(tuner, device)
    return found


def tokens(given: argparse.Namespace, device: torch.device) -> Batch:
    """Random tokens, no padding."""
    vocabulary = (TINY if given.tiny else SHAPE)["vocab_size"]
    shape, generator = (given.batch, given.length), torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, shape, generator=generator)
    return Batch({"input_ids": ids}, given.batch).to(device)


def llama(tiny: bool, device: torch.device, int4: bool) -> nn.Module:
    """A causal Llama of random weights, bf16 but for its quantized layers, one tensor at a time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = TINY if tiny else SHAPE
    config = LlamaConfig(**shape, max_position_embeddings=4096, use_cache=False)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    generator = torch.Generator(device).manual_seed(0)
    for name, module in list(model.named_modules()):
        if int4 and isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(
                model.get_submodule(parent), child, random_layer(module, tiny, device, generator)
            )
            continue
        for key, parameter in module.named_parameters(recurse=False):
            setattr(module, key, nn.Parameter(random_values(parameter, device, generator), False))
    model.tie_weights()
    return model.requires_grad_(False).eval()  # type: ignore[no-any-return]


def random_values(like: Tensor, device: torch.device, generator: torch.Generator) -> Tensor:
    """N(0, 1 / width) for matrices, ones for gains."""
    value = torch.ones(like.shape, dtype=like.dtype, device=device)
    if like.dim() < 2:
        return value
    return value.normal_(0.0, like.shape[1] ** -0.5, generator=generator)


def random_layer(
    module: nn.Linear, tiny: bool, device: torch.device, generator: torch.Generator
) -> QuantLinear:
    """Codes uniform over their range; scales give outputs the variance of inputs."""
    scheme = Scheme.parse(TINY_SCHEME if tiny else SCHEME)
    layer = QuantLinear(module.in_features, module.out_features, scheme, bias=False, device=device)
    layer.codes.random_(0, 256, generator=generator)
    layer.scale.uniform_(0.5, 1.5, generator=generator).mul_(module.in_features**-0.5 / 4.6)
    return layer


def losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean loss of the next token of every row."""
    ids = batch["input_ids"]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    loss = loss.view(len(ids), -1).mean(1)
    return loss, torch.ones_like(loss)


@torch.no_grad()
def forward(model: nn.Module, batch: Batch) -> Tensor:
    return losses(model, batch)[0].mean()


def tuned(model: nn.Module, method: str, space: str) -> Tuner:
    chosen = methods.get(method)
    assert isinstance(chosen, Method)
    built = spaces.parse(space).build(model)
    return Tuner(built, chosen, 0, evaluator=TorchEvaluator(model, built, losses), total=1 << 20)


def dense(given: argparse.Namespace, device: torch.device, batch: Batch) -> Work:
    tuner = tuned(llama(given.tiny, device, int4=False), "mezo", "weights")
    return lambda: tuner.step(batch)


def mezo(given: argparse.Namespace, device: torch.device, batch: Batch) -> Work:
    model = llama(given.tiny, device, int4=False)
    return MeZO(model, lambda: forward(model, batch)).step


def recorded(model: nn.Module, batch: Batch, device: torch.device) -> Work:
    """Two replays of one plain forward: the floor of a step of two probes."""
    if device.type != "cuda":
        raise RuntimeError("no CUDA graphs on this device")
    forward(model, batch)
    replay, loss = Cuda()(lambda: (forward(model, batch), torch.ones(1, device=device)))

    def twice() -> None:
        for _ in range(2):
            replay()
            float(loss[0])

    return twice


def finished(work: Work, device: torch.device) -> Work:
    """Work, waited for."""

    def timed() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return timed


def peak(work: Work, steps: int, device: torch.device) -> float | None:
    """GiB allocated at most, model included, while a few steps run, recordings included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        work()
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None


def difference(tuner: Tuner, model: nn.Module, batch: Batch) -> float:
    """How far this step's losses lie from those of the generic forward, over their own spread."""
    assert isinstance(tuner.evaluator, TorchEvaluator)
    generic = TorchEvaluator(model, tuner.space, losses, fast=False)
    probes, law = tuner.ask(), tuner.now.perturbation
    a, b = (e.losses(probes, batch, law).mean for e in (tuner.evaluator, generic))
    return float((a - b).abs().max() / (b.max() - b.min()).clamp_min(1e-30))


def facts(tuner: Tuner, device: torch.device) -> dict[str, Any]:
    """The GPU, and whether forwards and updates were replayed from recordings."""
    import triton

    assert isinstance(tuner.evaluator, TorchEvaluator)
    graphs = tuner.evaluator.graphs
    name = torch.cuda.get_device_name() if device.type == "cuda" else "none"
    return {
        "gpu": {"name": name, "cuda": torch.version.cuda, "triton": triton.__version__},
        "recorded": {
            "forwards": 0 if graphs is None else graphs.replayed,
            "forwards_off": "no GPU" if graphs is None else graphs.off,
            "updates": tuner.moves.sweeps.replayed,
        },
    }


if __name__ == "__main__":
    main()
