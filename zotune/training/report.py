"""What a run leaves besides the model: metrics, result, plot, model card."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zotune.errors import FormatError
from zotune.training.config import TrainConfig
from zotune.training.snapshots import cannot_write, write_atomic, write_json

if TYPE_CHECKING:
    from zotune.training.privacy import Privacy

METRICS, RESULT, PLOT, CARD, CONFIG, PICTURE = (
    "metrics.jsonl", "result.json", "plot.png", "README.md", "config.yaml", "samples-{}.png"
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What a training run came to; `result.json` holds the same.

    before, after: the task's metric on `split`. steps: updates asked and journalled; applied: those
    that moved something (not skipped). forwards: passes over a batch. train_seconds: without
    evaluations. kept: the step whose state was saved. privacy: of a private run, what it promises.
    kernels: what each kind of layer ran on.
    """

    before: float | None
    after: float
    metric: str
    higher_is_better: bool
    split: str
    steps: int
    applied: int
    kept: int
    forwards: int
    train_seconds: float
    steps_per_second: float
    peak_memory_bytes: int
    trainable: int
    method: str
    space: str
    out: str
    best: float | None = None
    best_step: int | None = None
    journal_bytes: int = 0
    numbers: dict[str, dict[str, float]] = field(default_factory=dict)
    privacy: Privacy | None = None
    kernels: dict[str, str] = field(default_factory=dict)

    @property
    def improved(self) -> bool:
        """Whether the metric is better than before; unknown counts as no."""
        if self.before is None:
            return False
        return self.after > self.before if self.higher_is_better else self.after < self.before

    def as_dict(self) -> dict[str, Any]:
        """Numbers that are not finite become null, as JSON has no word for them."""
        return dict(plain(dataclasses.asdict(self)))

    def save(self) -> None:
        write_json(Path(self.out) / RESULT, self.as_dict())


class Metrics:
    """`metrics.jsonl`: one JSON object a line; lines of steps that were not reached are dropped."""

    def __init__(self, folder: Path, done: int = 0) -> None:
        self.path = folder / METRICS
        self.rows = [row for row in read_metrics(folder) if row.get("step", 0) <= done]
        write_atomic(self.path, "".join(json.dumps(r) + "\n" for r in self.rows).encode())
        self._file = self.path.open("a", encoding="utf-8")

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        try:
            self._file.write(json.dumps(plain(row)) + "\n")
            self._file.flush()
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def evaluated(self, step: int) -> bool:
        return any("eval_loss" in row and row["step"] == step for row in self.rows)

    def close(self) -> None:
        self._file.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run; an incomplete last line (a killed process) is left out."""
    path = folder / METRICS
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return [row for row in rows if isinstance(row, dict)]


def save_config(config: TrainConfig) -> None:
    """`config.yaml`: every key, so that `zotune train --config` repeats the run."""
    import yaml

    text = yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True)
    write_atomic(config.out / CONFIG, text.encode())


def read_config(folder: Path) -> TrainConfig:
    """The configuration of a run folder. Raises FormatError."""
    import yaml

    try:
        values = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise FormatError(
            f"{folder} is not a run folder: {CONFIG} cannot be read ({error})"
        ) from error
    return TrainConfig.of({**values, "output_dir": str(folder)})


def save_picture(folder: Path, when: str, picture: Any) -> None:
    """`samples-before.png`, `samples-after.png`: what a model makes, a PIL image; None for none."""
    if picture is not None:
        data = io.BytesIO()
        picture.save(data, "PNG")
        write_atomic(folder / PICTURE.format(when), data.getvalue())


def plot(folder: Path, rows: list[dict[str, Any]], metric: str) -> None:
    """`plot.png`: loss and metric over steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    losses = [(r["step"], r["loss"]) for r in rows if "loss" in r]
    scores = [(r["step"], r[f"eval_{metric}"]) for r in rows if f"eval_{metric}" in r]
    axes.set_xlabel("step")
    axes.set_ylabel("training loss", color="tab:blue")
    axes.plot(*zip(*losses, strict=True) if losses else ((), ()), color="tab:blue")
    if scores:
        other = axes.twinx()
        other.set_ylabel(metric, color="tab:orange")
        other.plot(*zip(*scores, strict=True), color="tab:orange", marker="o", markersize=3)
    import io

    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=120)
    write_atomic(folder / PLOT, held.getvalue())


def card(result: Result, config: TrainConfig, base: str, labels: str) -> str:
    """A short model card."""
    name = config.model_name_or_path or "a model given in Python"
    flags = {
        "dtype": config.dtype,
        "compute_dtype": config.compute_dtype,
        "max_length": config.max_length,
        "data": config.data,
        "test_file": config.test_file,
    }
    options = "".join(f" --{k} {v}" for k, v in flags.items() if v not in (None, "auto"))
    promise = "" if result.privacy is None else f"| privacy | {result.privacy} |\n"
    return f"""---
base_model: {name}
library_name: zotune
---

# {Path(name).name}, tuned with forward passes only

| | |
|---|---|
| task | {labels} |
| {result.metric} on {result.split} | {number(result.before)} before, {number(result.after)} after |
| method | `{result.method}` |
| space | `{result.space}` ({result.trainable:,} numbers) |
| steps, forward passes | {result.steps:,}, {result.forwards:,} |
| seed | {config.seed} |
| scheme | {config.scheme or "as the base"} |
| base fingerprint | `{base}` |
{promise}
Evaluate: `zotune eval --model model --task {labels!r}{options}`.
Rebuild from the base and the journal: `zotune replay . --model {name} --out rebuilt`.
"""


def plain(value: Any) -> Any:
    """The same with null for NaN and infinities.

    >>> plain({"loss": float("nan"), "steps": [1]})
    {'loss': None, 'steps': [1]}
    """
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"
