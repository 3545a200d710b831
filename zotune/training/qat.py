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
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from zotune import tasks
from zotune.core.spaces.latents import QUERY_VALUE
from zotune.errors import BadInput
from zotune.models import Loaded
from zotune.quant.calibrate.folding import folding
from zotune.quant.model import DEFAULT_EXCLUDE
from zotune.quant.qat import attach_, fake_layers, fake_quantize_, folds_on, freeze_, search
from zotune.tasks.task import Task
from zotune.training.assemble import final_split
from zotune.training.batches import Batches, spread
from zotune.training.config import TrainConfig
from zotune.training.loop import train
from zotune.training.opening import open_model, open_task, train_split
from zotune.training.report import Result

log = logging.getLogger("zotune")


@dataclass(frozen=True)
class Preparation:
    """How a float model becomes one that is trained through its rounding.

    Args:
        scheme: "int2-g64-asym", "int4-channel-a4", ...
        exclude: names or patterns of layers to leave alone.
        smooth: whether inputs may be transformed, and the strengths searched.
        clip: whether thresholds are searched; otherwise they start at the extremes.
        clip_inputs: whether activations may be clipped, too, which only zotune's own format keeps.
        light: quantize everything for good but the query and value projections, and tune those.
        examples: training examples that the search looks at.
    """

    scheme: str = "int4-g64"
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    smooth: bool = True
    clip: bool = True
    clip_inputs: bool = False
    light: bool = False
    examples: int = 64

    @property
    def space(self) -> str:
        """What is tuned where the user does not say."""
        wanted = {
            "clipping": True,
            "transforms": self.smooth and not self.light,
            "latents": True,
            "activations": self.clip_inputs,
        }
        return " + ".join(name for name, tuned in wanted.items() if tuned)


@dataclass(frozen=True)
class Outcome:
    """What quantization-aware training came to.

    texts: for each text or task by name its metric of the float model, rounded to nearest, where
    training started and of the exported model. refused: layers whose inputs no module before them
    can transform, with the reason.
    """

    result: Result
    texts: dict[str, dict[str, float]]
    refused: dict[str, str]
    search_seconds: float
    loaded: Loaded = field(repr=False, compare=False)


def zeroqat(
    config: TrainConfig,
    how: Preparation | None = None,
    *,
    texts: Sequence[str] = (),
    model: Loaded | None = None,
    task: Task | None = None,
) -> Outcome:
    """Train a float model through its rounding and leave the quantized one in the run folder.

    Args:
        config: an ordinary run; `scheme` goes before that of `how`. Space and method are
            `how.space` and "auto" where the configuration names none.
        how: what is rounded and where training starts.
        texts: tasks to be measured before and after as well, such as "wikitext2", "ptb" and
            "tinystories"; the run's own task always is.
        model, task: objects instead of the configuration's names.

    Raises:
        BadInput: a scheme that does not fit, or a model that is quantized already.
    """
    how = how or Preparation()
    if config.scheme is not None:
        how = dataclasses.replace(how, scheme=config.scheme)
    config = dataclasses.replace(config, scheme=None, space=config.space or how.space)
    task = task or open_task(config)
    measured = {task.name: task, **{name: tasks.get(name) for name in texts}}
    loaded = open_model(config, model)
    if loaded.format != "float":
        raise BadInput(f"{loaded.path} is quantized already; training through rounding starts from "
                       "the float model")  # fmt: skip
    numbers: dict[str, dict[str, float]] = {name: {} for name in measured}
    _measure(numbers, "float", measured, loaded, config)
    refused = folding(loaded.model).refused
    began = time.perf_counter()
    for state in prepare_(loaded, task, how, config):
        _measure(numbers, state, measured, loaded, config)
    seconds = time.perf_counter() - began
    result = train(config, model=loaded, task=task)
    _measure(numbers, "after", measured, loaded, config)
    return Outcome(result, numbers, refused, seconds, loaded)
