"""Rules that the numbers depend on, over every space and law.

Run: pytest tests/core/test_invariants.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import (
    CASES,
    Case,
    batch,
    bert,
    cosine,
    cross_entropy,
    digest,
    gpt2,
    llama,
    perturbations,
    point,
    small,
    tensors_of,
)

from zotune.core import spaces
from zotune.core.backprop import Backprop, BackpropTuner
from zotune.core.block import Block, CodeBlock
from zotune.core.estimator import Estimator, OneSided, PerExample, TwoSided
from zotune.core.evaluator import FunctionEvaluator, TorchEvaluator
from zotune.core.grid import Rounded
from zotune.core.method import Method
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian, Perturbation, Rademacher
from zotune.core.probe import Probe
from zotune.core.space import Space, tensors
from zotune.core.spaces import SPACES
from zotune.core.step import Tuner
from zotune.errors import BadInput
from zotune.models.adapter import CHILD

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_every_kind_of_space_is_among_the_cases() -> None:
    assert {name for name in SPACES if any(name in c.space for c in CASES)} == set(SPACES)


# ---- nothing to restore --------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_evaluating_probes_changes_no_byte_of_the_model(case: Case, dtype: torch.dtype) -> None:
    model = case.model().to(dtype)
    space = case.build(model)
    space.bind_(0.5, 1.0, "relative")
    before, forwards = digest(model), {m: "forward" in vars(m) for m in model.modules()}
    steps = (0.5, -0.5, 0.0)
    for law in perturbations():
        for lanes in (False, True):
            probes = [Probe(Key(1), s, lanes) for s in steps]
            for fast in (True, False):
                evaluator = TorchEvaluator(model, space, cross_entropy, fast=fast, micro_batch=3)
                losses = evaluator.losses(probes, batch(4), law)
                assert losses.per_example.dtype == torch.float64
                assert losses.per_example.shape == (3, 4)
    assert digest(model) == before
    assert {m: "forward" in vars(m) for m in model.modules()} == forwards


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_objective_that_raises_leaves_the_model_as_it_was(case: Case) -> None:
    model = case.model()
    space = case.build(model)
    space.bind_(0.5, 1.0, "relative")
    before = digest(model)

    def broken(model: torch.nn.Module, here: Any) -> tuple[Tensor, Tensor]:
        cross_entropy(model, here)
        raise KeyError("a mistake in a task")

    def breaks_inside(*_: Any) -> None:
        raise KeyError("in the middle of a forward")

    evaluator = TorchEvaluator(model, space, broken)
    with pytest.raises(KeyError):
        evaluator.losses([Probe(Key(1), 0.5)], batch(4), Gaussian())
    handle = model.head.register_forward_pre_hook(breaks_inside)
    with pytest.raises(KeyError):
        evaluator.losses([Probe(Key(1), 0.5), Probe(Key(1), -0.5)], batch(4), Gaussian())
    handle.remove()
    assert digest(model) == before
    assert not any("forward" in vars(m) for m in model.modules())
    probes = [Probe(Key(1), 0.0)]
    after = TorchEvaluator(model, space, cross_entropy).losses(probes, batch(4), Gaussian()).mean
    assert float(after) == pytest.approx(float(cross_entropy(model, batch(4))[0].mean()), rel=1e-6)


def test_a_model_evaluated_for_long_gives_its_first_loss_bit_for_bit() -> None:
    model = small().bfloat16()
    space = spaces.get("weights").build(model)
    space.bind_(1e-3, 1.0, "absolute")
    evaluator = TorchEvaluator(model, space, cross_entropy)
    base = [Probe(Key(0), 0.0)]
    first = evaluator.losses(base, batch(4), Gaussian()).per_example
    for step in range(50):
        pair = [Probe(Key(0, step=step), s) for s in (1e-3, -1e-3)]
        evaluator.losses(pair, batch(4), Gaussian())
    assert torch.equal(evaluator.losses(base, batch(4), Gaussian()).per_example, first)


# ---- probed direction = update direction ---------------------------------------------


class Spy:
    """Records what each probe of a block saw, and the step that the block was given."""

    def __init__(self, block: Block) -> None:
        self.block, self.seen, self.step = block, [], torch.zeros(block.shape)
        self.at, self.move_ = block.at, block.move_
        block.at, block.move_ = self.watch_at, self.watch_move_  # type: ignore[method-assign]

    def watch_at(self, u: Tensor, step: float) -> Tensor:
        value = self.at(u, step)
        self.seen.append((value.double() - point(self.block)) / step)
        return value

    def watch_move_(self, start: int, stop: int, step: Tensor, key: Key) -> None:
        self.step[start:stop] = step
        self.move_(start, stop, step, key)

    @property
    def free(self) -> Tensor:
        """Coordinates whose probes no bound of the grid has cut."""
        if not isinstance(self.block, CodeBlock):
            return torch.ones(self.block.shape, dtype=torch.bool)
        low, high = self.block.limits
        value = point(self.block)
        return (value - 1 >= low) & (value + 1 <= high)


def parallel(a: Tensor, b: Tensor) -> bool:
    """Cosine 1 within 1e-6; a sparse direction may leave a small block where it is."""
    return not (a.any() or b.any()) or cosine(a, b) > 1 - 1e-6


ESTIMATORS = [
    lambda eps: TwoSided(eps, 1), lambda eps: TwoSided(eps, 2), lambda eps: OneSided(eps, 5),
    lambda eps: PerExample(eps, 1), lambda eps: PerExample(eps, 2),
]  # fmt: skip


def probe_and_step(
    case: Case, law: Perturbation, estimator: Estimator, stack: int | None, micro: int | None
) -> list[tuple[Spy, Tensor, Tensor]]:
    """(spy, step that the rule gave, sum of coefficients x probed displacements) per block."""
    model = case.model().double()
    space = case.build(model)
    evaluator = TorchEvaluator(
        model, space, cross_entropy, stack=stack, micro_batch=micro, fast=False
    )
    tuner = Tuner(space, Method("m", estimator, law, lr=1e-3), seed=3, evaluator=evaluator)
    # A sweep leaves the bits of `move_` (`test_sweep_cpu.py`), where it would not be seen.
    tuner.moves.sweeps = lambda *_: frozenset()  # type: ignore[assignment]
    spies = [Spy(b) for b in space]
    free = [s.free for s in spies]
    probes, examples = tuner.ask(), batch(4)
    report = tuner.step(examples)
    assert report.estimate is not None
    c = report.estimate.coefficients
    out = []
    for spy, mask in zip(spies, free, strict=True):
        d = displacements(spy, probes, examples.size, micro or examples.size, stack)
        assert len(d) == len(c)
        total = torch.stack([x * y for x, y in zip(c, d, strict=True)]).sum(0)
        out.append((spy, spy.step[mask], total[mask]))
    return out


def displacements(
    spy: Spy, probes: list[Probe], examples: int, micro: int, stack: int | None
) -> list[Tensor]:
    """One displacement per coefficient, from the order in which the generic forward asks."""
    found: dict[Key, Tensor] = {}
    order = [
        p.key.fold(lane=b) if p.per_example else p.key
        for first in range(0, examples, micro)
        for p in probes
        if p.step
        for b in (range(first, min(first + micro, examples)) if p.per_example else range(1))
    ]
    assert len(spy.seen) == len(order)
    for key, seen in zip(order, spy.seen, strict=True):
        # Plus and minus, and every micro-batch, see one line through theta.
        if key in found and not isinstance(spy.block, CodeBlock):
            assert parallel(found[key], seen)
        found.setdefault(key, seen)
    return [found[k] for k in sorted(found, key=lambda k: (k.query, k.lane))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_update_is_parallel_to_what_was_probed(case: Case) -> None:
    for law in perturbations():
        if isinstance(law, Rounded):
            continue  # two independent roundings: the mean is tested with the papers
        for make in ESTIMATORS:
            for spy, step, probed in probe_and_step(case, law, make(0.05), None, None):
                assert parallel(step, probed), (spy.block.name, law, make(0.05))


@pytest.mark.parametrize("estimator", [TwoSided(0.05, 2), OneSided(0.05, 3), PerExample(0.05, 2)])
@pytest.mark.parametrize(("stack", "micro"), [(1, None), (1, 3), (None, 3), (3, 1)])
def test_the_update_is_parallel_to_what_was_probed_in_pieces(
    estimator: Estimator, stack: int | None, micro: int | None
) -> None:
    for _, step, probed in probe_and_step(CASES[0], Gaussian(), estimator, stack, micro):
        assert parallel(step, probed)


def test_rows_looked_up_in_an_embedding_are_probed_along_the_update() -> None:
    model = small().double()
    space = spaces.get("weights", pattern="embed").build(model)
    space.bind_(0.05, 1.0, "relative")
    (block,) = space.blocks
    rows = torch.tensor([3, 7, 0])
    key = Key(1, step=4)
    u = Gaussian().draw_rows(key, block, rows.tolist())
    moved = block.at_rows(rows, u, 0.05) - block.value()[rows]  # type: ignore[attr-defined]
    g = Gaussian().combine([key], [1.0], block, 0, block.rows)
    assert cosine(moved, g[rows]) > 1 - 1e-6


# ---- linear truth --------------------------------------------------------------------

GRADIENTS = {"a": torch.tensor([0.5, -1.0, 2.0]), "b": torch.tensor([[3.0, -0.25], [1.0, 0.0]])}
QUERIES = 1200


def linear(values: dict[str, Tensor], _: Any) -> float:
    return float(sum((values[n].double() * g).sum() for n, g in GRADIENTS.items()))


def mean_step(
    lr: float, eps: float, units: str = "absolute", **options: dict[str, float]
) -> dict[str, Tensor]:
    """Where one step with very many queries goes on a linear function, by block."""
    space = Space(
        b
        for n, g in GRADIENTS.items()
        for b in tensors({n: torch.zeros_like(g)}, unit=2.0, **options.get(n, {}))
    )
    method = Method("m", TwoSided(eps, QUERIES), Rademacher(), lr=lr, units=units)  # type: ignore[arg-type]
    Tuner(space, method, seed=1, evaluator=FunctionEvaluator(space, linear)).step(None)
    return {b.name: b.value().double().clone() for b in space}


def close(step: Tensor, wanted: Tensor, size: float) -> bool:
    """Within five standard errors: an element of c u has at most the gradient's whole length."""
    length = sum(float(g.square().sum()) for g in GRADIENTS.values()) ** 0.5
    return bool(((step - wanted).abs() < 5 * size * length / QUERIES**0.5).all())


