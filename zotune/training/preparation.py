"""From a float model to where its training through the rounding starts, and the same again."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from zotune.core.spaces.latents import QUERY_VALUE
from zotune.errors import BadInput, JournalError
from zotune.models import Loaded
from zotune.quant.calibrate.folding import folding
from zotune.quant.calibrate.rotate import Rotate
from zotune.quant.export import Exporter, exporter
from zotune.quant.model import DEFAULT_EXCLUDE, float_dtype
from zotune.quant.qat import attach_, fake_layers, fake_quantize_, folds_on, freeze_, search
from zotune.quant.scheme import Scheme
from zotune.tasks.task import Task
from zotune.training.batches import Batches
from zotune.training.config import TrainConfig
from zotune.training.opening import open_task, train_split

log = logging.getLogger("zotune")
Exceptions = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Preparation:
    """How a float model becomes one that is trained through its rounding.

    Args:
        scheme: "int2-g64-asym", "int4-channel-a4", ...
        exclude: names or patterns of layers to leave alone.
        rotate: whether hidden states are turned first, by matrices that the run's seed draws
            (`zotune.quant.calibrate.rotate`).
        smooth: whether inputs are transformed.
        clip: whether thresholds are searched; otherwise they start at the weights' extremes.
        compensate: whether weights make up for each other's rounding before training, as in GPTQ.
        clip_inputs: whether activations may be clipped, too, which only zotune's own format keeps.
        light: quantize everything for good but the query and value projections, and tune those.
        examples: training examples that the search looks at.
    """

    scheme: str = "int4-g64"
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    rotate: bool = False
    smooth: bool = True
    clip: bool = True
    compensate: bool = True
    clip_inputs: bool = False
    light: bool = False
    examples: int = 64

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Preparation:
        """From `dataclasses.asdict`, with lists where JSON has no tuples."""
        return cls(**{**values, "exclude": tuple(values["exclude"])})

    def space(self, model: nn.Module) -> str:
        """What is tuned where the user does not say: whatever this model has of it."""
        wanted = {
            "clipping": True,
            "transforms": bool(folds_on(model)),
            "latents": True,
            "activations": self.clip_inputs,
        }
        return " + ".join(name for name, tuned in wanted.items() if tuned)


def fake_(
    model: nn.Module, how: Preparation, stored: torch.dtype = torch.float32, seed: int = 0
) -> Exceptions:
    """Replace the model's layers, whose scales the file will hold in `stored`; the layers whose
    inputs cannot be transformed ("unfolded") or turned ("unrotated"), with the reason."""
    turned = Rotate(seed=seed).rotate_(model) if how.rotate else {}
    found = folding(model)
    names = fake_quantize_(model, how.scheme, how.exclude)
    for layer in fake_layers(model).values():
        layer.scale_dtype = stored if stored == torch.float16 else torch.float32
    attach_(model, found.folds if how.smooth else ())
    log.info("%d layers are trained through their rounding to %s", len(names), how.scheme)
    refused = found.refused if how.smooth else {}
    exceptions = {
        what: {name: why for name, why in left.items() if name in names}
        for what, left in (("unfolded", refused), ("unrotated", turned))
    }
    for what, left in exceptions.items():
        if left:
            first, why = next(iter(left.items()))
            log.warning("%s: the inputs of %d layers, such as those of %s: %s",
                        what, len(left), first, why)  # fmt: skip
    return exceptions


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


def written(how: Preparation, to: Exporter) -> dict[str, Any]:
    """What a journal says of a preparation."""
    return {**dataclasses.asdict(how), "format": to.name}


def again_(
    loaded: Loaded, header: Mapping[str, Any], task: Task | None = None
) -> tuple[Loaded, Exporter | None]:
    """Prepare a float model as the run of this journal did: the same search, on the same examples,
    finds the same start.

    Args:
        header: the journal's.
        task: the run's, where it was given as an object.

    Returns:
        the model, and what the run's own was written in; None for zotune's own format. Models that
        were not prepared come back as they are.

    Raises:
        JournalError: if the journal names no task.
    """
    if not header.get("prepared"):
        return loaded, None
    config = TrainConfig.of(header["config"])
    if task is None and not config.task:
        raise JournalError(
            "this run was trained through its rounding from a start that was searched on its task, "
            "which the journal does not name; give task="
        )
    values = dict(header["prepared"])
    name = values.pop("format")
    how = Preparation.of(values)
    to = exporter(name, Scheme.parse(how.scheme))
    fake_(loaded.model, how, to.scale_dtype(float_dtype(loaded.model)), config.seed)
    start_(loaded, task or open_task(config), how, config)
    return loaded, None if to.name == "zotune" else to
