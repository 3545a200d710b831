"""Updates in one sweep against the blocks' own `move_`: the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from zotune.core.block import CodeBlock, FloatBlock, Owner
from zotune.core.estimator import Estimate, estimator
from zotune.core.graphs import Cuda
from zotune.core.grid import Grid
from zotune.core.method import Method
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian, Perturbation, Rademacher, Sphere, Uniform
from zotune.core.rule import SGD, Adam, GridSign, Rule, SignSGD
from zotune.core.space import Space
from zotune.core.step import Tuner
from zotune.core.sweep import Sweeps
from zotune.quant import QuantLinear, Scheme

pytest.importorskip("triton", reason="triton is not installed")
LAWS: list[Perturbation] = [Gaussian(), Rademacher(), Uniform()]
EXACT = settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])


def estimate(*coefficients: float) -> Estimate:
    keys = [Key(7, step=3, query=q) for q in range(len(coefficients))]
    return Estimate(keys[0], tuple(keys), coefficients, 1.0)


def move_(
    space: Space, law: Perturbation, rule: Rule, found: Estimate, fast: bool, **options: Any
) -> frozenset[str]:
    """Update the space, in one sweep or run by run; the names of the blocks that were swept."""
    tuner = tuned(space, law, rule, len(found.coefficients), **options)
    taken: list[frozenset[str]] = []

    def watched(*arguments: Any) -> frozenset[str]:
        taken.append(Sweeps()(*arguments) if fast else frozenset())
        return taken[-1]

    tuner.moves.sweeps = watched  # type: ignore[assignment]
    tuner.apply_(found)
    return taken[0]


def tuned(space: Space, law: Perturbation, rule: Rule, queries: int = 1, **options: Any) -> Tuner:
    return Tuner(
        space, Method("m", estimator("batch", 0.1, queries), law, rule, lr=0.05, **options), 7
    )


def values(*shape: int, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


@EXACT
@given(shape=st.sampled_from(((), (5,), (3, 50), (70, 33))), law=st.sampled_from(LAWS),
       dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
       master=st.booleans(), rule=st.sampled_from((SGD(), SignSGD())),
       unit=st.sampled_from(("float", "each", "row")), minimum=st.sampled_from((None, 0.2)),
       coefficients=st.sampled_from(((0.7,), (3.0, -0.2, 0.1))))  # fmt: skip
def test_float_blocks_take_the_same_step(
    triton_device: torch.device, shape: tuple[int, ...], law: Perturbation, dtype: torch.dtype,
    master: bool, rule: Rule, unit: str, minimum: float | None, coefficients: tuple[float, ...],
) -> None:  # fmt: skip
    found = []
    for fast in (True, False):
        size: Tensor | float = 0.3
        if unit == "each":
            size = values(*shape, device=triton_device, seed=1).abs()
        elif unit == "row" and shape:
            size = values(shape[0], *(1 for _ in shape[1:]), device=triton_device).abs()
        tensor = values(*shape, device=triton_device).to(dtype)
        block = FloatBlock.of("b", tensor, unit=size, minimum=minimum, keep_master=master)
        taken = move_(Space([block]), law, rule, estimate(*coefficients), fast)
        assert taken == ({"b"} if fast else set())
        found.append((tensor, block.state()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("text", ["int4-g64", "int2-g64", "int8-channel", "int3-g16"])
@pytest.mark.parametrize(
    ("law", "rule"),
    [(Gaussian(), SGD()), (Rademacher(), SignSGD()), (Grid(2.0), GridSign()), (Uniform(), SGD())],
    ids=str,
)
def test_codes_take_the_same_step_and_are_counted(
    triton_device: torch.device, text: str, law: Perturbation, rule: Rule
) -> None:
    found = []
    for fast in (True, False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = nn.Linear(256, 5, bias=False).requires_grad_(False)
        module = QuantLinear.from_linear(layer, Scheme.parse(text)).to(triton_device)
        block = CodeBlock.of("c", Owner("", module, "codes"))
        before = module.unpacked().clone()
        taken = move_(Space([block]), law, rule, estimate(30.0, 4.0), fast)
        assert taken == ({"c"} if fast and text != "int3-g16" else set())
        found.append((module.codes, torch.as_tensor(int(block.moved))))
        assert int(block.moved) == int((module.unpacked() != before).sum()) > 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_codes_of_odd_widths_are_moved_run_by_run(triton_device: torch.device) -> None:
    with torch.random.fork_rng(devices=[]):
        layer = nn.Linear(72, 5, bias=False).requires_grad_(False)
    module = QuantLinear.from_linear(layer, Scheme.parse("int4-g8")).to(triton_device)
    block = CodeBlock.of("c", Owner("", module, "codes"))
    assert not move_(Space([block]), Gaussian(), SGD(), estimate(30.0), True)
    assert int(block.moved) > 0


@pytest.mark.parametrize(
    ("rule", "law", "swept"),
    [(Adam(), Gaussian(), ""), (SGD(), Sphere(), ""), (SGD(), Gaussian(), "bd")],
    ids=str,
)
def test_other_rules_and_laws_and_double_precision_go_on_run_by_run(
    triton_device: torch.device, rule: Rule, law: Perturbation, swept: str
) -> None:
    tensors = {name: values(4, 8, device=triton_device) for name in "bcd"}
    tensors["c"] = tensors["c"].double()
    before = {name: t.clone() for name, t in tensors.items()}
    space = Space(FloatBlock.of(name, t) for name, t in tensors.items())
    assert move_(space, law, rule, estimate(0.7), True) == set(swept)
    assert not any(torch.equal(t, before[name]) for name, t in tensors.items())


def test_blocks_that_decay_are_left_to_the_rule(triton_device: torch.device) -> None:
    blocks = [
        FloatBlock.of(n, values(4, 8, device=triton_device), decay=n == "b", eps=e)
        for n, e in (("b", None), ("c", 0.4))
    ]
    assert move_(Space(blocks), Gaussian(), SGD(), estimate(0.7), True, weight_decay=0.1) == {"c"}


@pytest.mark.parametrize("recorder", ["stand-in", "cuda", "refuses"])
def test_recorded_updates_are_the_same_updates(
    triton_device: torch.device, recorder: str, caplog: pytest.LogCaptureFixture
) -> None:
    if recorder == "cuda" and triton_device.type != "cuda":
        pytest.skip("no CUDA")

    def refuses(work: Any) -> Any:
        raise RuntimeError("not now")

    def stand_in(work: Any) -> Any:
        return work, None

    record: Any = {"stand-in": stand_in, "cuda": Cuda(), "refuses": refuses}[recorder]
    found = []
    for sweeps in (Sweeps(record), Sweeps(None), None):
        blocks = [
            FloatBlock.of(n, values(3, 50, device=triton_device), eps=e)
            for n, e in (("b", None), ("c", 0.4))
        ]
        tuner = tuned(Space(blocks), Gaussian(), SGD())
        tuner.moves.sweeps = sweeps or (lambda *_: frozenset())  # type: ignore[assignment]
        for t in range(4):
            if t == 3:  # elsewhere in memory: another recording
                blocks[0].tensor = blocks[0].master = blocks[0].tensor.clone()
            key = Key(7, step=t)
            tuner.apply_(Estimate(key, (key,), (0.3 + t,), 1.0))
        found.append([b.tensor for b in blocks])
        if sweeps is not None and sweeps.record is not None:
            assert sweeps.replayed == 2
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))
    said = [r.message for r in caplog.records if "CUDA graphs" in r.message]
    assert len(said) == (recorder == "refuses")


def test_without_kernels_nothing_is_swept() -> None:
    """But for floats on the CPU, which has a sweep of its own: not in half precision."""
    halves = torch.ones(4, dtype=torch.float16)
    space = Space([FloatBlock.of("b", halves, keep_master=False)])
    assert not move_(space, Gaussian(), SGD(), estimate(0.7), True)
