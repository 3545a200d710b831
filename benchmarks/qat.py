"""Quantization-aware training by forward passes against rounding, calibration and backprop.

    python benchmarks/qat.py --part int2   # int2-g64, int3, int4-a4, outliers, trec, sst2, memory

Perplexity of a tiny language model (stories260K) after quantization. All contenders get the same
training stories; whatever trains may spend the same passes over batches of `--batch` windows, a
probe being one and a forward with its backward three. What `auto` looks at before its first step
counts; the passes of ZeroQAT's search are given to backprop, too. What has a learning rate to
choose takes it on the dev stories. The gap from rounding to nearest to floats is measured in
perplexity and, since that explodes at two bits, in its logarithm, the loss. `--others` are the
seeds of all that trains but ZeroQAT itself. Each result is written when it is there; with `--only`,
in a file of its own.

`int2-g64` runs on the same model with 20 channels of zeros more in every MLP, which change nothing
but make 172 a multiple of 64. `outliers` runs on the same function with two channels of every
norm's output thirty times as large, as large language models have them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import log
from pathlib import Path
from statistics import mean, stdev
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.harness import Row, begin, measured_apart, parser, report
from zotune import tasks
from zotune.bench.memory import kernels
from zotune.bench.models import MINILM
from zotune.core.calls import split_calls
from zotune.models import load
from zotune.quant.calibrate import calibrate_, recipe
from zotune.quant.calibrate.folding import fold_, folding
from zotune.training import TrainConfig, train
from zotune.training.memory import peak_bytes, reset_peak
from zotune.training.preparation import Preparation, fake_
from zotune.training.qat import zeroqat

DATA = Path(os.environ.get("ZOTUNE_DATA", Path(__file__).parents[1] / "../shared/data"))
STORIES = DATA / "stories260K-hf"
LOOKED = 72  # passes of `auto` before its first step
SEARCHED = 168  # of the search: 4 batches, twice, for 20 transforms and for 20 inputs of layers
RATES = (0.003, 0.03)


def stories260k() -> Any:
    return load(STORIES)


def padded() -> Any:
    """The model with 192 instead of 172 channels in its MLPs, the new ones always zero."""
    loaded = load(STORIES)
    for name, layer in loaded.model.named_modules():
        if name.endswith(("gate_proj", "up_proj", "down_proj")):
            rows, columns = (0, 20) if name.endswith("down_proj") else (20, 0)
            wide = torch.nn.functional.pad(layer.weight.detach(), (0, columns, 0, rows))
            layer.weight = torch.nn.Parameter(wide, requires_grad=False)
            layer.out_features, layer.in_features = wide.shape
    loaded.config.intermediate_size = 192
    return loaded


def planted() -> Any:
    """The model with two large channels in every norm's output, and smaller columns behind."""
    loaded = load(STORIES)
    for fold in folding(loaded.model).folds:
        if "norm" in fold.source:
            scale = torch.ones(fold.channels)
            scale[[5, 40]] = 1 / 30
            fold_(loaded.model, fold, scale)
    return loaded


@dataclass(frozen=True)
class Part:
    """A scheme with its trained contenders, and the model."""

    scheme: str
    how: dict[str, Any] = field(default_factory=dict)
    others: dict[str, dict[str, Any]] = field(default_factory=dict)
    model: Callable[[], Any] = stories260k
    targets: tuple[str, ...] = ()


CLIP = {"clip_inputs": True}
PARTS = {
    "int2": Part(
        "int2-channel-asym", {}, {"light: queries and values only": {"light": True}},
        targets=("gptq", "half"),
    ),
    "int2-g64": Part("int2-g64-asym", {}, {}, padded, ("gptq", "half")),
    "int3": Part("int3-channel-asym"),
    "int4-a4": Part(
        "int4-channel-a4asym", {"rotate": True, **CLIP},
        {"not rotated": CLIP, "neither rotated nor smoothed": {"smooth": False, **CLIP}},
        targets=("half",),
    ),
    "outliers": Part(
        "int4-channel-a4asym", CLIP,
        {"without smoothing": {"smooth": False, **CLIP},
         "rotated, without smoothing": {"rotate": True, "smooth": False, **CLIP},
         "rotated": {"rotate": True, **CLIP}},
        planted,
    ),
}  # fmt: skip
ENCODER = {"trec": "trec", "sst2": "sst2"}
HEAD = "head(basis='classes', project=True, layers='all')"


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    flags = parser(__doc__, seeds=3, others=1, budget=272, batch=16, length=64, windows=150)
    flags.add_argument("--part", choices=[*PARTS, *ENCODER, "memory"], default="int2")
    flags.add_argument("--only", nargs="+", default=None, help="contenders whose name holds these")
    flags.add_argument("--measure", default=None, help="peak memory of one contender, as JSON")
    return flags.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    given = options(words)
    begin(given)
    if given.measure:
        print(json.dumps(peak_of(given.measure, given)))
    elif given.part == "memory":
        memory(given)
    elif given.part in ENCODER:
        encoder(given)
    else:
        stories(given, PARTS[given.part])