def test_on_a_linear_function_the_mean_step_is_minus_lr_times_the_gradient() -> None:
    step = mean_step(0.1, 1e-2)
    for name, g in GRADIENTS.items():
        assert close(step[name], -0.1 * g, 0.1)
        assert cosine(step[name], -g) > 0.99


def test_doubling_lr_doubles_the_step_and_eps_leaves_it_alone() -> None:
    base, twice, wide = mean_step(0.1, 1e-2), mean_step(0.2, 1e-2), mean_step(0.1, 3e-1)
    for name in GRADIENTS:
        assert torch.allclose(twice[name], 2 * base[name], rtol=1e-6)
        assert torch.allclose(wide[name], base[name], rtol=0, atol=1e-5)


def test_a_blocks_own_eps_leaves_its_step_alone_and_its_own_lr_scales_it() -> None:
    base = mean_step(0.1, 1e-2)
    wide = mean_step(0.1, 1e-2, a={"eps": 0.05})
    # The other block's share of each coefficient is reweighed; the mean stays.
    assert close(wide["a"], -0.1 * GRADIENTS["a"], 0.1 * 5)
    assert close(wide["b"], -0.1 * GRADIENTS["b"], 0.1 * 5)
    fast = mean_step(0.1, 1e-2, a={"lr": 0.4})
    assert torch.allclose(fast["a"], 4 * base["a"], rtol=1e-5)
    assert torch.equal(fast["b"], base["b"])


