"""What a run is to freeze and where features go; what cannot work is refused here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from zotune.core.space import Space, SpaceSpec, SpaceSum
from zotune.core.spaces import Head
from zotune.errors import BadInput
from zotune.models.cut import Trunk, layers_of
from zotune.tasks.task import Task
from zotune.training.config import TrainConfig
from zotune.training.freezing.codec import Codec, parse_codec
from zotune.training.freezing.schedule import Fixed, Schedule, depth_of, parse_freeze


@dataclass(frozen=True)
class Plan:
    """When to freeze, and where and how features are cached (None: they are not)."""

    schedule: Schedule
    codec: Codec
    cache: Path | None = None
    limit: int | None = None

    @classmethod
    def of(cls, config: TrainConfig) -> Plan | None:
        """From the keys of a configuration; None where nothing is frozen."""
        given = {"cache_dir": config.cache_dir, "cache_limit": config.cache_limit,
                 "cache_codec": config.cache_codec}  # fmt: skip
        asked = [name for name, value in given.items() if value is not None]
        if config.freeze is None:
            if asked:
                raise BadInput(f"{asked[0]} is given, but nothing is frozen: add freeze=0.5@0")
            return None
        if config.cache_dir is None and asked:
            raise BadInput(f"{asked[0]} is given, but features are not cached: add cache_dir")
        return cls(
            parse_freeze(config.freeze),
            parse_codec(config.cache_codec or "lossless"),
            None if config.cache_dir is None else Path(config.cache_dir).expanduser(),
            None if config.cache_limit is None else parse_bytes(config.cache_limit),
        )

    def depths(self, layers: int) -> list[int]:
        """The depths that this plan may come to."""
        if isinstance(self.schedule, Fixed):
            return [depth_of(share, layers) for share, _ in self.schedule.points]
        return list(range(1, depth_of(self.schedule.most, layers) + 1))


def check_early(
    plan: Plan,
    config: TrainConfig,
    spec: SpaceSpec,
    model: nn.Module,
    task: Task,
) -> None:
    """Refuse, before anything is run, what cannot work.

    Raises:
        BadInput: no layers, a freeze point that comes too late or freezes nothing,
            a cache that nobody would read twice, a head that reads every layer, inputs that the
            task makes anew at every step.
    """
    if plan.cache is not None and type(task).varied is not Task.varied:
        raise BadInput(
            f"task {task.name!r} makes its inputs anew at every step, so features of an example "
            "are never the same: drop cache_dir"
        )
    parts = spec.parts if isinstance(spec, SpaceSum) else (spec,)
    if any(isinstance(part, Head) and part.layers == "all" for part in parts):
        raise BadInput(
            "this head reads every layer, those that would be frozen too (auto's default for an "
            "encoder): give space='head' or space='adapter(...)+head', or drop freeze"
        )
    layers = len(layers_of(model))
    depths = plan.depths(layers)
    if not depths or min(depths) < 1 or len(set(depths)) < len(depths):
        raise BadInput(
            f"freeze={config.freeze!r} comes to depths {depths} of {layers} layers; want each "
            "point to freeze at least one layer more than the one before"
        )
    if isinstance(plan.schedule, Fixed):
        _check_steps(plan, plan.schedule, config, len(task.split("train")))


def _check_steps(plan: Plan, schedule: Fixed, config: TrainConfig, examples: int) -> None:
    steps = [step for _, step in schedule.points]
    if steps[-1] >= config.max_steps:
        raise BadInput(
            f"freeze at step {steps[-1]}, but the run ends after {config.max_steps}: freeze "
            "earlier, or raise max_steps"
        )
    if plan.cache is None:
        return
    ends = [*steps[1:], config.max_steps]
    for step, end in zip(steps, ends, strict=True):
        seen = (end - step) * config.examples
        if seen <= examples:
            raise BadInput(
                f"from step {step} to {end} no example comes twice ({seen} of {examples}), so its "
                "cached features would never be read again: drop cache_dir, raise max_steps, or "
                "train on fewer examples"
            )


def check_blocks(plan: Plan, space: Space, levels: dict[str, int], straddling: Sequence[str],
                 layers: int) -> None:  # fmt: skip
    """Refuse tuned blocks that the freeze points contradict.

    levels: by name of a block, the least depth that freezes it; `straddling` blocks lie on both
    sides of a border.

    Raises:
        BadInput: a block that would never move, or would go on moving below the border, or none
            that is left.
    """
    if straddling:
        raise BadInput(
            f"block {straddling[0]!r} is used below the freeze point and above it (tied weights, "
            "or a tensor of the model itself): what is cached would be out of date; leave it out "
            "of the space by its targets or pattern"
        )
    deepest = max(plan.depths(layers))
    if all(levels.get(b.name, layers + 1) <= deepest for b in space):
        raise BadInput(
            f"nothing is left to tune above {deepest} of {layers} layers: freeze a smaller share, "
            "or add a space above, such as head"
        )
    if isinstance(plan.schedule, Fixed) and (first := plan.schedule.depth(0, layers)):
        never = [b.name for b in space if levels.get(b.name, layers + 1) <= first]
        if never:
            raise BadInput(
                f"{len(never)} tuned blocks lie below the freeze point of step 0 and would never "
                f"move, such as {never[0]!r}: freeze later (such as 0.5@100), or leave them out of "
                "the space by its targets or pattern"
            )


def block_levels(trunk: Trunk, space: Space, deepest: int) -> tuple[dict[str, int], list[str]]:
    """By name of a block the least depth that freezes it, for those below; and the blocks that
    straddle a border within `deepest` layers."""
    levels, straddling = dict[str, int](), list[str]()
    known = trunk.levels()
    units = {id(unit.module) for unit in trunk.units}
    for block in space:
        found = {known.get(id(owner.module)) for owner in block.owners}
        whole = any(id(m) in units for o in block.owners for m in _strictly_inside(o.module))
        inside = {level for level in found if level is not None}
        if whole or (len(found) > 1 and inside and min(inside) <= deepest):
            straddling.append(block.name)
        elif len(found) == 1 and inside:
            levels[block.name] = inside.pop()
    return levels, straddling


def _strictly_inside(module: nn.Module) -> Iterator[nn.Module]:
    return (m for m in module.modules() if m is not module)


def frozen_names(levels: Mapping[str, int], depth: int) -> set[str]:
    """The blocks that stay as they are once `depth` layers are frozen."""
    return {name for name, level in levels.items() if level <= depth}


_SIZE = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_bytes(text: str, option: str = "cache_limit") -> int:
    """A number of bytes as people write it, given as the value of `option`.

    >>> parse_bytes("2GB"), parse_bytes("1.5 MB"), parse_bytes("4096")
    (2000000000, 1500000, 4096)
    """
    plain = str(text).strip().lower().removesuffix("b").strip()
    unit = plain[-1:] if plain[-1:] in _SIZE else ""
    try:
        value = float(plain.removesuffix(unit)) * _SIZE[unit]
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise BadInput(f"{option}={text!r} is no number of bytes; write '500MB' or '2GB'")
    return int(value)
