"""Updates in one sweep against the blocks' own `move_`: the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from zotune.core import step, sweep
from zotune.core.block import CodeBlock, FloatBlock, Owner
from zotune.core.estimator import Estimate, estimator
from zotune.core.grid import Grid
from zotune.core.method import Method
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian, Perturbation, Rademacher, Sphere, Uniform
from zotune.core.rule import SGD, Adam, GridSign, Rule, SignSGD
from zotune.core.space import Space
from zotune.core.step import Tuner
from zotune.quant import QuantLinear, Scheme

pytest.importorskip("triton", reason="triton is not installed")
LAWS: list[Perturbation] = [Gaussian(), Rademacher(), Uniform()]
EXACT = settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])


def estimate(*coefficients: float) -> Estimate:
    keys = [Key(7, step=3, query=q) for q in range(len(coefficients))]
    return Estimate(keys[0], tuple(keys), coefficients, 1.0)


def move_(space: Space, law: Perturbation, rule: Rule, found: Estimate, fast: bool) -> list[bool]:
    """Update the space, in one sweep or run by run; whether each block was swept."""
    queries = len(found.coefficients)
    method = Method("m", estimator("batch", 0.1, queries), law, rule, lr=0.05)
    taken: list[bool] = []

    def watched(*arguments: Any) -> bool:
        taken.append(fast and sweep.swept_(*arguments))
        return taken[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "swept_", watched)
        Tuner(space, method, 7).apply_(found)
    return taken


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
        assert taken == [fast]
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
        assert taken == [fast and text != "int3-g16"]
        found.append((module.codes, torch.as_tensor(int(block.moved))))
        assert int(block.moved) == int((module.unpacked() != before).sum()) > 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_codes_of_odd_widths_are_moved_run_by_run(triton_device: torch.device) -> None:
    layer = nn.Linear(72, 5, bias=False).requires_grad_(False)
    module = QuantLinear.from_linear(layer, Scheme.parse("int4-g8")).to(triton_device)
    block = CodeBlock.of("c", Owner("", module, "codes"))
    assert not swept(block, SGD(), Gaussian())
    assert int(block.moved) == 0


@pytest.mark.parametrize(("rule", "law"), [(Adam(), Gaussian()), (SGD(), Sphere())], ids=str)
def test_other_rules_and_laws_are_left_alone(
    triton_device: torch.device, rule: Rule, law: Perturbation
) -> None:
    block = FloatBlock.of("b", values(4, 8, device=triton_device))
    before = block.tensor.clone()
    assert not swept(block, rule, law)
    assert torch.equal(block.tensor, before)
    assert swept(block, SGD(), Gaussian()), "a plain block is swept"
    assert not torch.equal(block.tensor, before)


def test_without_kernels_nothing_is_swept() -> None:
    block: Any = FloatBlock.of("b", torch.ones(4))
    assert not swept(block, SGD(), Gaussian())


def swept(block: Any, rule: Rule, law: Perturbation) -> bool:
    return sweep.swept_(block, rule, law, [Key(0)], [1.0], 0.1, Key(0))
