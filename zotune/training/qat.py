"""ZeroQAT: quantization-aware training by forward passes (2025, arXiv 2509.00031).

    float model ─► fake-quantized layers ─► search (transforms, thresholds) ─► the ordinary run
                                                        on L(Q(W +- eps u)) ─► QuantLinear, folded

Nothing of it is a second training loop: `prepared` makes a model whose layers are trained through
their rounding, `zotune.training.train` trains it with any method on any of the spaces `latents`,
`clipping`, `transforms` and `activations`, and where the run ends the layers become ordinary
quantized ones, so that what is evaluated last is what is saved.

Changed from the paper: where training starts is searched by forward passes, too, instead of two to
four epochs of backprop; eps and the learning rate are measured (`auto`); a shift is tuned only
where the module before can take it up.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zotune import tasks
from zotune.core.spaces.latents import QUERY_VALUE
from zotune.errors import BadInput
from zotune.models import Loaded
from zotune.quant.calibrate.folding import folding
from zotune.quant.export import Exporter, exporter
from zotune.quant.model import DEFAULT_EXCLUDE, choose, float_dtype
from zotune.quant.qat import attach_, fake_layers, fake_quantize_, folds_on, freeze_, search
from zotune.quant.scheme import Scheme
from zotune.tasks.task import Task
from zotune.training.assemble import final_split, measure
from zotune.training.batches import Batches
from zotune.training.config import TrainConfig
from zotune.training.folders import use_threads, write_model
from zotune.training.loop import train
from zotune.training.opening import open_model, open_task, train_split
from zotune.training.report import Result
from zotune.training.resume import check_folder

log = logging.getLogger("zotune")


@dataclass(frozen=True)
class Preparation:
    """How a float model becomes one that is trained through its rounding.

    Args:
        scheme: "int2-g64-asym", "int4-channel-a4", ...
        exclude: names or patterns of layers to leave alone.
        smooth: whether inputs are transformed.
        clip: whether thresholds are searched; otherwise they start at the weights' extremes.
        compensate: whether weights make up for each other's rounding before training, as in GPTQ.
        clip_inputs: whether activations may be clipped, too, which only zotune's own format keeps.
        light: quantize everything for good but the query and value projections, and tune those.
        examples: training examples that the search looks at.
    """

    scheme: str = "int4-g64"
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    smooth: bool = True
    clip: bool = True
    compensate: bool = True
    clip_inputs: bool = False
    light: bool = False
    examples: int = 64

    def space(self, model: nn.Module) -> str:
        """What is tuned where the user does not say: whatever this model has of it."""
        wanted = {
            "clipping": True,
            "transforms": bool(folds_on(model)),
            "latents": True,
            "activations": self.clip_inputs,
        }
        return " + ".join(name for name, tuned in wanted.items() if tuned)


@dataclass(frozen=True)
class Outcome:
    """What quantization-aware training came to.

    texts: for each task by name its metric for the "float" model, rounded to nearest ("rtn"),
    where training started ("start") and of the model that was saved ("after"). refused: layers
    whose inputs no module before them can transform, with the reason.
    """

    result: Result
    texts: dict[str, dict[str, float]]
    refused: dict[str, str]
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
        BadInput: a scheme that does not fit, or a model that is quantized already.
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
    loaded = _opened(config, model, how, to)
    texts_found: dict[str, dict[str, float]] = {name: {} for name in measured}

    def note(state: str) -> None:
        for name, each in measured.items():
            value = measure(config, each, each.prepare(loaded), final_split(each))[each.metric]
            texts_found[name][state] = value
            log.info("%s, %s: %s %.4f", name, state, each.metric, value)

    note("float")
    refused = fake_(loaded.model, how, to.scale_dtype(float_dtype(loaded.model)))
    note("rtn")
    began = time.perf_counter()
    start_(loaded, task, how, config)
    seconds = time.perf_counter() - began
    note("start")
    space = config.space or how.space(loaded.model)
    result = train(dataclasses.replace(config, space=space), model=loaded, task=task)
    if to.name != "zotune":
        write_model(loaded.model, config.out / "model", loaded, to)
    note("after")
    return Outcome(result, texts_found, refused, seconds)


def _exporter(format: str, how: Preparation, space: str | None) -> Exporter:
    to = exporter(format, Scheme.parse(how.scheme))
    if to.name != "zotune" and (how.clip_inputs or "activations" in (space or "")):
        raise BadInput(
            f"format {format!r} has no place for clipped activations; leave clip_inputs and the "
            "space 'activations' out, or use format 'zotune'"
        )
    return to


def _opened(
    config: TrainConfig, model: nn.Module | Loaded | None, how: Preparation, to: Exporter
) -> Loaded:
    """The float model, which takes the scheme and can be exported."""
    loaded = open_model(config, model)
    if loaded.format != "float":
        raise BadInput(
            f"{loaded.path} is quantized already; training through rounding starts from floats"
        )
    scheme = Scheme.parse(how.scheme)
    to.check(loaded.model, choose(loaded.model, scheme, how.exclude), scheme)
    return loaded


def fake_(
    model: nn.Module, how: Preparation, stored: torch.dtype = torch.float32
) -> dict[str, str]:
    """Replace the model's layers, whose scales the file will hold in `stored`; the layers whose
    inputs cannot be transformed, with the reason."""
    found = folding(model)
    names = fake_quantize_(model, how.scheme, how.exclude)
    for layer in fake_layers(model).values():
        layer.scale_dtype = stored if stored == torch.float16 else torch.float32
    attach_(model, found.folds if how.smooth else ())
    log.info("%d layers are trained through their rounding to %s", len(names), how.scheme)
    refused = {name: why for name, why in found.refused.items() if name in names}
    if how.smooth and refused:
        first, why = next(iter(refused.items()))
        log.warning("the inputs of %d layers are not transformed, such as those of %s: %s",
                    len(refused), first, why)  # fmt: skip
    return refused


def start_(loaded: Loaded, task: Task, how: Preparation, config: TrainConfig) -> None:
    """Search where training starts, on the first training examples of the run."""
    prepared = task.prepare(loaded)
    batches = Batches(task, train_split(task), config.examples, config.seed)
    count = -(-min(how.examples, len(batches.examples)) // batches.size)

    def run() -> float:
        total = whole = 0.0
        for step in range(count):
            loss, weight = task.losses(prepared, batches.whole(step).to(config.device))
            total += float((loss.double() * weight).sum())
            whole += float(weight.double().sum())
        return total / max(whole, 1e-30)

    unused = search.search_(
        loaded.model, run, smooth=how.smooth, clip=how.clip, compensate=how.compensate,
        clip_inputs=how.clip_inputs,
    )  # fmt: skip
    if unused:
        log.warning("%d layers are not used by this task and are rounded to nearest: %s",
                    len(unused), ", ".join(unused[:5]))  # fmt: skip
    if how.light:
        kept = [name for name in fake_layers(loaded.model)
                if re.search(QUERY_VALUE, f"{name}.weight")]  # fmt: skip
        if not kept:
            raise BadInput("this model has no query and value projections known by name; leave "
                           "light out and choose with latents(pattern=...)")  # fmt: skip
        frozen = freeze_(loaded.model, kept)
        log.info("%d layers are quantized for good, %d are tuned", len(frozen), len(kept))


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
        "exceptions": {"unfolded": found.refused},
    }
