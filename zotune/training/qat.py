"""ZeroQAT: quantization-aware training by forward passes (2025, arXiv 2509.00031).

    float model ─► fake-quantized layers ─► search (transforms, thresholds) ─► the ordinary run
                                                        on L(Q(W +- eps u)) ─► QuantLinear, folded

Nothing of it is a second training loop: `zotune.training.preparation` makes a model whose layers
are trained through their rounding, `zotune.training.train` trains it with any method on any of the
spaces `latents`, `clipping`, `transforms` and `activations`, and where the run ends the layers
become ordinary quantized ones, so that what is evaluated last is what is saved.

Changed from the paper: where training starts is searched by forward passes, too, instead of two to
four epochs of backprop; eps and the learning rate are measured (`auto`); a shift is tuned only
where the module before can take it up.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from zotune import tasks
from zotune.errors import BadInput
from zotune.models import Loaded
from zotune.quant.export import Exporter, exporter
from zotune.quant.model import DEFAULT_EXCLUDE, choose, float_dtype
from zotune.quant.scheme import Scheme
from zotune.tasks.task import Task
from zotune.training.config import TrainConfig
from zotune.training.evaluation import final_split, measure
from zotune.training.folders import use_threads, write_model
from zotune.training.loop import train
from zotune.training.opening import open_model, open_task
from zotune.training.preparation import Exceptions, Preparation, fake_, start_, written
from zotune.training.report import Result
from zotune.training.resume import check_folder

log = logging.getLogger("zotune")


@dataclass(frozen=True)
class Outcome:
    """What quantization-aware training came to.

    texts: for each task by name its metric for the "float" model, rounded to nearest ("rtn"),
    (behind a rotation, if any), where training started ("start") and of the model that was saved
    ("after"). exceptions: layers whose inputs no module before them can transform ("unfolded") or
    turn ("unrotated"), with the reason.
    """

    result: Result
    texts: dict[str, dict[str, float]]
    exceptions: Exceptions
    search_seconds: float


def zeroqat(
    config: TrainConfig,
    how: Preparation | None = None,
    *,
    format: str = "zotune",
    texts: Sequence[str] = (),
    model: nn.Module | Loaded | None = None,
    task: Task | None = None,
) -> Outcome:
    """Train a float model through its rounding; the run folder's `model/` is the quantized one.

    Args:
        config: an ordinary run; its `scheme`, if any, goes before that of `how`. Space and method
            are `how.space` and "auto" where it names none. A run is resumed by the same call: the
            search finds the same start again, and the journal goes on from there.
        how: what is rounded, and where training starts.
        format: what `model/` is written in; see `zotune.quant.export`.
        texts: tasks to be measured before and after besides the run's own, such as "wikitext2",
            "ptb" and "tinystories".
        model, task: objects instead of the configuration's names.

    Raises:
        BadInput: a scheme that does not fit, a model that is quantized already, or a head of the
            task's that the format has no place for.
    """
    how = how or Preparation()
    how = dataclasses.replace(how, scheme=config.scheme or how.scheme)
    config = dataclasses.replace(config, scheme=None)
    if not config.resume_from_checkpoint:
        check_folder(config)
    use_threads(config.threads)
    to = _exporter(format, how, config.space)
    task = task or open_task(config)
    measured = {task.name: task, **{name: tasks.get(name) for name in texts}}
    loaded = _opened(config, model, task, how, to)
    texts_found: dict[str, dict[str, float]] = {name: {} for name in measured}

    def note(state: str, own: float | None = None) -> None:
        """Measure; `own` is the task's number where it was measured with a head of the task's."""
        for name, each in measured.items():
            value = own
            if value is None or each is not task:
                value = measure(config, each, each.prepare(loaded), final_split(each))[each.metric]
            texts_found[name][state] = value
            log.info("%s, %s: %s %.4f", name, state, each.metric, value)

    note("float")
    stored = to.scale_dtype(float_dtype(loaded.model))
    exceptions = fake_(loaded.model, how, stored, config.seed)
    note("rtn")
    began = time.perf_counter()
    start_(loaded, task, how, config)
    seconds = time.perf_counter() - began
    note("start")
    space = config.space or how.space(loaded.model)
    loaded = dataclasses.replace(loaded, prepared=written(how, to))
    result = train(dataclasses.replace(config, space=space), model=loaded, task=task)
    if to.name == "zotune":
        note("after", result.after)
    else:
        write_model(loaded.model, config.out / "model", loaded, to)
        note("after")
    return Outcome(result, texts_found, exceptions, seconds)


def _exporter(format: str, how: Preparation, space: str | None) -> Exporter:
    to = exporter(format, Scheme.parse(how.scheme))
    if to.name != "zotune" and (how.clip_inputs or "activations" in (space or "")):
        raise BadInput(
            f"format {format!r} has no place for clipped activations; leave clip_inputs and the "
            "space 'activations' out, or use format 'zotune'"
        )
    return to


def _opened(
    config: TrainConfig,
    model: nn.Module | Loaded | None,
    task: Task,
    how: Preparation,
    to: Exporter,
) -> Loaded:
    """The float model, which takes the scheme and can be exported."""
    loaded = open_model(config, model)
    if loaded.format != "float":
        raise BadInput(
            f"{loaded.path} is quantized already; training through rounding starts from floats"
        )
    if to.name != "zotune" and task.prepare(loaded) is not loaded.model:
        raise BadInput(
            f"format {to.name!r} has no place for the head that task {task.name!r} puts on this "
            "model; use format 'zotune'"
        )
    scheme = Scheme.parse(how.scheme)
    to.check(loaded.model, choose(loaded.model, scheme, how.exclude), scheme)
    return loaded


def quantize_aware(
    options: Mapping[str, Any], scheme: str, format: str, exclude: Sequence[str] | None, **run: Any
) -> dict[str, Any]:
    """`zotune quantize --method "zeroqat(...)"`: options of `Preparation`, of an ordinary run
    (steps, method, space, lr, task, resume, ...), and `texts` joined by +.

    Raises:
        BadInput: for an unknown option.
    """
    own = {f.name for f in dataclasses.fields(Preparation)} - {"scheme", "exclude"}
    given = {k: v for k, v in options.items() if k in own}
    left = DEFAULT_EXCLUDE if exclude is None else tuple(exclude)
    rest = {k: v for k, v in options.items() if k not in own and k != "texts"}
    texts = [name.strip() for name in str(options.get("texts", "")).split("+") if name.strip()]
    found = zeroqat(
        TrainConfig.of({**run, **rest}), Preparation(scheme, left, **given), format=format,
        texts=texts,
    )  # fmt: skip
    result = found.result
    return {
        "out": result.out,
        "scheme": scheme,
        "method": "zeroqat",
        "format": format,
        "texts": found.texts,
        "steps": result.steps,
        "seconds": {"search": found.search_seconds, "training": result.train_seconds},
        "peak_memory_bytes": result.peak_memory_bytes,
        "exceptions": found.exceptions,
    }
