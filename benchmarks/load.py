"""Loading and running a checkpoint of every format that is written here: time and memory.

    python benchmarks/load.py                    # a random Llama of 1.04 B parameters
    python benchmarks/load.py --layers 2         # a smaller one

Every checkpoint is made on the spot of random codes, layer by layer, never of float weights, so
that making it takes its own size. Loading is measured in a process of its own, from what the
imports left until every tensor was read once; beside it the same by transformers, with the
format's library where that is installed here. A forward of one text is timed in turn with that of
the same model dequantized to bfloat16. Target: memory while loading is at most 1.2 times the
checkpoint (and one shard, of which these have only one: it is left out).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

from benchmarks.harness import Row, begin, interleave, measured_apart, parser, report
from zotune.bench.process import resident
from zotune.training.memory import peak_bytes, reset_peak

OVER_CHECKPOINT = 1.2
SCHEMES = {
    "zotune": "int4-g128", "gptq": "int4-g128", "compressed-tensors": "int4-g128",
    "compressed-tensors w8a8": "int8-channel-a8", "gguf": "int4-g32", "gguf q8_0": "int8-g32",
}  # fmt: skip
SIZES = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}  # fmt: skip


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    flags = parser(__doc__, layers=16, tokens=32, rounds=3)
    flags.add_argument("--only", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    flags.add_argument("--measure", choices=("make", "ours", "peer", "forward"))
    flags.add_argument("--folder", type=Path, help="of --measure")
    return flags.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    given = options(words)
    begin(given)
    if given.measure:
        work: dict[str, Callable[[argparse.Namespace], Any]] = {
            "make": make, "ours": ours, "peer": peer, "forward": forward,
        }  # fmt: skip
        print(json.dumps(work[given.measure](given)))
        return
    rows: list[Row] = []
    details: dict[str, Any] = {}
    for name in given.only:
        details[name] = measured(name, given)
        rows += rows_of(name, details[name])
        report("load", rows, given, measured=details)  # a killed run keeps what it has


def measured(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Everything about one checkpoint; a failure is its last line."""
    scratch = Path(tempfile.mkdtemp(prefix="load-"))
    found: dict[str, Any] = {}
    try:
        for what in ("make", "ours", "peer", "forward"):
            words = ["--measure", what, "--only", name, "--folder", str(scratch / "checkpoint")]
            for key in ("layers", "tokens", "rounds", "threads"):
                words += [f"--{key}", str(getattr(given, key))]
            try:
                found[what] = measured_apart("benchmarks.load", words, 3600)
            except RuntimeError as error:
                found[what] = {"failed": str(error).strip().splitlines()[-1][-200:]}
    finally:
        shutil.rmtree(scratch)
    return found


def rows_of(name: str, found: dict[str, Any]) -> list[Row]:
    size = found["make"].get("bytes")
    mine, other, times = found["ours"], found["peer"], found["forward"]
    words = None if size is None else f"the checkpoint: {size / 1e6:,.0f} MB"
    over = mine["peak"] / size if size and "peak" in mine else None
    rows = [Row(f"{name}: memory while loading", over, "x", words, OVER_CHECKPOINT)]
    if "peak" in other and size:
        rows.append(Row(f"{name}: the same by transformers", other["peak"] / size, "x", words))
    rows.append(Row(f"{name}: time to load", mine.get("seconds"), "s"))
    rows.append(Row(f"{name}: the same by transformers", other.get("seconds"), "s"))
    base = f"dequantized bf16: {times['bf16']:.3g} s" if "bf16" in times else "dequantized bf16"
    rows.append(Row(f"{name}: a forward", times.get("ratio"), "x", base))
    return rows