# ---- perplexity ----------------------------------------------------------------------


def stories(given: argparse.Namespace, part: Part) -> None:
    """Every contender on one scheme, cheapest first."""
    found: dict[str, list[dict[str, float]]] = {"float": [plain(given, part, "")]}
    for name in ("rtn", "smoothquant", "gptq", "rotate + gptq"):
        found[name] = [plain(given, part, name)]
    contenders: dict[str, Callable[[int], dict[str, float]]] = {
        "zeroqat": lambda seed: trained(given, part, part.how, seed),
        **{f"zeroqat, {name}": lambda seed, how=how: trained(given, part, how, seed)
           for name, how in part.others.items()},
        "backprop: adamw on clipping + transforms": lambda seed: learned(given, part, seed),
    }  # fmt: skip
    for name, run in contenders.items():
        if given.only is None or any(word in name for word in given.only):
            found[name] = []
            for seed in range(given.seeds if name == "zeroqat" else given.others):
                found[name].append(run(seed))
                report(
                    "-".join(["qat", given.part, *(given.only or ())]),
                    rows_of(given, found),
                    given,
                    runs=found,
                )


def rows_of(given: argparse.Namespace, found: dict[str, list[dict[str, float]]]) -> list[Row]:
    base, best = found["rtn"][0], found["float"][0]
    rows = []
    for name, runs in found.items():
        for text in best:
            values = [run[text] for run in runs if text in run]
            if not values:
                continue
            after, low, high = mean(values), best[text], base[text]
            label = f"{name}, {text}"
            aims = PARTS[given.part].targets if name == "zeroqat" else ()
            target = found["gptq"][0][text] if "gptq" in aims else None
            words = None if target is None else "gptq: at most its perplexity"
            rows.append(Row(label, after, "perplexity", words, target))
            if len(values) > 1:
                rows.append(Row(f"{label}: deviation, {len(values)} seeds", stdev(values), "ppl"))
            if name not in ("float", "rtn"):
                half = 0.5 if "half" in aims else None
                for unit, at in (("perplexity", lambda x: x), ("loss", log)):
                    closed = (at(high) - at(after)) / (at(high) - at(low))
                    rows.append(Row(f"{label}: gap closed in {unit}", closed, "of the gap",
                                    "rtn to float", half, at_least=True))  # fmt: skip
    return rows


def task_of(given: argparse.Namespace) -> Any:
    """Stories in windows: the first 200 are for test, 60 others for dev."""
    return tasks.get(
        "tinystories", overflow="window", dev_size=60, test_size=100, max_length=given.length
    )


def measured(given: argparse.Namespace, loaded: Any) -> dict[str, float]:
    """Test perplexity of stories, and of WikiText-2, which nobody has seen."""
    from zotune.training.batches import spread

    found = {}
    wikitext = tasks.get("wikitext2", max_length=given.length, test_size=4)
    for name, task in (("tinystories", task_of(given)), ("wikitext2", wikitext)):
        model = task.prepare(loaded)
        chosen = spread(task.split("test"), given.windows)
        found[name] = task.evaluate(model, chosen, 50)["perplexity"]
    return found


def plain(given: argparse.Namespace, part: Part, method: str) -> dict[str, float]:
    """A model as it is, or calibrated on 64 windows of the training stories."""
    loaded = part.model()
    if method:
        task = task_of(given)
        task.prepare(loaded)
        whole = [e["ids"] for e in task.split("train") if len(e["ids"]) == given.length]
        batches = [torch.tensor(whole[k : k + 16]) for k in range(0, 64, 16)]
        calibrate_(loaded.model, part.scheme, recipe(split_calls(method)), batches)
    return measured(given, loaded)


def config_of(given: argparse.Namespace, out: str, seed: int, **changes: Any) -> TrainConfig:
    return TrainConfig(
        **{"output_dir": out, "seed": seed, "per_device_train_batch_size": given.batch,
           "threads": given.threads, "save_steps": 0, "report_to": "none", "max_bad_steps": 999,
           "show_progress": False, "max_eval_samples": 20,
           "model_name_or_path": str(STORIES), **changes}
    )  # fmt: skip


