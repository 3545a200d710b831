"""Forwards that draw inside their kernels against the generic one, which draws on the side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from zotune.core import forwards, noise_reference
from zotune.core.block import Block, FloatBlock, Owner
from zotune.core.grid import Grid
from zotune.core.noise import Key, philox_key
from zotune.core.perturbation import Gaussian, Perturbation, Rademacher, Uniform
from zotune.core.probe import Probe
from zotune.core.sites import _FORWARDS, Site, View, generic
from zotune.core.spaces import parse
from zotune.quant import QuantLinear, Scheme, kernels

pytest.importorskip("triton", reason="triton is not installed")
LAWS: list[Perturbation] = [Gaussian(), Rademacher(), Uniform()]
# Of the largest value: a product's sums differ in their order, a float's last bits in rounding.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
PAIR = [Probe(Key(3, step=5), 0.1), Probe(Key(3, step=5), -0.1)]
UNEVEN = [Probe(Key(3), 0.0), *PAIR]
ONE_SIDED = [Probe(Key(3), 0.0), Probe(Key(3, query=1), 0.1)]
drawn_in_place = settings(
    max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def truth(law: Perturbation, key: Key, block: Block) -> Tensor:
    """u as plain torch draws it."""
    how = law.independent(block)
    assert how is not None
    kind = "uniform" if how.law == "whole" else how.law
    words = philox_key(key.seed, block.name)
    u = noise_reference.row(kind, 0, block.numel, key.stream, words, block.device)
    u = noise_reference.whole(u, how.most) if how.law == "whole" else u * how.gain
    return u.view(block.shape)


class Plain(Perturbation):
    """The same directions, drawn by plain torch only."""

    def __init__(self, law: Perturbation) -> None:
        object.__setattr__(self, "law", law)

    def draw(self, key: Key, block: Block, start: int = 0, stop: int | None = None) -> Tensor:
        return truth(self.law, key, block)[start:stop]  # type: ignore[attr-defined]


def seen(site: Site, law: Perturbation, probes: list[Probe], x: Tensor) -> tuple[Any, Tensor]:
    """What the fast and the generic forward make of x, as many rows for each probe."""
    examples = len(x) // len(probes)
    fast = _FORWARDS[type(site.module)](site, View(probes, examples, law, rows=len(x)), x)
    slow = generic(site, View(probes, examples, Plain(law), rows=len(x)), x)
    return fast, slow


def assert_close(fast: Any, slow: Tensor) -> None:
    assert fast is not NotImplemented
    assert (fast.dtype, fast.shape) == (slow.dtype, slow.shape)
    unit = slow.float().abs().max()
    assert (fast.float() - slow.float()).abs().max() <= TOLERANCE[slow.dtype] * unit


def site_over(module: nn.Module, space: str, units: str = "relative") -> Site:
    blocks = parse(space).build(nn.Sequential(module))
    blocks.bind_(0.1, 0.1, units)
    return Site("0", module, {o.attribute: b for b in blocks for o in b.owners})


def quantized(text: str, rows: int, columns: int, device: torch.device) -> QuantLinear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.Linear(columns, rows).requires_grad_(False)
    return QuantLinear.from_linear(layer, Scheme.parse(text)).to(device)


def inputs(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("text", ["int4-g64", "int4-channel", "int2-g16", "int8-channel-a8"])
def test_scales_drawn_in_the_product_equal_scales_drawn_on_the_side(
    triton_device: torch.device, law: Perturbation, text: str
) -> None:
    from zotune.core import forwards_triton

    site = site_over(quantized(text, 10, 128, triton_device), "scales")
    view = View(PAIR, 3, law, rows=6)
    assert forwards_triton.scale_directions(site, view, site.module)  # type: ignore[arg-type]
    with kernels.force("triton"):
        assert_close(*seen(site, law, PAIR, inputs(6, 128, device=triton_device)))


@pytest.mark.parametrize("probes", [PAIR, UNEVEN, ONE_SIDED, PAIR[:1]], ids=len)
def test_scales_drawn_in_the_product_are_the_same_numbers(
    triton_device: torch.device, probes: list[Probe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit what the kernel makes of scales that are written down."""
    from zotune.core import forwards_triton

    site = site_over(quantized("int4-g64-asym", 10, 192, triton_device), "scales")
    x = inputs(4 * len(probes), 192, device=triton_device)
    with kernels.force("triton"):
        inside = forwards.quant_linear(site, View(probes, 4, Gaussian()), x)
        monkeypatch.setattr(forwards_triton, "scale_directions", lambda *_: None)
        assert torch.equal(inside, forwards.quant_linear(site, View(probes, 4, Gaussian()), x))


@drawn_in_place
@given(rows=st.integers(1, 70), columns=st.integers(1, 140), tokens=st.integers(1, 40),
       text=st.sampled_from(("int4-g16", "int4-g5", "int3-g12", "int4-tensor")))  # fmt: skip
