"""The contenders: one model, one fixed batch, one loss; only the way of training differs.

Ours are named by method and arithmetic ("qzo int4"), their floor is twice the plain forward of the
same model ("two forwards int4"), peers are others' steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from zotune.bench.dequantizing import dequantizing_
from zotune.bench.peft_lora import MISSING, attach_lora_, has_peft
from zotune.bench.restated import QZO, AdamW, MeZO
from zotune.bench.settings import BenchConfig
from zotune.bench.timing import Work
from zotune.bench.workload import Prepared, Workload
from zotune.errors import BadInput
from zotune.models.load import multiplies_bfloat16
from zotune.quant.running import kernels_of
from zotune.quant.scheme import Scheme

MEZO, QZO_PEER, LORA, QLORA, ADAMW = (
    "MeZO restated", "QZO restated", "LoRA backprop", "QLoRA backprop", "AdamW backprop",
)  # fmt: skip
ONE_BY_ONE = ", one probe at a time"
Role = Literal["ours", "floor", "peer"]


@dataclass(frozen=True)
class Contender:
    """One way to spend time on a batch.

    start: gives one step of it on a prepared model. scheme, dtype: of that model. alone: whether it
    changes the model so that nobody else can use it. floor: the contender below which it cannot
    come. weight: bytes that it takes for each of the model's numbers, about. method, space: of
    ours.
    """

    name: str
    role: Role
    start: Callable[[Prepared], Work]
    weight: float
    scheme: str | None = None
    dtype: str = "float32"
    alone: bool = False
    floor: str | None = None
    method: str | None = None
    space: str | None = None

    @property
    def integer(self) -> bool:
        """Whether its products are of int8 with int8."""
        return self.scheme is not None and Scheme.parse(self.scheme).integer_inputs


@dataclass
class Models:
    """Prepared models, shared by the contenders that leave them usable."""

    workload: Workload
    held: dict[tuple[str | None, str], Prepared] = field(default_factory=dict)

    @property
    def kernels(self) -> dict[str, dict[str, str]]:
        """What each kind of layer of the shared models runs on."""
        return {
            ", ".join(filter(None, kind)): kernels_of(prepared.model)
            for kind, prepared in self.held.items()
        }

    def work(self, contender: Contender) -> Work:
        """The contender on its model, ready to be stepped."""
        return contender.start(self.prepared(contender))

    def prepared(self, contender: Contender) -> Prepared:
        """The contender's model: its own, or one that others use too."""
        kind = (contender.scheme, contender.dtype)
        if contender.alone:
            return self.workload.prepared(*kind)
        if kind not in self.held:
            self.held[kind] = self.workload.prepared(*kind)
        return self.held[kind]


def all_contenders(config: BenchConfig) -> dict[str, Contender]:
    """Every contender by name, ours first; if `only` names any, those and their floors.

    Raises:
        BadInput: two schemes of one width, or a part of `only` that no name has.
    """
    found = [*_dense(), *_quantized(_by_bits(config)), *_peers(_by_bits(config))]
    order: Mapping[Role, int] = {"ours": 0, "floor": 1, "peer": 2}
    names = {c.name: c for c in sorted(found, key=lambda c: order[c.role])}
    wanted: set[str | None] = set()
    for part in config.words("only"):
        exact = {part, part + ONE_BY_ONE} & set(names)
        found_here = exact or {n for n in names if part in n}
        if not found_here:
            raise BadInput(f"only={part!r} is part of no name; there are: {', '.join(names)}")
        wanted |= found_here | {names[n].floor for n in found_here}
    return {n: c for n, c in names.items() if not wanted or n in wanted}


