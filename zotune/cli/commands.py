"""The commands: thin functions over the library, each giving back one JSON-able dict."""

from __future__ import annotations

from typing import Any, Literal

from zotune.attacks.config import AttackConfig
from zotune.bench.settings import BenchConfig
from zotune.errors import BadInput
from zotune.training.config import TrainConfig
from zotune.training.settings import EvalConfig


def train_model(
    config: TrainConfig, show_mask: bool = False, repair: bool = False
) -> dict[str, Any]:
    """Train a model with forward passes only.

    Args:
        config: the run.
        show_mask: show what of the first examples is trained on, and stop.
        repair: with --resume, go on from the good part of a damaged journal.
    """
    if show_mask:
        return mask(config)
    from zotune.training import train as run

    return run(config, repair=repair).as_dict()


def evaluate_model(config: EvalConfig, show_mask: bool = False) -> dict[str, Any]:
    """Evaluate a model on a task.

    Args:
        config: what to evaluate.
        show_mask: show what of the first examples the loss counts, and stop.
    """
    if show_mask:
        return mask(config)
    from zotune.training import evaluate as run

    return run(config)


def quantize_model(
    model_name_or_path: str = "",
    output_dir: str = "",
    scheme: str = "int4-g64",
    method: str = "rtn",
    format: str = "zotune",
    data: str = "",
    samples: int = 128,
    length: int = 512,
    text_field: str = "text",
    exclude: list[str] | None = None,
    dtype: str = "auto",
    threads: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Quantize a float model and save it.

    Args:
        model_name_or_path: folder or hub id. Alias: model.
        output_dir: where to; must be new or empty. Alias: out.
        scheme: "int4-g64", "int8-channel", "int4-g64-asym", "int8-channel-a8", ...
        method: "rtn" (to nearest), "gptq", "awq", "smoothquant",
            "rotate + awq + gptq(act_order=True)", ...; "zeroqat(steps=500)" trains through the
            rounding, by forward passes.
        format: what to write: "zotune", "gptq", "gptq_v2", "compressed-tensors", "gguf".
        data: text that methods look at: a file, a folder, a datasets name.
        samples: windows of text.
        length: tokens of a window.
        text_field: the column that holds the text.
        exclude: names or patterns of layers to leave alone; the output layer when null.
        dtype: of the tensors that stay float.
        threads: CPU threads.
        trust_remote_code: let Python files of the checkpoint run.
    """
    from zotune.training.folders import use_threads
    from zotune.training.quantize import quantize

    _need(model_name_or_path, output_dir)
    use_threads(threads)
    return quantize(
        model_name_or_path, output_dir, scheme, method=method, format=format, data=data,
        samples=samples, length=length, text_field=text_field, exclude=exclude, dtype=dtype,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip


def replay_run(
    run: str,
    model_name_or_path: str = "",
    output_dir: str = "",
    steps: int | None = None,
    repair: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    trust_remote_code: bool = False,
    stream: bool | Literal["auto"] = False,
    memory_limit: str | None = None,
    offload_folder: str | None = None,
) -> dict[str, Any]:
    """Rebuild a tuned model from its base and its journal.

    Args:
        run: the run folder, or its journal.zoj.
        model_name_or_path: the base model. Alias: model.
        output_dir: where to; must be new or empty. Alias: out.
        steps: the state after so many steps; what the run kept when null.
        repair: use the good part of a damaged or unfinished journal.
        device: where the model runs.
        threads: CPU threads.
        trust_remote_code: let Python files of the checkpoint run.
        stream: bring layers into memory one after the other; "auto" where the model would not fit.
        memory_limit: bytes of the model in memory at once, such as "2GB"; what is free when null.
        offload_folder: where the work file is made: as large as what is tuned or converted.
    """
    from zotune.training import replay as rebuild

    _need(model_name_or_path, output_dir)
    return rebuild(
        run, model_name_or_path, output_dir, steps=steps, repair=repair, device=device,
        threads=threads, trust_remote_code=trust_remote_code, stream=stream,
        memory_limit=memory_limit, offload_folder=offload_folder,
    )  # fmt: skip


def attack_model(
    config: AttackConfig,
    model_name_or_path: str = "",
    task: str = "digits",
    output_dir: str = "",
    targeted: bool = False,
    examples: int | None = 1000,
    split: str | None = None,
    data: str | None = None,
    task_options: dict[str, Any] | None = None,
    scheme: str | None = None,
    compute_dtype: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
) -> dict[str, Any]:
    """Test how robust a classifier of images is to black-box attacks.

    Args:
        config: the attack.
        model_name_or_path: the model's folder or hub id. Alias: model.
        task: whose images: digits, mnist, cifar10 or images, with options if any.
        output_dir: where to; must be new or empty. Alias: out.
        targeted: each image shall be taken for the class after its own.
        examples: so many images at most, evenly spread over the split.
        split: "train", "dev" or "test"; the test split, or dev without one, when null.
        data: folder or hub data set, where the task does not name its own.
        task_options: options of the task.
        scheme: quantize the float model while loading.
        compute_dtype: of quantized layers' products.
        device: where the model runs.
        threads: CPU threads.
    """
    from zotune.attacks.task import attack_task

    _need(model_name_or_path, output_dir)
    source = EvalConfig(
        model_name_or_path, task, task_options or {}, data=data, split=split,
        max_eval_samples=examples, scheme=scheme, compute_dtype=compute_dtype, device=device,
        threads=threads,
    )  # fmt: skip
    found = attack_task(config, source, output_dir, targeted)
    return {"out": output_dir, **found.as_dict()}


def names(what: Literal["methods", "spaces", "tasks", "formats"]) -> dict[str, Any]:
    """List methods, spaces, tasks or formats.

    Args:
        what: what to list.
    """
    from zotune.cli.listing import LISTS

    return {"what": what, what: LISTS[what]()}


def benchmark(
    config: BenchConfig, what: Literal["step", "noise", "memory", "roofline"]
) -> dict[str, Any]:
    """Measure steps, noise, memory or how near the machine's peaks they come.

    Args:
        config: what to measure and how.
        what: the benchmark.
    """
    from zotune.bench.run import run

    return run(what, config)


def doctor() -> dict[str, Any]:
    """Say what this machine offers and what is wrong with it."""
    from zotune.cli.doctor import examine

    return examine()


def _need(model: str, out: str) -> None:
    if not model:
        raise BadInput("no model: give --model FOLDER")
    if not out:
        raise BadInput("no output folder: give --out DIR")


def mask(config: Any) -> dict[str, Any]:
    """What of the first training examples the loss counts."""
    from zotune.cli.masks import first_examples

    return {"examples": first_examples(config)}


# The functions are not called train, ...: jsonargparse looks their names up in the parent packages,
# whose lazy faces would then import torch.
COMMANDS: dict[str, tuple[Any, Any, str]] = {
    "train": (train_model, TrainConfig, "Train a model with forward passes only."),
    "eval": (evaluate_model, EvalConfig, "Evaluate a model on a task."),
    "quantize": (quantize_model, None, "Quantize a float model and save it."),
    "attack": (attack_model, AttackConfig, "Test a classifier of images by black-box attacks."),
    "replay": (replay_run, None, "Rebuild a tuned model from its base and its journal."),
    "bench": (benchmark, BenchConfig, "Measure steps, noise, memory and the machine's peaks."),
    "list": (names, None, "List methods, spaces, tasks or formats."),
    "doctor": (doctor, None, "Say what this machine offers and what is wrong with it."),
}