def make(given: argparse.Namespace) -> dict[str, Any]:
    """Write the checkpoint; its size."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from zotune.quant import Scheme
    from zotune.quant.export import export_, exporter
    from zotune.quant.formats.build import empty_model

    name = given.only[0]
    scheme = Scheme.parse(SCHEMES[name])
    config = LlamaConfig(num_hidden_layers=given.layers, **SIZES)
    model = empty_model(config, AutoModelForCausalLM, [], trust_remote_code=False)
    generator = torch.Generator().manual_seed(0)
    fill_(model, scheme, generator)
    target = exporter(name.split()[0], scheme)
    for layer in quantized(model):
        layer.scale_dtype = target.scale_dtype(torch.bfloat16)
    export_(model, given.folder, target)
    files = [p for p in given.folder.iterdir() if p.suffix in (".safetensors", ".gguf")]
    return {"bytes": sum(p.stat().st_size for p in files), "files": len(files)}


def fill_(model: nn.Module, scheme: Any, generator: torch.Generator) -> None:
    """Random codes for every linear layer but the output's, random bfloat16 for the rest."""
    from zotune.quant.linear import QuantLinear
    from zotune.quant.model import replace_

    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            rows, columns = module.weight.shape
            layer = QuantLinear(columns, rows, scheme, bias=False)
            codes = torch.randint(
                scheme.lowest, scheme.highest + 1, (rows, columns), dtype=torch.int8,
                generator=generator,
            )  # fmt: skip
            layer.set_codes_(codes)
            layer.scale.fill_(columns**-0.5 / 2 ** (scheme.bits - 1))
            replace_(model, name, layer)
    for name, parameter in list(model.named_parameters()):
        value = torch.ones(parameter.shape, dtype=torch.bfloat16)
        if value.dim() > 1:
            value = torch.randn(value.shape, generator=generator).bfloat16()
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))
    model.tie_weights()  # type: ignore[operator]


def quantized(model: nn.Module) -> list[Any]:
    from zotune.quant.linear import QuantLinear

    return [module for module in model.modules() if isinstance(module, QuantLinear)]


def ours(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds, and bytes above what was there before."""
    from transformers import AutoModelForCausalLM

    from zotune.quant import formats

    return timed(lambda: formats.read(given.folder, AutoModelForCausalLM, dtype=torch.bfloat16))


def peer(given: argparse.Namespace) -> dict[str, Any]:
    """The same by transformers, which dequantizes GGUF."""
    from transformers import AutoModelForCausalLM

    name = given.only[0].split()[0]
    if name == "zotune":
        return {"failed": "nothing else reads it"}
    more = {"gguf_file": "model.gguf"} if name == "gguf" else {}
    return timed(
        lambda: AutoModelForCausalLM.from_pretrained(given.folder, dtype=torch.bfloat16, **more)
    )


def timed(load: Callable[[], Any]) -> dict[str, Any]:
    warm()
    before = resident()
    reset_peak("cpu")
    began = time.perf_counter()
    model = load()
    for tensor in model.state_dict().values():  # what is mapped is not loaded before it is read
        tensor.flatten().view(torch.uint8).amax()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak": peak_bytes() - before}


def warm() -> None:
    """Import what loading imports, by loading a tiny float model both ways."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from zotune.quant import formats, kernels
    from zotune.quant.formats.build import empty_model
    from zotune.quant.formats.gguf_file import ggml_types

    kernels.kernel("cpu")
    ggml_types()
    tiny = {**SIZES, "hidden_size": 64, "intermediate_size": 64, "head_dim": 2, "vocab_size": 8}
    config = LlamaConfig(num_hidden_layers=1, **tiny)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(folder)
        formats.read(folder, AutoModelForCausalLM)
    empty_model(config, AutoModelForCausalLM, [], trust_remote_code=False)


def forward(given: argparse.Namespace) -> dict[str, Any]:
    """A forward of one text, quantized and dequantized, in turn."""
    from transformers import AutoModelForCausalLM

    from zotune.models.load import set_compute_dtype_
    from zotune.quant import formats

    model = formats.read(given.folder, AutoModelForCausalLM, dtype=torch.bfloat16)
    set_compute_dtype_(model, "bfloat16")
    layers = {n: m for n, m in model.named_modules() if m in set(quantized(model))}
    plain = {n: dense(m) for n, m in layers.items()}
    ids = torch.randint(0, SIZES["vocab_size"], (1, given.tokens))

    def run(chosen: dict[str, nn.Module]) -> Callable[[], object]:
        def work() -> object:
            for name, module in chosen.items():
                model.set_submodule(name, module)
            with torch.no_grad():
                return model(ids, use_cache=False)

        return work

    rounds = interleave(
        {"quantized": run(layers), "bf16": run(plain)}, rounds=given.rounds, calls=1, warmup=1
    )
    found = {name: rounds.median(name) for name in ("quantized", "bf16")}
    return {**found, "ratio": rounds.ratio("quantized", "bf16")}


def dense(layer: Any) -> nn.Module:
    """The layer with its weight in bfloat16."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(layer.dequantize().bfloat16(), requires_grad=False)
    return linear


if __name__ == "__main__":
    main()
