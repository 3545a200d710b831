"""Layers come and go: how many are in memory, in which order, with which results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toys
from torch import nn

from zotune.errors import BadInput, FormatError
from zotune.models import fingerprint, load
from zotune.models.streaming import Store, Stream, Unit
from zotune.quant import formats, quantize_model_

IDS = torch.randint(1, toys.VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))


class Spy(Unit):
    """Notes who is in memory."""

    here: set[str] = set()  # noqa: RUF012
    most = 0
    order: list[str] = []  # noqa: RUF012

    def fetch(self) -> None:
        super().fetch()
        Spy.here.add(self.path)
        Spy.most = max(Spy.most, len(Spy.here))

    def arrive(self) -> None:
        assert self.path in Spy.here
        Spy.order.append(self.path)

    def leave(self) -> None:
        super().leave()
        Spy.here.discard(self.path)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    Spy.here, Spy.most, Spy.order = set(), 0, []


def tight(model: nn.Module) -> int:
    """Memory for three units of a model and no more."""
    stream = Stream(model, Store(), 1 << 40, Spy)
    sizes = sorted(unit.size for unit in stream.units)
    stream.close()
    return sum(sizes[-3:])


@pytest.mark.parametrize("make", [toys.bert, toys.llama, toys.gpt2, toys.layered])
def test_three_units_are_in_memory_at_once_and_the_model_computes_the_same(make: object) -> None:
    assert callable(make)
    model, streamed = make(), make()
    stream = Stream(streamed, Store(), tight(make()), Spy)
    Spy.most, Spy.order = 0, []
    for _ in range(3):
        assert torch.equal(toys.logits_of(model, IDS), toys.logits_of(streamed, IDS))
    assert Spy.most == 3
    assert set(Spy.order) == {unit.path for unit in stream.units}
    assert fingerprint(model) == fingerprint(streamed)
    stream.close()
    assert not Spy.here
    assert torch.equal(toys.logits_of(model, IDS), toys.logits_of(streamed, IDS))


def test_units_that_fit_stay_in_memory() -> None:
    model = toys.layered(layers=6)
    limit = 4 * sum(t.numel() * 4 for t in model.parameters())
    stream = Stream(model, Store(), limit, Spy)
    assert all(unit.held for unit in stream.units)
    few = Stream(toys.layered(layers=6), Store(), int(tight(toys.layered(layers=6)) * 3), Spy)
    held = [unit.held for unit in few.units]
    assert held[0]
    assert not held[-1]
    assert few.need <= few.limit  # type: ignore[operator]
    for each in (stream, few):
        each.close()


def test_a_layer_that_is_called_again_or_skipped_is_there_when_it_runs() -> None:
    model = toys.layered(layers=4)
    order = [0, 2, 2, 1, 3, 0]

    def run(layers: nn.ModuleList) -> torch.Tensor:
        x = torch.ones(1, 2, toys.HIDDEN)
        for k in order:
            x = layers[k](x)
        return x

    wanted = run(model.layers)  # type: ignore[arg-type]
    stream = Stream(model, Store(), tight(toys.layered(layers=4)), Spy)
    for _ in range(2):
        assert torch.equal(run(model.layers), wanted)  # type: ignore[arg-type]
    assert Spy.most == 3
    stream.close()


def test_a_forward_that_fails_leaves_no_trace() -> None:
    model = toys.layered()
    wanted = toys.logits_of(model, IDS)
    stream = Stream(model, Store(), None)
    with pytest.raises(IndexError):
        model(IDS + 1000)
    assert torch.equal(toys.logits_of(model, IDS), wanted)
    stream.close()


def test_tied_tensors_stay_tied() -> None:
    model = toys.gpt2()
    stream = Stream(model, Store(), None)
    assert model.lm_head.weight is model.transformer.wte.weight
    stream.close()


def test_refusals_come_before_a_forward() -> None:
    with pytest.raises(BadInput, match="no row of layers"):
        Stream(toys.small(), Store())
    with pytest.raises(BadInput, match="memory_limit=100"):
        Stream(toys.layered(), Store(), 100)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model"


@pytest.mark.parametrize("scheme", [None, "int4-g8", "int8-channel-a8", "int3-g8-asym"])
def test_a_folder_is_read_onto_a_shelf_as_it_is_read_into_memory(
    folder: Path, scheme: str | None
) -> None:
    model = toys.llama()
    if scheme is not None:
        quantize_model_(model, scheme)
    formats.write(model, folder)
    for dtype in ("auto", "bfloat16"):
        store = Store()
        whole, shelved = load(folder, dtype=dtype), load(folder, dtype=dtype, shelf=store)
        assert toys.digest(whole.model) == toys.digest(shelved.model)
        assert torch.equal(toys.logits_of(whole.model, IDS), toys.logits_of(shelved.model, IDS))
        stored = whole.model.state_dict()
        assert all(store.place(t) is not None for t in shelved.model.state_dict().values())
        assert whole.config.to_dict() == shelved.config.to_dict()
        written = formats.write(shelved.model, folder.with_name("again"), folder)
        again = load(written, dtype=dtype).model.state_dict()
        assert all(torch.equal(stored[n], again[n]) for n in stored)


def test_formats_that_are_read_as_a_whole_say_so(tmp_path: Path) -> None:
    golden = Path(__file__).parents[2] / "quant" / "golden"
    for name in sorted(p.name for p in golden.iterdir() if p.is_dir()):
        try:
            found = formats.detect(golden / name)
        except FormatError:
            continue
        if found in ("gptq", "awq", "compressed-tensors"):
            whole, shelved = load(golden / name), load(golden / name, shelf=Store())
            assert fingerprint(whole.model) == fingerprint(shelved.model)
        elif not isinstance(formats.formats()[found], formats.ByLayer):
            with pytest.raises(FormatError, match="read as a whole"):
                load(golden / name, shelf=Store())
