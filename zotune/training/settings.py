"""What an evaluation is, under Hugging Face's argument names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate a model on a task.

    Args:
        model_name_or_path: folder or hub id; adapters of a training run are found. Alias: model.
        task: name of the task, with options if any.
        task_options: options of the task.
        data: file, folder or hub data set, where the task does not name its own.
        train_file: rows of the train split.
        validation_file: rows of the dev split.
        test_file: rows of the test split.
        split: "train", "dev" or "test"; the test split, or dev without one, when null.
        max_length: longest sequence in tokens.
        per_device_eval_batch_size: examples per forward.
        max_eval_samples: evaluate at most so many examples.
        scheme: quantize the float model while loading.
        dtype: of float tensors.
        compute_dtype: of quantized layers' products.
        kernel: the kernel of every quantized layer; chosen by device when null.
        device: where the model runs.
        threads: CPU threads.
        verbose: log which kernels the layers run on.
        trust_remote_code: let Python files of the checkpoint run.
        stream: bring layers into memory one after the other; "auto" where the model would not fit.
        memory_limit: bytes of the model in memory at once, such as "2GB"; what is free when null.
        offload_folder: where what must be converted lies meanwhile.
    """

    model_name_or_path: str = ""
    task: str = ""
    task_options: dict[str, Any] = field(default_factory=dict)
    data: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    split: str | None = None
    max_length: int | None = None
    per_device_eval_batch_size: int = 64
    max_eval_samples: int | None = None
    scheme: str | None = None
    dtype: str = "auto"
    compute_dtype: str = "auto"
    kernel: str | None = None
    device: str = "cpu"
    threads: int | None = None
    verbose: bool = False
    trust_remote_code: bool = False
    stream: bool | Literal["auto"] = False
    memory_limit: str | None = None
    offload_folder: str | None = None
