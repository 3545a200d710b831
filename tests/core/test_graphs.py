"""Recorded forwards: by CUDA graphs on a GPU; a stand-in shows anywhere that all holds together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.core import graphs
from zotune.core.evaluator import TorchEvaluator
from zotune.core.graphs import Out
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian, Perturbation, Sphere
from zotune.core.probe import Probe
from zotune.core.spaces import parse
from zotune.quant import QuantLinear, Scheme, kernels
from zotune.tasks.batch import Batch

pytest.importorskip("triton", reason="triton is not installed")


def stand_in(work: Callable[[], Out]) -> tuple[Callable[[], None], Out]:
    """Work that runs again as it was recorded, on the same memory, into the same results."""
    out = work()

    def replay() -> None:
        for kept, now in zip(out, work(), strict=True):
            kept.copy_(now)

    return replay, out


@pytest.fixture(params=["stand-in", "cuda"])
def record(request: pytest.FixtureRequest, triton_device: torch.device) -> Iterator[Any]:
    if request.param == "cuda" and triton_device.type != "cuda":
        pytest.skip("no CUDA")
    with kernels.force("triton"):
        yield graphs.Cuda() if request.param == "cuda" else stand_in


def model(device: torch.device) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        quant = QuantLinear.from_linear(nn.Linear(64, 128, bias=False), Scheme.parse("int4-g64"))
        layers = [nn.Embedding(5, 64), nn.LayerNorm(64), quant, nn.Tanh(), nn.Linear(128, 3)]
        return nn.Sequential(*layers).requires_grad_(False).to(device)


def objective(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    scores = model(batch["ids"]).mean(1)
    return F.cross_entropy(scores, batch["label"], reduction="none"), torch.ones_like(scores[:, 0])


def batch_of(step: int, length: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 5, (2, length), generator=generator)
    label = torch.randint(0, 3, (2,), generator=generator)
    return Batch({"ids": ids, "label": label}, 2).to(device)


def pair(step: int, lanes: bool = False) -> list[Probe]:
    return [Probe(Key(5, step=step), sign * 0.01, lanes) for sign in (1, -1)]


def evaluator(
    device: torch.device, space: str, record: Any, goal: Any = objective, **options: Any
) -> TorchEvaluator:
    own = model(device)
    built = parse(space).build(own)
    built.bind_(0.1, 0.1, "relative")
    return TorchEvaluator(own, built, goal, record=record, **options)


def losses(
    found: TorchEvaluator, lengths: list[int], law: Perturbation | None = None, lanes: bool = False
) -> list[Tensor]:
    device = found.space.blocks[0].device
    return [
        found.losses(pair(step, lanes), batch_of(step, length, device), law or Gaussian()).mean
        for step, length in enumerate(lengths)
    ]


def plainly(device: torch.device, space: str, lengths: list[int], **options: Any) -> list[Tensor]:
    found = evaluator(device, space, None)
    found.graphs = None
    return losses(found, lengths, **options)


def assert_same(fast: list[Tensor], slow: list[Tensor]) -> None:
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("space", "lanes"), [("scales", False), ("weights", False), ("scales + norms", True)]
)
def test_replays_give_the_losses_of_plain_forwards(
    record: Any, triton_device: torch.device, space: str, lanes: bool
) -> None:
    lengths = [2] * 4
    found = evaluator(triton_device, space, record)
    assert_same(
        losses(found, lengths, lanes=lanes), plainly(triton_device, space, lengths, lanes=lanes)
    )
    assert found.graphs is not None
    assert (found.graphs.off, found.graphs.recorded, found.graphs.replayed) == (None, 1, 3)
    assert found.forwards == 8


def test_each_shape_has_a_recording_and_the_oldest_goes(
    record: Any, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "SHAPES", 2)
    lengths = [1, 1, 2, 2, 3, 3, 1]
    found = evaluator(triton_device, "scales", record)
    assert_same(losses(found, lengths), plainly(triton_device, "scales", lengths))
    assert found.graphs is not None
    assert (found.graphs.recorded, len(found.graphs._found)) == (4, 2)


def test_micro_batches_share_a_recording_and_keep_their_directions(
    record: Any, triton_device: torch.device
) -> None:
    found = evaluator(triton_device, "scales", record, micro_batch=1)
    assert_same(
        losses(found, [2] * 4, lanes=True), plainly(triton_device, "scales", [2] * 4, lanes=True)
    )
    assert found.graphs is not None
    assert (found.graphs.recorded, found.graphs.replayed) == (1, 7)


def test_weights_that_moved_elsewhere_are_recorded_anew(
    record: Any, triton_device: torch.device
) -> None:
    found = evaluator(triton_device, "scales", record)
    losses(found, [2] * 4)
    layer = found.model[2]  # type: ignore[index]
    layer.codes = layer.codes.clone()  # type: ignore[union-attr]
    assert found.graphs is not None
    assert_same(losses(found, [2]), plainly(triton_device, "scales", [2]))
    assert found.graphs.recorded == 2


def test_values_that_moved_in_place_are_seen_by_a_replay(
    record: Any, triton_device: torch.device
) -> None:
    found = evaluator(triton_device, "scales", record)
    before = losses(found, [2] * 4)[0]
    block = found.space.blocks[0]
    block.move_(0, block.rows, torch.full(block.shape, 0.01, device=triton_device), Key(0))
    assert not torch.equal(losses(found, [2])[0], before)
    assert found.graphs is not None
    assert found.graphs.recorded == 1


def test_what_a_recording_froze_is_found_and_said_once(
    triton_device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    """An objective that depends on a number of the host, which a replay would repeat."""
    now = [0.0]

    def drifting(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, weight = objective(model, batch)
        return loss * now[0], weight

    def freezing(work: Callable[[], Out]) -> tuple[Callable[[], None], Out]:
        then = now[0]

        def frozen() -> Out:
            here, now[0] = now[0], then
            out = work()
            now[0] = here
            return out

        return stand_in(frozen)

    with kernels.force("triton"), caplog.at_level(logging.INFO, "zotune"):
        truth = plainly(triton_device, "scales", [2] * 4)
        found = evaluator(triton_device, "scales", freezing, drifting)
        for step, wanted in enumerate(truth):
            now[0] = 1.0 + step
            loss = found.losses(pair(step), batch_of(step, 2, triton_device), Gaussian()).mean
            torch.testing.assert_close(loss, wanted * now[0], rtol=1e-5, atol=1e-6)
    (said,) = [r.message for r in caplog.records if "CUDA graphs" in r.message]
    assert said.endswith("a replay gave other losses than the forward that was recorded")


def test_what_cannot_be_recorded_runs_plainly_and_says_so_once(
    triton_device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(work: Callable[[], Out]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    lengths = [2] * 4
    with kernels.force("triton"), caplog.at_level(logging.INFO, "zotune"):
        found = evaluator(triton_device, "scales", refused)
        assert_same(losses(found, lengths), plainly(triton_device, "scales", lengths))
    (said,) = [r.message for r in caplog.records if "CUDA graphs" in r.message]
    assert said.endswith("RuntimeError: operation not permitted when stream is capturing")


def test_directions_that_kernels_do_not_draw_are_not_recorded(
    record: Any, triton_device: torch.device
) -> None:
    found = evaluator(triton_device, "scales", record)
    losses(found, [2] * 3, law=Sphere())
    assert found.graphs is not None
    assert found.graphs.off == "these directions are not drawn inside kernels"


def test_shapes_that_never_come_again_are_given_up(
    record: Any, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "TRIES", 2)
    found = evaluator(triton_device, "scales", record)
    losses(found, [2, 2, 3, 3, 4, 4])
    assert found.graphs is not None
    assert found.graphs.off == "no shape of batch comes often enough"


def test_nothing_is_recorded_on_a_cpu() -> None:
    own = model(torch.device("cpu"))
    scales = parse("scales").build(own)
    assert TorchEvaluator(own, scales, objective).graphs is None


def test_nothing_is_recorded_where_most_is_computed_once(
    record: Any, triton_device: torch.device
) -> None:
    found = evaluator(triton_device, "weights(pattern='^4')", record)
    losses(found, [3, 3])
    assert found.graphs is not None
    assert found.graphs.off == "most of the network is computed once for all probes"
    assert found.graphs.recorded == 0
