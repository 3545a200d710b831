"""Quantize and export here, load the result in the format's own software, compare logits.

    pip install compressed-tensors==0.20.0 gptqmodel==7.7.0 gguf==0.19.0 llama-cpp-python==0.3.36
    PYTHONPATH=. python benchmarks/interop/exported.py [compressed-tensors gptq gguf] [--model F]

A tiny Llama (or the folder given), quantized by AWQ and GPTQ on random tokens, or rotated and put
through ZeroQAT's search, goes into every format; its logits are computed by zotune from the files,
and by the library: compressed-tensors decompresses through transformers, GPTQModel dequantizes with
float32 scales, llama.cpp runs the GGUF file, rounding activations to 8 bits wherever a matrix is
quantized. Rounded activations make a model chaotic: the last bit of a number that lies between two
codes moves it by a whole step, and those above it by more. So with 4 bits, where logits tell
little, every layer is compared on the inputs that it has in the library's model. What is not
installed is written down as such. Writes benchmarks/interop/exported.json,
row by row; rows of formats that are not asked for stay.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "4")

import tiny
import torch
from torch import Tensor

from zotune.models import load
from zotune.quant import Scheme
from zotune.quant.calibrate import calibrate_, recipe
from zotune.quant.export import export_, exporter
from zotune.quant.qat import quantize_, search
from zotune.training.preparation import Preparation, fake_

CASES = [
    ("compressed-tensors", "int4-g32"), ("compressed-tensors", "int4-g32-asym"),
    ("compressed-tensors", "int8-channel"), ("compressed-tensors", "int8-channel-a8"),
    ("compressed-tensors", "int8-channel-a8", "zeroqat"),
    ("compressed-tensors", "int4-channel-a4", "zeroqat"),
    ("compressed-tensors", "int4-channel-a4asym", "zeroqat"),
    ("compressed-tensors", "int8-channel-a8asym"),
    ("gptq", "int4-g32"), ("gptq_v2", "int4-g32-asym"), ("gptq", "int8-channel"),
    ("gptq_v2", "int2-g32-asym"), ("gptq_v2", "int3-g32-asym"),
    ("gguf", "int8-g32"), ("gguf", "int4-g32"), ("gguf", "int4-g32-asym"), ("gguf", "int5-g32"),
    ("gguf", "int5-g32-asym"), ("gguf", "int4-g32", "zeroqat"),
]  # fmt: skip
PACKAGES = (
    "torch", "transformers", "compressed-tensors", "gptqmodel", "gguf", "llama-cpp-python",
)  # fmt: skip
ROUNDED = {None: 1e-4, 8: 0.05}  # of the largest logit, where the library rounds activations
ALONE = 1e-6  # of a layer's largest output


def main() -> None:
    flags = argparse.ArgumentParser(description="Export, load elsewhere, compare.")
    flags.add_argument("formats", nargs="*", default=sorted(LIBRARIES))
    flags.add_argument("--model", type=Path, help="a float folder; a tiny Llama when left out")
    given = flags.parse_args()
    path = Path(__file__).with_suffix(".json")
    before = json.loads(path.read_text()) if path.exists() else {"versions": {}, "rows": []}
    chosen = [case for case in CASES if case[0].removesuffix("_v2") in given.formats]
    rows = [r for r in before["rows"] if r["format"].removesuffix("_v2") not in given.formats]
    for to, scheme, *method in chosen:
        row: dict[str, Any] = {"format": to, "scheme": scheme, "method": (*method, "awq + gptq")[0]}
        try:
            with tempfile.TemporaryDirectory() as scratch:
                row |= compare(given.model, to, scheme, row["method"], Path(scratch))
        except ImportError as error:
            row["not_run"] = str(error)
        print(row, flush=True)
        rows.append(row)
        versions = {p: installed(p) or before["versions"].get(p) for p in PACKAGES}
        found = {"versions": versions, "rows": rows}
        path.write_text(json.dumps(found, indent=2) + "\n")


def compare(model: Path | None, to: str, scheme: str, method: str, scratch: Path) -> dict[str, Any]:
    """The largest difference of logits over the largest, and how often the first words agree."""
    base, out = model or scratch / "base", scratch / "out"
    if model is None:
        tiny.make(base, torch.float16)
    # GPTQModel takes float16, so nothing may be left for it to round.
    dtype = "float16" if to.startswith("gptq") else "float32"
    loaded = load(base, dtype=dtype, compute_dtype="float32")
    target = exporter(to, Scheme.parse(scheme))
    generator = torch.Generator().manual_seed(0)
    text = [torch.randint(0, 95, (8, 64), generator=generator)]
    stored = target.scale_dtype(torch.float32)
    if method == "zeroqat":
        started_(loaded.model, scheme, text[0], stored)
    else:
        how = recipe([("awq", {}), ("gptq", {"act_order": True})])
        calibrate_(loaded.model, scheme, how, text, stored=stored)
    # The tiny model's tokenizer of characters is none of llama.cpp's.
    export_(loaded.model, out, target, source=base, tokenizer=None)
    ids = tiny.tokens()
    with torch.no_grad():
        from transformers import AutoModelForCausalLM

        from zotune.quant import formats

        model = formats.read(out, AutoModelForCausalLM, dtype=torch.float32)
        own = model(ids).logits[0]
    theirs = LIBRARIES[to.removesuffix("_v2")](base, out, ids)
    rounded_to = 8 if to == "gguf" else Scheme.parse(scheme).act_bits
    difference = float((own - theirs).abs().max() / own.abs().max())
    found = {
        "logits": difference,
        "same_most_likely": float((own.argmax(-1) == theirs.argmax(-1)).float().mean()),
    }
    if rounded_to in ROUNDED:
        return {**found, "met": difference <= ROUNDED[rounded_to]}
    alone = layers_apart(model, opened(out), ids)
    return {**found, "layers": alone, "met": alone <= ALONE}


def started_(model: Any, scheme: str, ids: Tensor, stored: torch.dtype) -> None:
    """Where ZeroQAT's training starts, as it is saved: rotated, transformed, compensated."""

    def run() -> float:
        return float(model(ids, labels=ids).loss)

    fake_(model, Preparation(scheme, rotate=True), stored)
    search.search_(model, run)
    quantize_(model)