def _by_bits(config: BenchConfig) -> dict[str, Scheme]:
    found: dict[str, Scheme] = {}
    for text in config.words("scheme"):
        scheme = Scheme.parse(text)
        label = f"{scheme.kind}{scheme.bits}"
        if scheme.act_bits not in (None, scheme.bits):  # of 8 bits, int8 goes without saying
            label += f"a{scheme.act_bits}"
        if label in found:
            raise BadInput(f"scheme={config.scheme!r} names {label} twice; give one of each width")
        found[label] = scheme
    return found


def _dense() -> Iterator[Contender]:
    for label, dtype, weight in _dtypes("fp32", "bf16"):
        yield from _ours("mezo", "weights", label, None, dtype, weight)
        yield _floor(label, None, dtype, weight)


def _quantized(schemes: Mapping[str, Scheme]) -> Iterator[Contender]:
    for bits, scheme in schemes.items():
        for label, dtype, _ in _dtypes(bits, f"{bits} bf16"):
            weight = scheme.bits / 8 + 0.2  # the embedding stays float
            yield from _ours("qzo", "scales", label, str(scheme), dtype, weight)
            if scheme.integer_inputs and dtype == "float32":
                yield from _ours("zoqo", "codes", label, str(scheme), dtype, weight)
            yield _floor(label, str(scheme), dtype, weight)


def _dtypes(wide: str, narrow: str) -> Iterator[tuple[str, str, float]]:
    """(label, dtype of what is float, bytes of a number): bfloat16 where the CPU multiplies it."""
    yield wide, "float32", 4.0
    if multiplies_bfloat16():
        yield narrow, "bfloat16", 2.0


def _ours(
    method: str, space: str, label: str, scheme: str | None, dtype: str, weight: float
) -> Iterator[Contender]:
    for suffix, stack in (("", None), (ONE_BY_ONE, 1)):

        def start(prepared: Prepared, stack: int | None = stack) -> Work:
            tuner = prepared.tuner(method, space, stack)
            return lambda: tuner.step(prepared.batch)

        yield Contender(f"{method} {label}{suffix}", "ours", start, weight, scheme, dtype,
                        floor=f"two forwards {label}", method=method, space=space)  # fmt: skip


def _floor(label: str, scheme: str | None, dtype: str, weight: float) -> Contender:
    def start(prepared: Prepared) -> Work:
        return lambda: (prepared.evaluate(), prepared.evaluate())

    return Contender(f"two forwards {label}", "floor", start, weight, scheme, dtype)


def _peers(schemes: Mapping[str, Scheme]) -> Iterator[Contender]:
    def mezo(prepared: Prepared) -> Work:
        return MeZO(prepared.model, prepared.loss).step

    def qzo(prepared: Prepared) -> Work:
        layers = dequantizing_(prepared.model)
        return QZO([layer.scale for layer in layers], prepared.loss).step

    def adamw(prepared: Prepared) -> Work:
        return AdamW(prepared.model.parameters(), prepared.loss).step

    def lora(prepared: Prepared) -> Work:
        return AdamW(attach_lora_(prepared.model), prepared.loss, lr=2e-4).step

    def qlora(prepared: Prepared) -> Work:
        dequantizing_(prepared.model)
        return lora(prepared)

    yield Contender(MEZO, "peer", mezo, 5, alone=True)
    yield Contender(LORA, "peer", lora, 6, alone=True)
    yield Contender(ADAMW, "peer", adamw, 18, alone=True)
    groupwise = next((s for s in schemes.values() if not s.integer_inputs), None)
    if groupwise is not None:
        yield Contender(QZO_PEER, "peer", qzo, 1, str(groupwise), alone=True)
        yield Contender(QLORA, "peer", qlora, 2, str(groupwise), alone=True)


def left_out(contender: Contender, weights: int) -> str | None:
    """Why a contender cannot be run here, in words; None where it can."""
    import psutil

    if contender.name in (LORA, QLORA) and not has_peft():
        return MISSING
    wanted, free = contender.weight * weights, psutil.virtual_memory().available
    if wanted > 0.8 * free:
        return f"wants about {wanted / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    return None
