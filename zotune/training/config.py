"""What a run is: one frozen record, under Hugging Face's argument names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from zotune.errors import BadInput

ALIASES = {
    "model": "model_name_or_path",
    "out": "output_dir",
    "lr": "learning_rate",
    "zo_eps": "eps",
    "batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "eval_every": "eval_steps",
    "steps": "max_steps",
    "resume": "resume_from_checkpoint",
    "schedule": "lr_scheduler_type",
    "warmup": "warmup_steps",
    "dataset_name": "data",
}
"""Short names, accepted on the command line and in YAML."""

OWN = {
    "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "logging_steps", "eval_steps",
    "save_steps", "report_to", "callbacks", "journal_sync", "threads", "max_bad_steps",
    "per_device_eval_batch_size", "max_eval_samples", "show_progress", "trust_remote_code",
    "check_gradient", "cache_dir", "cache_limit", "dataloader_num_workers",
    "verbose", "stream", "memory_limit", "offload_folder",
}  # fmt: skip
"""Keys that a resumed run may change: they do not touch the weights."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a model with forward passes only.

    Args:
        model_name_or_path: folder or hub id of the model. Alias: model.
        task: name of the task, with options if any: "sst2",
            "classification(template='{text} Topic:')".
        output_dir: the run folder; must be new or empty. Alias: out.
        task_options: options of the task (template, labels, objective, ...), for YAML.
        data: file, folder or hub data set, where the task does not name its own.
        train_file: rows to train on (.jsonl, .json, .csv, .tsv, .parquet, .txt).
        validation_file: rows to choose the best state by.
        test_file: rows for the numbers before and after.
        method: the method, with options if any: "qzo", "zo-adam(queries=4)"; "auto" measures eps
            and learning rate before the first step.
        space: what is tuned: "adapter(rank=1)+head"; the method's own default when null, and with
            "auto" what suits the model.
        learning_rate: the method's default when null. Alias: lr.
        eps: perturbation scale; the method's default when null. Alias: zo_eps.
        queries: directions per step; the method's default when null.
        directions: "batch", "one-sided" or "example"; the method's default when null.
        units: "relative" or "absolute" (papers' numbers); the method's default when null.
        lr_scheduler_type: "constant", "linear" or "cosine"; the method's default when null.
        warmup_steps: steps over which the learning rate rises from 0.
        weight_decay: decoupled weight decay; the method's default when null.
        max_steps: updates. Alias: steps.
        per_device_train_batch_size: examples per step; "auto" for 16, as many per forward as memory
            has room for. Alias: batch_size.
        per_device_eval_batch_size: examples per forward of an evaluation.
        micro_batch: examples per forward of a step; the whole batch when null (in a private run
            one, so that no example's loss depends on others); "auto" for as many, and as many
            probes side by side, as memory has room for.
        micro_batch_tokens: cut a step's batch into pieces of like length, with at most so many
            tokens per probe, padding included; results differ by rounding alone.
        group_by_length: let the examples of a step be of like length.
        dataloader_num_workers: 1 to prepare the next batch while a step runs, 0 not to.
        stack: probes per forward: null for all of a step, 1 for the least memory.
        max_length: longest sequence in tokens; the task's own limit when null.
        eval_steps: evaluate every so many steps; 0 for never. Alias: eval_every.
        max_eval_samples: examples per evaluation; all when null.
        save_steps: write a snapshot every so many steps; 0 for the end only.
        logging_steps: write metrics every so many steps.
        check_gradient: every so many steps, log the cosine of the estimate with the true gradient,
            by one backward pass of a small model; 0 for never.
        freeze: lower layers that stop moving: a share of them and a step ("0.5@200,0.67@500"), or
            "cka(threshold=0.99, every=50, most=0.67)", "svcca(...)", "rate(...)": when they have
            stopped changing.
        cache_dir: where the outputs of frozen layers are kept, so that those need not run again.
        cache_limit: the most that cache_dir may hold, such as "2GB".
        cache_codec: "lossless" (when null), or "zfp(tolerance=0.1)": errors of at most so many rms
            of the features, times `growth` at each further freeze point.
        cache_similarity: channels whose maps, transformed, are less alike than this to the maps of
            transformed images are cached in transformed copies; -1 caches none of them.
        stream: bring layers into memory one after the other, from the checkpoint's files and a work
            file; "auto" does so where the model would not fit. Same results, bit for bit.
        memory_limit: bytes of the model in memory at once, such as "2GB"; what is free when null.
            Activations and one layer's perturbed values come on top. Given alone, it means
            stream="auto".
        offload_folder: where the work file is made: as large as what is tuned or must be converted;
            a folder in memory (/dev/shm) spares the disk.
        augment: transforms of training images: "flip + shift(pixels=4)".
        load_best_model_at_end: keep the state of the best evaluation instead of the last.
        seed: fixes the directions and the order of the batches.
        scheme: quantize the float model while loading, such as "int4-g64".
        dtype: of float tensors: "auto", "float32", "bfloat16" or "float16".
        compute_dtype: of quantized layers' products: "auto", "float32" or "bfloat16".
        kernel: the kernel of every quantized layer: "reference", "cpu", "triton", or with the way
            it goes, "cpu/vnni"; chosen by device and speed when null.
        device: where the model runs, such as "cpu" or "cuda".
        threads: CPU threads; torch's own choice when null.
        journal_sync: bring the journal to the disk every so many steps.
        max_bad_steps: stop after so many steps in a row whose loss is not finite.
        report_to: trackers as Hugging Face names them: "tensorboard", "wandb", ... or "none".
        callbacks: dotted paths of transformers.TrainerCallback classes.
        resume_from_checkpoint: true to go on with the run in output_dir, or a run folder.
            Alias: resume.
        overwrite_output_dir: start anew in a folder that holds an old run.
        trust_remote_code: let Python files of the checkpoint run.
        verbose: log which kernels the layers run on.
        show_progress: whether to draw a progress bar on a terminal.
    """

    model_name_or_path: str = ""
    task: str = ""
    output_dir: str = ""
    task_options: dict[str, Any] = field(default_factory=dict)
    data: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    method: str = "auto"
    space: str | None = None
    learning_rate: float | None = None
    eps: float | None = None
    queries: int | None = None
    directions: Literal["batch", "one-sided", "example"] | None = None
    units: Literal["relative", "absolute"] | None = None
    lr_scheduler_type: Literal["constant", "linear", "cosine"] | None = None
    warmup_steps: int | None = None
    weight_decay: float | None = None
    max_steps: int = 1000
    per_device_train_batch_size: int | Literal["auto"] = 16
    per_device_eval_batch_size: int = 64
    micro_batch: int | Literal["auto"] | None = None
    micro_batch_tokens: int | None = None
    group_by_length: bool = False
    dataloader_num_workers: int = 1
    stack: int | None = None
    max_length: int | None = None
    eval_steps: int = 0
    max_eval_samples: int | None = None
    save_steps: int = 500
    logging_steps: int = 10
    check_gradient: int = 0
    freeze: str | None = None
    cache_dir: str | None = None
    cache_limit: str | None = None
    cache_codec: str | None = None
    cache_similarity: float = 0.6
    stream: bool | Literal["auto"] = False
    memory_limit: str | None = None
    offload_folder: str | None = None
    augment: str | None = None
    load_best_model_at_end: bool = False
    seed: int = 0
    scheme: str | None = None
    dtype: str = "auto"
    compute_dtype: str = "auto"
    kernel: str | None = None
    device: str = "cpu"
    threads: int | None = None
    journal_sync: int = 1
    max_bad_steps: int = 10
    report_to: str | list[str] = "tensorboard"
    callbacks: list[str] = field(default_factory=list)
    resume_from_checkpoint: bool | str | None = None
    overwrite_output_dir: bool = False
    trust_remote_code: bool = False
    verbose: bool = False
    show_progress: bool = True

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise BadInput("no output folder: give output_dir (--out DIR)")
        if self.per_device_train_batch_size == "auto":
            object.__setattr__(self, "per_device_train_batch_size", 16)
            object.__setattr__(self, "micro_batch", self.micro_batch or "auto")
        for name in ("max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
                     "logging_steps", "journal_sync", "max_bad_steps"):  # fmt: skip
            self._at_least(name, 1)
        for name in ("eval_steps", "save_steps", "check_gradient", "seed"):
            self._at_least(name, 0)
        for name in ("micro_batch", "micro_batch_tokens", "stack", "max_eval_samples", "threads",
                     "queries"):  # fmt: skip
            self._at_least(name, 1)
        if self.dataloader_num_workers not in (0, 1):
            raise BadInput(f"dataloader_num_workers={self.dataloader_num_workers}; want 0 or 1")
        if self.load_best_model_at_end and not self.eval_steps:
            raise BadInput("load_best_model_at_end needs evaluations: set eval_steps")

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, str) and (name, value) != ("micro_batch", "auto"):
            raise BadInput(f"{name}={value!r}; want a number")
        if not isinstance(value, str) and value is not None and value < least:
            raise BadInput(f"{name}={value}; want at least {least}")

    @property
    def examples(self) -> int:
        """Examples per step."""
        return int(self.per_device_train_batch_size)

    @property
    def together(self) -> int | None:
        """Examples per forward, where a number was given."""
        return None if self.micro_batch == "auto" else self.micro_batch

    @property
    def out(self) -> Path:
        return Path(self.output_dir).expanduser()

    @property
    def trackers(self) -> list[str]:
        """`report_to` as a list; "none" is the empty one."""
        given = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to)
        return [name for text in given for name in text.split(",") if name and name != "none"]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From keys as users write them (aliases, dashes); unknown keys offer the nearest.

        >>> TrainConfig.of({"out": "x", "zo-eps": 0.1}).eps
        0.1
        """
        return cls(**normalised(values, [f.name for f in fields(cls)]))


def normalised(values: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Keys with their full names: dashes are underscores, short names are spelled out.

    Raises:
        BadInput: an unknown key (the nearest is offered), or a key given under two names.

    >>> normalised({"out": "x", "batch-size": 4}, ["output_dir", "per_device_train_batch_size"])
    {'output_dir': 'x', 'per_device_train_batch_size': 4}
    """
    known, found = list(known), dict[str, Any]()
    for key, value in values.items():
        name = full_name(str(key), known)
        if name in found:
            raise BadInput(f"{name} is given twice, once as {key!r}; keep one")
        found[name] = value
    return found


def full_name(key: str, known: list[str]) -> str:
    """One key's full name, or BadInput with the nearest."""
    plain = key.replace("-", "_")
    name = plain if plain in known else ALIASES.get(plain, plain)
    if name in known:
        return name
    import difflib

    names = [*known, *(a for a, full in ALIASES.items() if full in known)]
    close = difflib.get_close_matches(plain, names, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else f". There are: {', '.join(known)}"
    raise BadInput(f"unknown option {key!r}{hint}")