def layers_apart(own: Any, theirs: Any, ids: Tensor) -> float:
    """The largest difference of a layer's outputs, over the largest of them, on the same inputs."""
    found, layers = [], dict(own.named_modules())

    def compare(layer: Any, args: tuple[Tensor, ...], output: Tensor, path: str) -> None:
        found.append(float((layers[path](args[0]) - output).abs().max() / output.abs().max()))

    for path, layer in theirs.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(partial(compare, path=path))
    with torch.no_grad():
        theirs(ids)
    return max(found)


def compressed_tensors(base: Path, out: Path, ids: Tensor) -> Tensor:
    """Logits of the model that `opened` gives."""
    with torch.no_grad():
        logits: Tensor = opened(out)(ids).logits[0]
    return logits


def opened(out: Path) -> Any:
    """By transformers, which lets the library decompress and round activations.

    Packed zero points do not fit the placeholders that transformers makes for them, also in files
    of llm-compressor; there the library's compressor dequantizes while loading.
    """
    import compressed_tensors  # noqa: F401 - says early that it is missing
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    group = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    options: dict[str, Any] = {}
    if not group["group_0"]["weights"]["symmetric"]:
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, **options)


def gptq(base: Path, out: Path, ids: Tensor) -> Tensor:
    """GPTQModel's weights, float32, in transformers' model."""
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel_golden import dequantized

    model = GPTQModel.load(
        str(out), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16
    ).model
    with torch.no_grad():
        logits: Tensor = dequantized(model)(ids).logits[0]
    return logits


def gguf(base: Path, out: Path, ids: Tensor) -> Tensor:
    """llama.cpp on the file."""
    from gguf_tuned import llama

    return llama(next(out.glob("*.gguf")), ids[0].tolist())


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


LIBRARIES = {"compressed-tensors": compressed_tensors, "gptq": gptq, "gguf": gguf}

if __name__ == "__main__":
    main()