def trained(
    given: argparse.Namespace, part: Part, how: dict[str, Any], seed: int
) -> dict[str, float]:
    """`zeroqat` with `auto`: the search, then two passes a step."""
    loaded, task = part.model(), task_of(given)
    with tempfile.TemporaryDirectory() as out:
        config = config_of(given, out, seed, max_steps=max(1, (given.budget - LOOKED) // 2))
        made = zeroqat(config, Preparation(part.scheme, **how), model=loaded, task=task)
    before = made.texts[task.name]
    return {
        **measured(given, loaded),
        "start": before["start"],
        "after": before["after"],
        "search seconds": made.search_seconds,
        "training seconds": made.result.train_seconds,
    }


def learned(given: argparse.Namespace, part: Part, seed: int) -> dict[str, float]:
    """Clipping and transforms by exact gradients, straight through the roundings, after OmniQuant
    but end to end; from rounding to nearest, three passes a step, those of ZeroQAT's search
    included, the rate chosen on dev."""
    best: tuple[float, dict[str, float]] | None = None
    for rate in RATES:
        loaded, task = part.model(), task_of(given)
        fake_(loaded.model, Preparation(part.scheme))
        with tempfile.TemporaryDirectory() as out:
            steps = max(1, (given.budget + SEARCHED) // 3)
            config = config_of(
                given, out, seed, method="adamw", learning_rate=rate, max_steps=steps,
                space="clipping + transforms", lr_scheduler_type="linear",
            )  # fmt: skip
            train(config, model=loaded, task=task)
        dev = task.evaluate(loaded.model, task.split("dev")[:100], 50)["perplexity"]
        if best is None or dev < best[0]:
            best = dev, {**measured(given, loaded), "rate": rate}
    assert best is not None
    return best[1]


# ---- an encoder ----------------------------------------------------------------------


def encoder(given: argparse.Namespace) -> None:
    """MiniLM on TREC-6 or SST-2: `auto`'s head on all layers, on W4A4 from a searched start and on
    floats, by as many passes."""
    found: dict[str, list[dict[str, float]]] = {"float": [], "W4A4": []}
    for seed in range(given.seeds):
        for name, runs in found.items():
            with tempfile.TemporaryDirectory() as out:
                config = config_of(
                    given, out, seed, model_name_or_path=MINILM, task=ENCODER[given.part],
                    max_steps=max(1, (given.budget - LOOKED) // 2), space=HEAD,
                    max_eval_samples=None,
                )  # fmt: skip
                runs.append(fine_tuned(config, name == "W4A4"))
            report(f"qat-{given.part}", accuracies(found), given, runs=found)


def fine_tuned(config: TrainConfig, rounded: bool) -> dict[str, float]:
    """Accuracies of one run."""
    if not rounded:
        result = train(config)
        return {"before": result.before or 0.0, "after": result.after}
    made = zeroqat(config, Preparation("int4-channel-a4asym", rotate=True, examples=256))
    return next(iter(made.texts.values()))


def accuracies(found: dict[str, list[dict[str, float]]]) -> list[Row]:
    rows = []
    top = mean(run["after"] for run in found["float"])
    for name, runs in found.items():
        values = [100 * run["after"] for run in runs]
        if not values:
            continue
        aim = ("float, less 2 points", 100 * top - 2) if name == "W4A4" else (None, None)
        label = f"{name}, {len(values)} seeds"
        rows.append(Row(label, mean(values), "% accuracy", *aim, at_least=True))
        if len(values) > 1:
            rows.append(Row(f"{label}: deviation", stdev(values), "points"))
    return rows


# ---- memory --------------------------------------------------------------------------


def memory(given: argparse.Namespace) -> None:
    """Peaks of processes of their own: training, and evaluating the fake-quantized model; both hold
    the compiled kernels of the noise, tens of MB (`benchmarks/memory.py` shows them)."""
    peaks = {}
    for name in ("inference", "training"):
        words = ["--measure", name, "--threads", str(given.threads)]
        peaks[name] = measured_apart("benchmarks.qat", words, 3000)
    ratio = peaks["training"] / peaks["inference"]
    rows = [Row("MiniLM int4-channel-a4, latents: peak of training / inference", ratio, "x",
                f"inference: {peaks['inference'] / 1e6:,.0f} MB", 1.1)]  # fmt: skip
    report("qat-memory", rows, given, peaks=peaks)


def peak_of(name: str, given: argparse.Namespace) -> int:
    """Bytes at most while probing or evaluating batches of MiniLM behind fake quantization."""
    from zotune import methods
    from zotune.core import spaces
    from zotune.core.evaluator import TorchEvaluator
    from zotune.core.step import Tuner

    loaded, task = load(MINILM, kind="encoder"), tasks.get("trec")
    fake_(loaded.model, Preparation("int4-channel-a4"))
    model = task.prepare(loaded)
    batch = task.batch(task.split("train")[: given.batch])
    space = spaces.parse("latents + clipping").build(model)
    evaluator = TorchEvaluator(model, space, task.losses, stack=1)
    tuner = Tuner(space, methods.get("mezo", units="relative"), 0, evaluator=evaluator)  # type: ignore[arg-type]
    kernels()  # the noise's compiled code: once per process, however large the model is
    reset_peak("cpu")
    for _ in range(3):
        if name == "training":
            tuner.step(batch)
        else:
            with torch.no_grad():
                task.losses(model, batch)
    return peak_bytes()


if __name__ == "__main__":
    main()
