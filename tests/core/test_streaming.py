"""A streamed step is a step: every method, on layers that are moved when they are next visited."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import toys
from torch import nn

from zotune import methods
from zotune.core import secret, spaces
from zotune.core.backprop import Backprop
from zotune.core.evaluator import TorchEvaluator
from zotune.core.perturbation import Perturbation
from zotune.core.space import SpaceSpec
from zotune.core.step import Tuner
from zotune.core.streaming import StreamedBlocks
from zotune.models.streaming import Store, Stream
from zotune.models.streaming.device import DeviceUnit
from zotune.quant import quantize_model_
from zotune.training import privacy

SCHEMES = {"scales": "int4-g8", "zeros": "int4-g8-asym", "codes": "int8-channel"}
NAMES = [n for n, e in methods.entries().items() if not isinstance(methods.get(n), Backprop)]
STEPS = 5


def model_for(space: str) -> nn.Module:
    model = toys.layered()
    if space in SCHEMES:
        quantize_model_(model, SCHEMES[space])
    return model


def tuner_for(name: str, space: str, streamed: bool) -> tuple[nn.Module, Tuner, Stream | None]:
    known = methods.entries()[name].options
    given = {"queries": 3, "weight_decay": 0.1, "units": "relative", "eps": 0.05, "lr": 0.05}
    if space == "codes":
        given |= {"eps": 1.0, "lr": 2.0, "weight_decay": 0.0}
    if space not in ("weights", "lora"):
        del given["weight_decay"]
    model = model_for(space)
    method = methods.get(name, **{k: v for k, v in given.items() if k in known})
    method = privacy.planned(method, examples=200, steps=STEPS)
    assert not isinstance(method, Backprop)
    stream = Stream(model, Store(), None) if streamed else None
    targets = {"lora": "lora(targets='up|down')"}
    spec = spaces.parse(targets.get(space, space))
    assert isinstance(spec, SpaceSpec)
    space_ = spec.build(model, toys.observe)
    blocks = None if stream is None else StreamedBlocks(space_, stream)
    evaluator = TorchEvaluator(model, space_, toys.cross_entropy)
    tuner = Tuner(space_, method, 1, evaluator=evaluator, total=STEPS)
    if blocks is not None:
        blocks.serve_(tuner)
    return model, tuner, stream


def step(tuner: Tuner, number: int) -> float:
    here = [toys.batch(4, number + k) for k in range(tuner.now.batches)]
    return tuner.step(here if len(here) > 1 else here[0]).loss


@pytest.mark.parametrize("name", NAMES)
def test_every_method_moves_as_it_does_in_memory(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secret, "noise", lambda law, scale: scale // 2)
    space = methods.entries()[name].spaces[0]
    model, tuner, _ = tuner_for(name, space, False)
    streamed, late, stream = tuner_for(name, space, True)
    assert stream is not None
    for number in range(STEPS):
        assert step(tuner, number) == step(late, number)
    late.settle_()
    assert toys.digest(model) == toys.digest(streamed)
    stream.close()


@pytest.mark.parametrize("space", ["weights", "scales", "codes", "lora", "adapter"])
@pytest.mark.parametrize("held", [False, True])
def test_layers_that_are_copied_to_where_they_run_move_as_in_memory(
    space: str, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a GPU's layers, with the CPU in its place."""
    name = "zo-sign" if space == "codes" else "zo-adam"
    model, tuner, _ = tuner_for(name, space, False)
    real = Stream.__init__

    def copying(self: Stream, model: nn.Module, store: Store, limit: int | None) -> None:
        real(self, model, store, limit, partial(DeviceUnit, device=torch.device("cpu")))
        for unit in self.units:
            unit.held = held

    monkeypatch.setattr(Stream, "__init__", copying)
    streamed, late, stream = tuner_for(name, space, True)
    assert stream is not None
    for number in range(STEPS):
        assert step(tuner, number) == step(late, number)
    late.settle_()
    stream.close()
    assert all(stream.store.place(t) for u in stream.units for t in u.tensors)
    assert toys.digest(model) == toys.digest(streamed)


@pytest.mark.parametrize("space", ["weights", "scales", "codes", "lora", "norms"])
def test_layers_wait_for_the_next_visit_and_nothing_is_lost(space: str) -> None:
    name = "zo-sign" if space == "codes" else "mezo"
    model, tuner, _ = tuner_for(name, space, False)
    streamed, late, stream = tuner_for(name, space, True)
    assert stream is not None
    step(tuner, 0), step(late, 0)
    inside = {b.name for b in late.space if b.name.startswith("layers.")}
    assert inside
    assert set(late.moves.left) == inside
    assert toys.digest(model) != toys.digest(streamed)
    step(tuner, 1), step(late, 1)
    saved, wanted = late.state_tensors(), tuner.state_tensors()
    assert not late.moves.left
    assert all(torch.equal(saved[k], wanted[k]) for k in wanted)
    step(late, 2)
    late.load_({k: v.clone() for k, v in wanted.items()}, 2, 2)
    assert not late.moves.left
    step(tuner, 2), step(late, 2)
    late.freeze_([])
    assert toys.digest(model) == toys.digest(streamed)
    stream.close()


def test_a_layer_that_a_forward_goes_round_is_moved_at_once() -> None:
    streamed, late, stream = tuner_for("mezo", "weights", True)
    assert stream is not None
    layers = streamed.layers
    assert isinstance(layers, nn.ModuleList)
    skipped = layers[1]
    object.__setattr__(streamed, "layers", [m for m in layers if m is not skipped])
    streamed._modules.pop("layers")
    step(late, 0)
    assert late.moves.left
    assert not any(name.startswith("layers.1.") for name in late.moves.left)
    stream.close()


def test_directions_that_learn_from_the_moved_blocks_leave_none_behind() -> None:
    learning = [
        n for n in NAMES
        if type(methods.get(n).perturbation).learn_ is not Perturbation.learn_  # type: ignore[union-attr]
    ]  # fmt: skip
    assert learning
    _, late, stream = tuner_for(learning[0], "weights", True)
    assert stream is not None
    step(late, 0)
    assert not late.moves.left
    stream.close()


def test_what_a_method_keeps_of_a_block_comes_and_goes_with_its_layer() -> None:
    model = toys.layered()
    with torch.no_grad():
        wide = nn.Linear(64, 64)
        model.layers[0].add_module("wide", wide)  # type: ignore[index,union-attr]
    stream = Stream(model, Store(), None)
    spec = spaces.parse("weights")
    assert isinstance(spec, SpaceSpec)
    space = spec.build(model)
    blocks = StreamedBlocks(space, stream)
    tuner = Tuner(space, methods.get("zo-adam", lr=0.1), 1)  # type: ignore[arg-type]
    blocks.serve_(tuner)
    state = next(iter(tuner.state.values()))["layers.0.wide.weight"]
    unit = blocks.units["layers.0.wide.weight"]
    assert all(any(t is held for held in unit.tensors) for t in state.values())
    assert all(stream.store.place(t) is not None for t in state.values())
    stream.close()