def test_an_own_lr_under_a_method_that_has_none_is_an_error() -> None:
    with pytest.raises(BadInput, match="lr=0, but block 'a'"):
        mean_step(0.0, 1e-2, a={"lr": 0.4})


def test_relative_units_count_both_the_probe_and_the_step_in_the_blocks_unit() -> None:
    step = mean_step(0.1, 1e-2, units="relative")
    for name, g in GRADIENTS.items():
        assert close(step[name], -0.1 * 4 * g, 0.1 * 4)


def test_a_planted_slope_comes_back_through_a_model_of_any_dtype() -> None:
    class Slope(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.w

    def objective(model: torch.nn.Module, here: Any) -> tuple[Tensor, Tensor]:
        loss = 0.7 + 0.01 * model(here["x"]).float()
        return loss, torch.ones_like(loss)

    for dtype in DTYPES:
        model = Slope().to(dtype)
        space = spaces.get("weights").build(model)
        here = type(batch())({"x": torch.ones(3, dtype=dtype)}, 3)
        evaluator = TorchEvaluator(model, space, objective)
        method = Method("m", TwoSided(1e-3), Rademacher(), units="absolute")
        report = Tuner(space, method, seed=0, evaluator=evaluator).step(here)
        u = float(Rademacher().draw(Key(0), space.blocks[0]))
        assert report.estimate is not None
        # eps itself is rounded to the dtype: 8 bits in bf16, 11 in fp16.
        assert report.estimate.coefficients[0] * u == pytest.approx(0.01, rel=1e-2)


# ---- nothing silent ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_after_one_step_every_block_has_moved_and_no_other_tensor(
    case: Case, dtype: torch.dtype
) -> None:
    model = case.model().to(dtype)
    space = case.build(model)
    # A random point: at zero, a product of two factors has no slope in one of them.
    for block in space:
        if not block.state().any():
            block.move_(0, block.rows, 0.1 * Gaussian().draw(Key(99), block), Key(99))
    before = {name: t.clone() for name, t in tensors_of(model).items()}
    tuner = Tuner(
        space, Method("m", TwoSided(0.05), lr=300.0 if case.space == "codes" else 3.0), seed=1,
        evaluator=TorchEvaluator(model, space, cross_entropy),
    )  # fmt: skip
    assert tuner.step(batch(6)).applied
    moved = {n for n, t in tensors_of(model).items() if not torch.equal(t, before[n])}
    wanted = {b.name.replace(".lora_", f".{CHILD}.") for b in space}
    assert moved == wanted