def test_odd_layers_see_the_same_scales(
    triton_device: torch.device, rows: int, columns: int, tokens: int, text: str
) -> None:
    group = Scheme.parse(text).group_size or 1
    layer = quantized(text, rows, -(-columns // group) * group, triton_device)
    site = site_over(layer, "scales")
    with kernels.force("triton"):
        assert_close(
            *seen(site, Gaussian(), PAIR, inputs(2 * tokens, layer.columns, device=triton_device))
        )


@pytest.mark.parametrize("law", [*LAWS, Grid(3.0)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("columns", [128, 50])
def test_dense_weights_drawn_in_the_product_or_a_scratch_equal_the_generic_forward(
    triton_device: torch.device, law: Perturbation, dtype: torch.dtype, columns: int
) -> None:
    with torch.random.fork_rng(devices=[]):
        module = nn.Linear(columns, 20).to(triton_device, dtype).requires_grad_(False)
    x = inputs(6, 5, columns, device=triton_device).to(dtype)
    assert_close(*seen(site_over(module, "weights"), law, PAIR, x))
    assert_close(*seen(site_over(module, "weights(pattern='weight')"), law, UNEVEN, x))


def test_lanes_draw_a_direction_each(triton_device: torch.device) -> None:
    probes = [Probe(p.key, p.step, per_example=True) for p in PAIR]
    with torch.random.fork_rng(devices=[]):
        module = nn.Linear(64, 9).to(triton_device).requires_grad_(False)
    x = inputs(6, 2, 64, device=triton_device)
    assert_close(*seen(site_over(module, "weights"), Gaussian(), probes, x))
    site = site_over(quantized("int4-g16", 9, 64, triton_device), "scales")
    with kernels.force("triton"):
        assert_close(*seen(site, Gaussian(), probes, x))


def test_many_rows_go_by_a_scratch_in_runs(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zotune.core import dense_triton, forwards_triton

    monkeypatch.setattr(forwards_triton, "SCRATCH", 7 * 64)
    monkeypatch.setattr(dense_triton, "few", lambda *_: False)
    with torch.random.fork_rng(devices=[]):
        module = nn.Linear(64, 20, bias=False).to(triton_device).requires_grad_(False)
    x = inputs(4, 64, device=triton_device)
    assert_close(*seen(site_over(module, "weights"), Gaussian(), PAIR, x))


@pytest.mark.parametrize("units", ["relative", "absolute"])
def test_rows_of_an_embedding_are_drawn_where_they_are_looked_up(
    triton_device: torch.device, units: str
) -> None:
    with torch.random.fork_rng(devices=[]):
        module = nn.Embedding(30, 70).to(triton_device).requires_grad_(False)
    ids = torch.tensor([[0, 3, 29, 3], [5, 5, 1, 0]], device=triton_device)
    site = site_over(module, "weights", units)
    fast, slow = seen(site, Gaussian(), PAIR, ids)
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-6)


@drawn_in_place
@given(shape=st.sampled_from(((), (1,), (3, 50), (70, 2), (2, 3, 65))),
       dtype=st.sampled_from(list(TOLERANCE)), master=st.booleans(), law=st.sampled_from(LAWS),
       spread=st.sampled_from(("one", "each", "row")), minimum=st.sampled_from((None, 0.3)),
       rows=st.integers(0, 2))  # fmt: skip
def test_values_of_all_parts_are_those_of_the_block(
    triton_device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, master: bool,
    law: Perturbation, spread: str, minimum: float | None, rows: int,
) -> None:  # fmt: skip
    from zotune.core import forwards_triton

    unit: Tensor | float = 0.5
    if spread == "each":
        unit = inputs(*shape, device=triton_device).abs()
    elif spread == "row" and shape:
        unit = inputs(shape[0], *(1 for _ in shape[1:]), device=triton_device).abs()
    tensor = inputs(*shape, device=triton_device).to(dtype)
    block = FloatBlock.of("b", tensor, unit=unit, minimum=minimum, keep_master=master)
    block.bind_(0.1, 0.1, "relative")
    start = min(rows, block.rows - 1)
    found = forwards_triton.points(View(UNEVEN, 1, law), block, None, start)
    assert found is not None
    for value, probe in zip(found, UNEVEN, strict=True):
        wanted = block.value()
        if probe.step:
            wanted = block.at(truth(law, probe.key, block), probe.step)
        exact = 0.0 if isinstance(unit, Tensor) else 2e-7  # torch may fuse a product with a sum
        tolerance = (
            exact if dtype == torch.float32 else 2 * exact + torch.finfo(dtype).eps * bool(exact)
        )
        torch.testing.assert_close(
            value, wanted[start:] if shape else wanted, rtol=tolerance, atol=exact
        )


def test_what_a_kernel_cannot_draw_is_left_to_the_generic_forward(
    triton_device: torch.device,
) -> None:
    from zotune.core import forwards_triton

    tensor = torch.zeros(4, 8, device=triton_device)
    block = FloatBlock.of("b", tensor, [Owner("", nn.Identity(), "weight")])
    wide = FloatBlock.of("b", tensor.double())
    odd = FloatBlock.of("b", tensor, unit=torch.ones(8, device=triton_device))
    for one in (block, wide, odd):
        one.bind_(0.1, 0.1, "relative")
    view = View(PAIR, 1, Gaussian())
    assert forwards_triton.drawn(view, block) is not None
    assert forwards_triton.drawn(view, wide) is None
    assert forwards_triton.drawn(view, odd) is None
    assert forwards_triton.drawn(View(PAIR, 1, Grid(2.0, density=0.5)), block) is None
