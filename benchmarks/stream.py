"""A model four times larger than the memory allowed, trained layer by layer from its files.

    python benchmarks/stream.py

A random Llama with int8 codes is made in a temporary folder and trained by `zotune train --stream`
in a process of its own. What a visit must cost is its bytes at the rate at which this machine reads
the same file, measured in the same process; the batch is small, so that reading is what counts.
"""

from __future__ import annotations

import argparse
import json
import os
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

from benchmarks import process
from benchmarks.harness import Row, begin, parser, report

LARGER = 4.0  # times the limit
OVER_READING = 1.3
SCHEME = "int8-channel-a8"
KINDS: dict[str, dict[str, Any]] = {
    "qzo": {"method": "qzo", "space": "scales"},
    "zoqo": {"method": "zoqo", "space": "codes"},
}


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    flags = parser(__doc__, hidden=2048, layers=22, tokens=8, steps=6, limit=300)
    flags.add_argument("--measure", help="numbers of one run, as JSON: KIND/SOURCE")
    flags.add_argument("--folder", type=Path, help="where the model and the work file lie")
    return flags.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    given = options(words)
    begin(given)
    if given.measure:
        print(json.dumps(measure(*given.measure.split("/"), given)))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        size = make(Path(folder) / "model", given)
        found = {}
        for name in ("qzo/disk", "qzo/cache", "zoqo/disk", "qzo/resident"):
            found[name] = apart(name, Path(folder), given)
            print(name, found[name], flush=True)
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
    from zotune.training import TrainConfig, train
    from zotune.training.objective import Objective

    from transformers import LlamaConfig, LlamaForCausalLM

    rows = [{"input_ids": torch.randint(4096, (given.tokens,))} for _ in range(4)]
    files = sorted((given.folder / "model").glob("*.safetensors"))
    seen: list[tuple[float, int]] = []

    def options(out: str, **more: Any) -> TrainConfig:
        return TrainConfig(
            output_dir=str(given.folder / out), per_device_train_batch_size=1, threads=given.threads,
            save_steps=0, report_to="none", show_progress=False, journal_sync=1000, **KINDS[kind],
            **more,
        )  # fmt: skip

    small = LlamaConfig(vocab_size=4096, hidden_size=64, intermediate_size=128,
                        num_hidden_layers=2, num_attention_heads=2)  # fmt: skip
    train(options(f"warm-{kind}-{source}", max_steps=2, scheme=SCHEME, stream=source != "resident"),
          model=LlamaForCausalLM(small), task=Objective(loss, rows, rows[:1]))  # fmt: skip
    empty = process.resident()
    rate = reading_rate(files, source)
    process.reset_peak()
    streamed = {"stream": True, "offload_folder": str(given.folder)}
    if source == "disk":
        streamed["memory_limit"] = f"{given.limit}MB"
    config = options(
        f"run-{kind}-{source}", max_steps=given.steps, model_name_or_path=str(given.folder / "model"),
        **({} if source == "resident" else streamed),
    )  # fmt: skip
    train(config, task=Objective(loss, rows, rows[:1]), callbacks=[watch(seen)])
    steps = [b[0] - a[0] for a, b in zip(seen, seen[1:], strict=False)]
    read = [b[1] - a[1] for a, b in zip(seen, seen[1:], strict=False)]
    return {"seconds": median(steps), "peak": process.peak() - empty, "empty": empty,
            "read": median(read), "rate": rate}  # fmt: skip


def watch(seen: list[tuple[float, int]]) -> Any:
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append((time.perf_counter(), bytes_from_disk()))

    return Watch()


def bytes_from_disk() -> int:
    """What this process has had read from the disk."""
    text = Path("/proc/self/io").read_text(encoding="utf-8")
    return int(dict(line.split(": ") for line in text.splitlines())["read_bytes"])


def reading_rate(files: Sequence[Path], source: str) -> float:
    """Bytes per second of plain reads of these files, from the disk or from the system's cache."""
    if source == "disk":
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    else:
        for _ in chunks(files):
            pass
    began = time.perf_counter()
    total = sum(chunks(files))
    return total / (time.perf_counter() - began)


def chunks(files: Sequence[Path]) -> Iterator[int]:
    held = bytearray(8 << 20)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(held):
                yield count


def apart(name: str, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    words = ["--measure", name, "--folder", str(folder)]
    for key in ("threads", "hidden", "layers", "tokens", "steps", "limit"):
        words += [f"--{key}", str(getattr(given, key))]
    found: dict[str, Any] = process.measured_apart("benchmarks.stream", words, timeout=3600)
    return found


def rows(found: dict[str, dict[str, Any]], size: int, given: argparse.Namespace) -> list[Row]:
    limit = given.limit * 1e6
    out = [Row("model / memory allowed", size / limit, "x", f"{limit / 1e6:.0f} MB", LARGER,
               at_least=True)]  # fmt: skip
    return out


if __name__ == "__main__":
    main()