def test_spaces_hold_what_their_names_say() -> None:
    def names(space: str, model: Any) -> set[str]:
        return {b.name for b in spaces.parse(space).build(model)}

    toy = small()
    assert names("weights", toy) == set(dict(toy.named_parameters()))
    assert names("norms", toy) == {"norm.weight", "norm.bias"}
    assert names("biases", toy) == {"up.bias", "down.bias", "head.bias"}
    assert names("head", toy) == {"head.weight", "head.bias"}
    assert names("weights(pattern='up')", toy) == {"up.weight", "up.bias"}
    quantized = small(0, "int4-g8-asym")
    assert names("scales", quantized) == {"up.scale", "down.scale"}
    assert names("zeros", quantized) == {"up.zero", "down.zero"}
    assert names("codes", quantized) == {"up.codes", "down.codes"}
    assert names("biases", quantized) == {"up.bias", "down.bias", "head.bias"}
    assert names("head", llama()) == {"lm_head.weight"}
    assert names("head", llama(tied=True)) == {"model.embed_tokens.weight"}
    assert names("head", gpt2()) == {"transformer.wte.weight"}
    assert names("head", bert()) == {"classifier.weight", "classifier.bias"}
    assert all("norm" in n.lower() for n in names("norms", llama()))
    assert len(names("norms", llama())) == 5


def test_tied_tensors_are_one_block_with_every_owner() -> None:
    space = spaces.parse("weights").build(gpt2())
    (tied,) = [b for b in space if "wte" in b.name]
    assert {o.path for o in tied.owners} == {"transformer.wte", "lm_head"}
    assert len({b.name for b in space}) == len(space.blocks)


@pytest.mark.parametrize(
    ("make", "decayed"),
    [
        (bert, lambda n: n.endswith("weight") and "LayerNorm" not in n),
        (llama, lambda n: "norm" not in n),
        (gpt2, lambda n: n.endswith("weight") and "ln_" not in n),
        (small, lambda n: n.endswith("weight") and "norm" not in n),
    ],
    ids=["bert", "llama", "gpt2", "small"],
)  # fmt: skip
def test_weight_decay_is_for_matrices_of_layers_whatever_their_names(
    make: Callable[[], torch.nn.Module], decayed: Callable[[str], bool]
) -> None:
    for block in spaces.parse("weights").build(make()):
        assert block.decay == decayed(block.name), block.name


