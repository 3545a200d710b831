"""A model's batches passed through it piece by piece, each piece behind the quantized ones.

A decoder or encoder is a row of blocks: what enters one of them is kept for all batches, and its
layers are measured by running it alone. What is outside the blocks, and models without any, are
measured by running the model from its start. Batches have one shape and no padding, so masks and
positions are those of the first batch; where a block gets anything else that differs between
batches, or the blocks do not follow upon each other, the whole model is run as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zotune.quant.calibrate.stage import Call, Reached, Stage, watched


def stages(
    model: nn.Module, layers: Mapping[str, nn.Module], inputs: Sequence[Tensor]
) -> Iterator[Stage]:
    """The pieces of a model in the order in which they run; quantize one before taking the next.

    Args:
        model: called with one batch at a time.
        layers: what is to be quantized, by name.
        inputs: batches of one shape.
    """
    batches, blocks = list(inputs), _blocks(model, layers)
    calls = _calls(model, list(blocks.values()), batches) if blocks else None
    if calls is None:
        yield Stage(model, layers, batches)
        return
    inside = tuple(f"{name}." for name in blocks)
    order = _order(model, layers, batches[0])
    first = min(k for k, name in enumerate(order) if name.startswith(inside))
    if order[:first]:
        yield Stage(model, {name: layers[name] for name in order[:first]}, batches)
    hidden = [_entry(model, next(iter(blocks.values())), batch).x for batch in batches]
    for (name, block), call in zip(blocks.items(), calls, strict=True):
        own = {n: layer for n, layer in layers.items() if n.startswith(f"{name}.")}
        stage = Stage(block, own, hidden, call)
        yield stage
        for k, x in enumerate(hidden):
            hidden[k] = _first(stage.run(x))
    after = {n: layers[n] for n in order[first:] if not n.startswith(inside)}
    if after:
        yield Stage(model, after, batches)


def _blocks(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The list of modules that holds most of the layers, by name; empty if there is none."""
    best: dict[str, nn.Module] = {}
    most = 0
    for name, module in model.named_modules():
        held = sum(n.startswith(f"{name}.") for n in layers)
        if isinstance(module, nn.ModuleList) and held > most:
            best, most = {f"{name}.{k}": block for k, block in enumerate(module)}, held
    return best


def _calls(model: nn.Module, blocks: list[nn.Module], batches: list[Tensor]) -> list[Call] | None:
    """How each block is called; None if blocks are not in a row, or batches differ in more."""
    calls: list[Call] = []
    outputs: list[Any] = []
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(watched(block, calls.append))
            handle = block.register_forward_hook(lambda *call: outputs.append(_first(call[2])))
            stack.callback(handle.remove)
        model(batches[0])
    in_a_row = len(calls) == len(blocks) and all(
        output is call.x for output, call in zip(outputs, calls[1:], strict=False)
    )
    if not in_a_row:
        return None
    entries = (_entry(model, blocks[0], batch) for batch in batches[1:])
    same = all(_same(entry[1:], calls[0][1:]) for entry in entries)
    return [call._replace(x=calls[0].x) for call in calls] if same else None


def _entry(model: nn.Module, block: nn.Module, batch: Tensor) -> Call:
    """How the first block is called; the rest of the forward is left out."""
    found: list[Call] = []

    def stop(call: Call) -> None:
        found.append(call)
        raise Reached

    with watched(block, stop):
        model(batch)
    return found[0]


def _order(model: nn.Module, layers: Mapping[str, nn.Module], batch: Tensor) -> list[str]:
    """Names of the layers in the order in which they first run."""
    seen: dict[str, None] = {}
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(watched(layer, partial(_note, seen, name)))
        model(batch)
    return list(seen)


def _note(seen: dict[str, None], name: str, _: Call) -> None:
    seen.setdefault(name)


def _first(output: Any) -> Tensor:
    """A block's hidden states, which may come with other things."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    return bool(one is other or one == other)
