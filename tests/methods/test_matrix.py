"""Every method on every space it claims: registering a method is testing it.

Run: pytest tests/methods/test_matrix.py
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import nn
from toys import Case, batch, cross_entropy, digest, tensors_of

from zotune import methods
from zotune.core import nouns, secret
from zotune.core.backprop import Backprop, BackpropTuner
from zotune.core.estimator import Estimate
from zotune.core.evaluator import TorchEvaluator
from zotune.core.space import Space
from zotune.core.spaces import SPACES
from zotune.core.step import Tuner
from zotune.errors import BadInput, ZotuneError
from zotune.methods import AnyMethod, Entry
from zotune.quant.qat import fake_layers
from zotune.training import privacy

ENTRIES = methods.entries()
TOYS = {
    "scales": Case("scales", "int4-g8"), "zeros": Case("zeros", "int4-g8-asym"),
    "codes": Case("codes", "int8-channel"), "adapter": Case("adapter(rank=2)"),
    "lora": Case("lora(targets='up|down')"),
    "latents": Case("latents", "int3-g8-asym", fake=True),
    "clipping": Case("clipping", "int3-channel", fake=True),
    "transforms": Case("transforms", "int3-g8-a4", fake=True),
    "activations": Case("activations", "int4-g8-a4", fake=True),
}  # fmt: skip
PAIRS = [(name, space) for name, e in ENTRIES.items() for space in e.spaces]
STEPS = 60

# What it takes to learn the toy in a few steps, by option; a method gets those it has.
LEARN = {
    "eps": 0.05, "queries": 4, "units": "relative", "schedule": "linear", "density": 0.05,
    "noise": 1e-4, "smoothing": 0.05,
}  # fmt: skip
# In relative units a rule that follows the slope wants an lr for each kind of space, one that
# normalises it a single one.
SLOPE = {
    "weights": 0.5, "lora": 10.0, "adapter": 2.0, "norms": 6.0, "biases": 2.0, "head": 2.0,
    "scales": 2.0, "zeros": 20.0, "codes": 9000.0, "latents": 0.5, "clipping": 0.5,
    "transforms": 0.5, "activations": 5.0,
}  # fmt: skip
EVEN = {"zo-sign": 0.06, "zo-adam": 0.06, "adamw": 0.02, "lora": 0.02, "zoqo": 1.0, "qes": 1.0}


@pytest.fixture(autouse=True)
def _no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a method draws in secret is no draw here, so that two of its runs can be compared."""
    shares = {"gaussian": 2, "laplace": 3}
    monkeypatch.setattr(secret, "noise", lambda law, scale: scale // shares[law])


def lr_of(name: str, space: str) -> float:
    return 5.0 if (name, space) == ("zo-sign", "codes") else EVEN.get(name, SLOPE[space])


def toy(space: str) -> Case:
    return TOYS.get(space, Case(space))


def learning(name: str, space: str, factor: float = 1.0) -> AnyMethod:
    known = ENTRIES[name].options
    chosen = {k: v for k, v in LEARN.items() if k in known}
    if name in ("quzo", "zoqo"):
        chosen["eps"] = {"codes": 1.0}.get(space, 0.05)
    return methods.get(name, lr=factor * lr_of(name, space), **chosen)


def build(case: Case, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Space]:
    model = case.model(seed).to(dtype)
    for layer in fake_layers(model).values():
        if layer.input_clip is not None:
            layer.input_clip.fill_(-1.2)  # too low, so that there is something to learn
    return model, case.build(model)


def tuner_of(
    model: nn.Module,
    space: Space,
    method: AnyMethod,
    seed: int = 1,
    total: int = STEPS,
    **options: Any,
) -> Any:
    evaluator = TorchEvaluator(model, space, cross_entropy)
    method = privacy.planned(method, examples=200, steps=total)
    if isinstance(method, Backprop):
        return BackpropTuner(space, method, evaluator, total)
    return Tuner(space, method, seed, evaluator=evaluator, total=total, **options)


def run(
    case: Case, method: AnyMethod, batches: Iterable[int], seed: int = 1, total: int = STEPS
) -> dict[str, str]:
    """The model's bytes after steps on these batches."""
    model, space = build(case)
    tuner = tuner_of(model, space, method, seed, total)
    for number in batches:
        count = 1 if isinstance(method, Backprop) else tuner.now.batches
        here = [batch(4, number + k) for k in range(count)]
        tuner.step(here if count > 1 else here[0])
    return digest(model)


def loss_of(model: nn.Module) -> float:
    with torch.no_grad():
        return float(cross_entropy(model, batch(24))[0].mean())


# ---- on every space ------------------------------------------------------------------


@pytest.mark.parametrize(("name", "space"), PAIRS)
def test_the_loss_falls_on_a_toy(name: str, space: str) -> None:
    """With one of a few step lengths: a new method needs no number of its own here."""
    after = {}
    for factor in (1.0, 0.1, 10.0, 0.01):
        model, built = build(toy(space))
        method = learning(name, space, factor)
        tuner = tuner_of(model, built, method)
        before = loss_of(model)
        for _ in range(STEPS):
            if not tuner.step(batch(24)).applied:
                break
        after[factor] = loss_of(model)
        if after[factor] < before - (0.01 if space == "activations" else 0.02):  # two numbers
            return
    raise AssertionError(f"{before} -> {after}")


@pytest.mark.parametrize(("name", "space"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_sixteen_bit_model_keeps_its_dtypes_and_stays_finite(
    name: str, space: str, dtype: torch.dtype
) -> None:
    model, built = build(toy(space), dtype=dtype)
    before = {n: t.dtype for n, t in tensors_of(model).items()}
    tuner = tuner_of(model, built, learning(name, space))
    for t in range(3):
        tuner.step(batch(4, t))
    after = tensors_of(model)
    assert {n: t.dtype for n, t in after.items()} == before
    assert all(bool(t.float().isfinite().all()) for t in after.values())


@pytest.mark.parametrize(("name", "space"), PAIRS)
def test_resuming_in_the_middle_is_bitwise(name: str, space: str) -> None:
    """From the state, and what the journal remembers of the steps behind it."""
    method, case = learning(name, space), toy(space)
    log: list[Estimate] = []
    straight, built = build(case)
    options: dict[str, Any] = {}
    if not isinstance(method, Backprop):
        options["record"] = lambda t, e: log.append(e)
    tuner = tuner_of(straight, built, method, **options)
    for t in range(3):
        tuner.step(batch(4, t))
    saved = {k: v.clone() for k, v in tuner.state_tensors().items()}
    past = list(log)
    for t in range(3, 6):
        tuner.step(batch(4, t))
    resumed, space_again = build(case)
    again = tuner_of(resumed, space_again, method)
    again.load_(saved, 3, 3)
    for estimate in past:
        again.remember_(estimate)
    for t in range(3, 6):
        again.step(batch(4, t))
    assert digest(resumed) == digest(straight)


# ---- on the default space ------------------------------------------------------------


@pytest.mark.parametrize("name", ENTRIES)
def test_one_seed_gives_one_run_whatever_else_draws_random_numbers(name: str) -> None:
    case, method = toy(ENTRIES[name].default_space), learning(name, ENTRIES[name].default_space)
    first = run(case, method, range(4))

    def disturbed() -> Iterable[int]:
        for number in range(4):
            torch.rand(number + 3)
            yield number

    with torch.random.fork_rng():
        assert run(case, method, disturbed()) == first
    if not isinstance(method, Backprop):
        assert run(case, method, range(4), seed=2) != first


@pytest.mark.parametrize("name", ENTRIES)
def test_defaults_act(name: str) -> None:
    case = toy(ENTRIES[name].default_space)
    if case.space == "codes":
        case = Case("codes", "int4-g8")
    model, _ = build(case)
    assert run(case, methods.get(name), [*range(STEPS)]) != digest(model)


# What goes with an option that needs something to act.
WITH: dict[str, dict[str, Any]] = {
    "history": {"moments": "rebuilt", "b1": 0.7, "b2": 0.9}, "moments": {"history": 2},
    "relative": {"lr": 0.03, "eps": 0.03}, "clip": {"clip": 1e-3}, "registers": {"source": "lfsr"},
    "delta": {"epsilon": 0.5},
    "window": {"residual": "rebuilt"},
    **{o: {"every": 1} for o in ("steps", "tau", "ratio_lr", "ratio_eps", "targets")},
    **{o: {"flat": 0, "anneal": 2} for o in ("alpha", "b1", "b2", "flat", "anneal")},
}  # fmt: skip
GRID = {"lr": 9.0, "eps": 2.0}  # ZOQO counts whole codes, so small differences are none
OTHER: dict[str, tuple[Any, ...]] = {"schedule": ("linear", "cosine"), 
    "directions": ("example", "one-sided"), "eps": (0.7, 5.0), "delta": (1e-4,),
    "targets": ("up",),
}  # fmt: skip


def others(entry: Entry, option: str, value: Any) -> Iterator[Any]:
    """Other values of an option, the likeliest to act in a few steps first."""
    yield from OTHER.get(option, ())
    hint = get_type_hints(entry.factory)[option]
    choices = [c for a in (hint, *get_args(hint)) for c in get_args(a)]
    yield from (c for c in choices if c not in (value, type(None)) and not isinstance(c, type))
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (n for n in (1, 2, 3, value + 1) if n != value)
    elif isinstance(value, float) or value is None:
        yield from ((value or 1.0) * 0.5, (value or 1.0) * 2, 0.5)


@pytest.mark.parametrize(
    ("name", "option"), [(n, o) for n, e in ENTRIES.items() for o in e.options]
)
def test_every_option_acts(name: str, option: str) -> None:
    """At least one other value of it gives another run."""
    entry = ENTRIES[name]
    space = next(s for s in ("weights", *entry.spaces) if s in entry.spaces)
    base: dict[str, Any] = {"lr": lr_of(name, space)}
    if "eps" in entry.options:
        base["eps"] = 0.05
    needed = {k: v for k, v in WITH.get(option, {}).items() if k in entry.options}
    base |= (GRID if name == "zoqo" else {}) | needed
    case = toy(space)

    def outcome(**changes: Any) -> dict[str, str] | None:
        try:
            method = methods.get(name, **{**base, **changes})
        except BadInput:
            return None  # a value that this method refuses
        return run(case, method, range(6), total=8)

    plain = outcome()
    assert plain is not None
    value = base.get(option, entry.options[option])
    assert any(outcome(**{option: v}) not in (None, plain) for v in others(entry, option, value))


@pytest.mark.parametrize("name", [n for n, e in ENTRIES.items() if "directions" in e.options])
def test_directions_one_sided_are_an_option_that_acts(name: str) -> None:
    case = toy(ENTRIES[name].default_space)
    runs = [
        run(case, methods.get(name, lr=0.01, eps=0.05, queries=2, directions=d), range(2))
        for d in ("batch", "example", "one-sided")
    ]
    assert runs[0] != runs[1] != runs[2] != runs[0]


@pytest.mark.parametrize("name", [n for n in ENTRIES if n not in ("mezo", "adamw", "lora")])
def test_a_method_is_not_mezo_under_another_name(name: str) -> None:
    """At equal lr, eps, queries and schedule, in equal units, they differ by the second step, or
    behind the first interlude."""
    entry, space = ENTRIES[name], ENTRIES[name].default_space
    ours = learning(name, space)
    if name == "qzo":  # MeZO on scales but for its clip: let it bite
        ours = methods.get(name, lr=2.0, eps=0.05, clip=1e-3)
    assert not isinstance(ours, Backprop)
    plain = methods.get(
        "mezo", lr=ours.lr, eps=ours.estimator.eps, queries=ours.estimator.queries,
        schedule=ours.schedule.kind, units=ours.units,
    )  # fmt: skip
    assert entry.name != "mezo"
    steps = range(2 if ours.interlude is None else ours.interlude.every + 1)
    assert run(toy(space), ours, steps) != run(toy(space), plain, steps)


# ---- the registry --------------------------------------------------------------------


@pytest.mark.parametrize("name", ENTRIES)
def test_a_method_is_rebuilt_from_its_repr(name: str) -> None:
    for method in (methods.get(name), learning(name, ENTRIES[name].default_space)):
        assert eval(repr(method), methods.records()) == method
        assert method.name == name


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=list(ENTRIES))
def test_an_entry_says_what_it_is(entry: Entry) -> None:
    assert entry.paper
    assert 2010 < entry.year <= 2026
    assert entry.memory
    assert entry.spaces
    assert set(entry.spaces) <= set(SPACES)
    assert entry.summary.endswith(".")
    doc = inspect.getdoc(entry.factory) or ""
    assert ">>>" in doc
    assert "<-" in doc or isinstance(entry.factory(), Backprop), "the update as one formula"


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=list(ENTRIES))
def test_every_option_is_documented_typed_and_has_a_default(entry: Entry) -> None:
    """Options that all methods share are told once, in the package's docstring."""
    own = inspect.getdoc(entry.factory) or ""
    hints = get_type_hints(entry.factory)
    for option, default in entry.options.items():
        assert option in hints, option
        assert default is not inspect.Parameter.empty
        assert get_args(hints[option]) or isinstance(default, hints[option])
        shared = f"`{option}`" in (methods.__doc__ or "")
        assert shared or re.search(rf"(?<![A-Za-z0-9]){option}\b", own), (
            f"{option} is not documented"
        )


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=list(ENTRIES))
def test_a_method_is_one_short_file_that_imports_no_other_method(entry: Entry) -> None:
    path = Path(inspect.getfile(entry.factory))
    source = path.read_text()
    assert len(source.splitlines()) <= 150
    others = {p.stem for p in path.parent.glob("*.py")} - {"__init__"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("zotune.methods"):
            assert node.module == "zotune.methods"
            assert not {a.name for a in node.names} & others
        if isinstance(node, ast.Import):
            assert not any(a.name.startswith("zotune.methods") for a in node.names)


def test_every_file_of_the_folder_holds_one_method_of_its_own_name() -> None:
    folder = Path(inspect.getfile(methods)).parent
    files = {p.stem.replace("_", "-") for p in folder.glob("*.py")} - {"--init--"}
    assert files == set(ENTRIES)


def test_a_double_name_fails_loudly() -> None:
    def mezo() -> Any: ...

    with pytest.raises(ZotuneError, match="already a method called 'mezo'"):
        methods.method(paper="p", year=2025, arxiv="", spaces=("weights",), memory="none")(mezo)


def test_records_are_the_nouns_and_what_methods_keep_in_their_own_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from zotune.methods import mezo

    assert set(nouns.__all__) <= set(methods.records())

    def in_file(name: str) -> type:
        made = dataclass(frozen=True)(type(name, (), {"__annotations__": {"b": float}, "b": 0.5}))
        made.__module__ = mezo.__name__
        return made

    own = in_file("Momentum")
    monkeypatch.setattr(mezo, "Momentum", own, raising=False)
    assert eval("Momentum(b=0.25)", methods.records()) == own(b=0.25)  # type: ignore[call-arg]
    monkeypatch.setattr(mezo, "Adam", in_file("Adam"), raising=False)
    with pytest.raises(ZotuneError, match="name of another record"):
        methods.records()


def test_methods_are_found_by_name_and_by_text() -> None:
    assert methods.parse("zo-sign(queries=2)", eps=0.5) == methods.get(
        "zo_sign", queries=2, eps=0.5
    )
    assert methods.parse("mezo(lr=1e-3, units='relative')").lr == 1e-3
    for text, message in (
        ("mezzo", "did you mean mezo"), ("mezo(epss=1)", "did you mean eps"),
        ("mezo + zoqo", "want one name"), ("mezo(", "cannot read"), ("mezo(1e-3)", "name=value"),
        ("mezo(lr=__import__('os'))", "cannot read"), ("mezo(directions='both')", "want one of"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=message):
            methods.parse(text)