def test_weight_decay_moves_what_it_should_by_what_it_should() -> None:
    model = small()
    space = spaces.parse("weights").build(model)
    before = {b.name: b.value().clone() for b in space}
    method = Method("m", TwoSided(1e-3), lr=0.1, weight_decay=0.5, units="absolute")

    def flat(model: torch.nn.Module, here: Any) -> tuple[Tensor, Tensor]:
        return torch.zeros(here.size), torch.ones(here.size)

    Tuner(space, method, seed=0, evaluator=TorchEvaluator(model, space, flat)).step(batch(2))
    for block in space:
        factor = 0.95 if block.decay else 1.0
        assert torch.allclose(block.value(), factor * before[block.name], rtol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_weight_decay_that_would_act_on_nothing_is_an_error(case: Case) -> None:
    model = case.model()
    space = case.build(model)
    evaluator = TorchEvaluator(model, space, cross_entropy)
    tuners: list[Callable[[], Any]] = [lambda: Tuner(space, Method("m", weight_decay=0.1), seed=0)]
    if "codes" not in case.space:
        tuners.append(lambda: BackpropTuner(space, Backprop(weight_decay=0.1), evaluator, 1))
    for make in tuners:
        if any(b.decay for b in space):
            make()
        else:
            with pytest.raises(BadInput, match="acts on no block"):
                make()


def test_a_blocks_own_lr_scales_its_weight_decay_too() -> None:
    model = small()
    space = spaces.parse("head(lr=0.4) + weights(pattern='up')").build(model)
    before = {b.name: b.value().clone() for b in space}
    method = Method("m", TwoSided(1e-3), lr=0.1, weight_decay=0.5, units="relative")

    def flat(model: torch.nn.Module, here: Any) -> tuple[Tensor, Tensor]:
        return torch.zeros(here.size), torch.ones(here.size)

    Tuner(space, method, seed=0, evaluator=TorchEvaluator(model, space, flat)).step(batch(2))
    after = {b.name: b.value() for b in space}
    assert torch.allclose(after["head.weight"], 0.8 * before["head.weight"], rtol=1e-6)
    assert torch.allclose(after["up.weight"], 0.95 * before["up.weight"], rtol=1e-6)


@pytest.mark.parametrize(
    ("space", "scheme", "message"),
    [
        ("scales", None, "no quantized scale"),
        ("codes", None, "no quantized codes"),
        ("zeros", "int4-g8", "no quantized zero"),
        ("weights(pattern='nowhere')", None, "matches no block"),
        ("weights(pattern='(')", None, "not a regular expression"),
        ("scales(pattern='nowhere')", "int4-g8", "matches no block"),
        ("lora", None, "matches no block"),
        ("lora(rank=0)", None, "rank=0"),
        ("adapter(rank=0)", None, "rank=0"),
        ("adapter(rank=99)", None, "rank=99"),
        ("adapter(targets='nowhere')", None, "matches no block"),
        ("weights + head", None, "named twice"),
        ("head + head", None, "named twice"),
        ("head(basis='other')", None, "classes"),
        ("scale", "int4-g8", "did you mean scales"),
        ("head(rank=3)", None, "options are"),
    ],
)
def test_spaces_without_tunables_or_with_doubles_are_errors(
    space: str, scheme: str | None, message: str
) -> None:
    model = small(0, scheme)
    with pytest.raises(BadInput, match=message):
        Case(space, scheme).build(model)


def test_a_model_without_the_layers_that_a_space_wants_is_an_error() -> None:
    bare = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    for name in ("norms", "biases", "head"):
        with pytest.raises(BadInput, match="this model has no"):
            spaces.get(name).build(bare)
    with pytest.raises(BadInput, match="no blocks"):
        Space([])
    with pytest.raises(BadInput, match="observe"):
        spaces.get("adapter").build(small())


def test_every_space_is_rebuilt_from_its_repr() -> None:
    from zotune.core import nouns

    for case in CASES:
        spec = spaces.parse(case.space)
        assert eval(repr(spec), vars(nouns).copy()) == spec
