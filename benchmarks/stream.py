"""A model four times larger than the memory allowed, trained layer by layer from its files.

    python benchmarks/stream.py

A random Llama of int8 codes is made in a temporary folder and trained by `train(stream=True)`, each
time in a process of its own: from the disk, from memory (files in /dev/shm, as on a machine whose
GPU is smaller than its memory), and as a whole in memory. What a visit of all layers must cost is
the bytes read in it at the rate at which plain reads of the same files go; the batch is small, so
that reading counts. What the network itself takes is seen in the run in memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Row, begin, measured_apart, parser, report
from zotune.bench import process

LARGER, OVER_READING = 4.0, 1.3
SCHEME = "int8-channel-a8"
KINDS: dict[str, dict[str, Any]] = {
    "qzo": {"method": "qzo", "space": "scales"},
    "zoqo": {"method": "zoqo", "space": "codes"},
}
RUNS = ("qzo/disk", "qzo/memory", "qzo/resident", "zoqo/disk", "zoqo/resident")
MEMORY = Path("/dev/shm")


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    flags = parser(__doc__, hidden=2048, layers=23, tokens=8, steps=5, limit=300)
    flags.add_argument("--measure", choices=RUNS, help="numbers of one run, as JSON")
    flags.add_argument("--folder", type=Path, help="where the model and the work file lie")
    return flags.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    given = options(words)
    begin(given)
    if given.measure:
        kind, source = given.measure.split("/")
        print(json.dumps(measure(kind, source, given)))
        return
    found = dict[str, Any]()
    with tempfile.TemporaryDirectory(dir=given.folder) as disk:
        size = make(Path(disk) / "model", given)
        for name in RUNS:
            if not name.endswith("/memory"):
                found[name] = apart(name, disk, given)
                continue
            with tempfile.TemporaryDirectory(dir=MEMORY) as memory:
                shutil.copytree(Path(disk) / "model", Path(memory) / "model")
                found[name] = apart(name, memory, given)
    report("stream", rows(found, size, given), given, runs=found, model_bytes=size)


def make(folder: Path, given: argparse.Namespace) -> int:
    """A Llama of random codes in zotune's own format; its bytes."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from zotune.quant import formats
    from zotune.quant.formats.build import empty_model
    from zotune.quant.model import empty_twin, float_layers, replace_
    from zotune.quant.scheme import Scheme

    config = LlamaConfig(
        vocab_size=4096, hidden_size=given.hidden, intermediate_size=given.hidden * 11 // 4,
        num_hidden_layers=given.layers, num_attention_heads=16, num_key_value_heads=16,
        max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip
    model = empty_model(config, AutoModelForCausalLM, [], False)
    generator = torch.Generator().manual_seed(0)
    for name, layer in [f for f in float_layers(model) if f[0] != "lm_head"]:
        twin = empty_twin(layer, Scheme.parse(SCHEME))
        shape = (twin.rows, twin.columns)
        twin.codes = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
        twin.scale = torch.full((twin.rows, 1), 0.014 / given.hidden**0.5)
        replace_(model, name, twin)
    for parameter_name, parameter in list(model.named_parameters()):
        owner, _, leaf = parameter_name.rpartition(".")
        value = torch.ones(parameter.shape)
        if parameter.dim() > 1:
            value.normal_(0, 0.02, generator=generator)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    formats.write(model, folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def loss(model: nn.Module, batch: Any) -> Tensor:
    ids = batch["input_ids"]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.mT, ids[:, 1:], reduction="none").mean(1)


def measure(kind: str, source: str, given: argparse.Namespace) -> dict[str, Any]:
    """Seconds per step and peak memory of one run, what it reads, and how fast that can be read."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from zotune.training import TrainConfig, train
    from zotune.training.objective import Objective

    examples = [{"input_ids": torch.randint(4096, (given.tokens,))} for _ in range(4)]
    task = Objective(loss, examples, examples[:1])
    where: dict[str, Any] = {"offload_folder": str(given.folder), "stream": source != "resident"}

    def config(name: str, **more: Any) -> TrainConfig:
        return TrainConfig(
            output_dir=str(given.folder / f"{name}-{kind}-{source}"), save_steps=0,
            per_device_train_batch_size=1, threads=given.threads, report_to="none",
            show_progress=False, journal_sync=1000, **where, **KINDS[kind], **more,
        )  # fmt: skip

    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    small = LlamaForCausalLM(LlamaConfig(vocab_size=4096, num_attention_heads=2, **sizes))
    train(config("warm", max_steps=2, scheme=SCHEME), model=small, task=task)
    empty = process.resident()
    files = sorted((given.folder / "model").glob("*.safetensors"))
    watch = watcher(files, source)
    process.reset_peak()
    limit: dict[str, Any] = {} if source == "resident" else {"memory_limit": f"{given.limit}MB"}
    folder = str(given.folder / "model")
    steps = given.steps if kind == "qzo" else 3  # a billion codes take seconds to draw
    train(config("run", max_steps=steps, model_name_or_path=folder, **limit), task=task,
          callbacks=[watch])  # fmt: skip
    return {"peak": process.peak() - empty, "empty": empty, **watch.found}


def watcher(files: Sequence[Path], source: str) -> Any:
    from transformers import TrainerCallback

    from zotune.models.streaming import Stream

    class Watch(TrainerCallback):  # type: ignore[misc]
        """Each step's time and bytes read; behind each, how fast the same files can be read."""

        def __init__(self) -> None:
            names = ("seconds", "from_disk", "rate")
            self.found: dict[str, Any] = {name: [] for name in names}

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            streams = [found for found in gc.get_objects() if isinstance(found, Stream)]
            self.found["passing"] = sum(u.size for s in streams[-1:] for u in s.units if not u.held)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began, self.read = time.perf_counter(), bytes_from_disk()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.found["seconds"].append(time.perf_counter() - self.began)
            self.found["from_disk"].append(bytes_from_disk() - self.read)
            if source != "resident":
                self.found["rate"].append(reading_rate(files, source))

    return Watch()


def bytes_from_disk() -> int:
    """What this process has had read from the disk."""
    text = Path("/proc/self/io").read_text(encoding="utf-8")
    return int(dict(line.split(": ") for line in text.splitlines())["read_bytes"])


def reading_rate(files: Sequence[Path], source: str) -> float:
    """Bytes per second of plain reads of these files, none of them cached but those that lie in
    memory."""

    def forget() -> None:
        for path in files if source == "disk" else ():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    forget()
    began = time.perf_counter()
    total = sum(chunks(files))
    seconds = time.perf_counter() - began
    forget()
    return total / seconds


def chunks(files: Sequence[Path]) -> Iterator[int]:
    held = bytearray(8 << 20)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(held):
                yield count


def apart(name: str, folder: str, given: argparse.Namespace) -> dict[str, Any]:
    words = ["--measure", name, "--folder", folder]
    for key in ("threads", "hidden", "layers", "tokens", "steps", "limit"):
        words += [f"--{key}", str(getattr(given, key))]
    found: dict[str, Any] = measured_apart("benchmarks.stream", words, timeout=3600)
    return found


def rows(found: dict[str, dict[str, Any]], size: int, given: argparse.Namespace) -> list[Row]:
    allowed = f"{given.limit} MB beside the empty process"
    out = [Row("model / memory allowed", size / given.limit / 1e6, "x", allowed, LARGER,
               at_least=True)]  # fmt: skip
    for name, run in found.items():
        kind, source = name.split("/")
        peak = Row(f"{name}: peak", run["peak"] / given.limit / 1e6, "x", allowed,
                   None if source == "resident" else 1.0)  # fmt: skip
        out += [peak, Row(f"{name}: a step", median(run["seconds"]), "s")]
        if source != "resident":
            out += against(name, run, median(found[f"{kind}/resident"]["seconds"]))
    return out


def against(name: str, run: dict[str, Any], whole: float) -> list[Row]:
    """A streamed step against what it reads, and against a step of the model in memory (`whole`).

    A rate is measured right behind each step: disks of shared machines change by the second.
    """
    disk = name.endswith("/disk")
    reads = run["from_disk"] if disk else [run["passing"]] * len(run["seconds"])
    reading = [bytes_ / rate for bytes_, rate in zip(reads, run["rate"], strict=True)]
    words = f"{median(reads) / 1e6:,.0f} MB at {median(run['rate']) / 1e9:.2f} GB/s"

    def ratio(base: list[float]) -> float:  # the first step still fills caches
        return median(s / b for s, b in list(zip(run["seconds"], base, strict=True))[1:])

    return [
        Row(f"{name}: a step / reading", ratio(reading), "x", words,
            OVER_READING if name.startswith("qzo") else None),
        Row(f"{name}: a step / the longer of reading and computing",
            ratio([max(r, whole) for r in reading]), "x", f"a step in memory: {whole:.3g} s"),
        Row(f"{name}: a step / a step in memory", ratio([whole] * len(reading)), "x",
            f"a step in memory: {whole:.3g} s"),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
