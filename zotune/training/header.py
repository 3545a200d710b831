"""What a journal's header says of a run, and the run's own space rebuilt from it."""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from zotune.core.space import Space, SpaceSpec
from zotune.core.spaces.lora import sizes
from zotune.errors import BadInput, JournalError
from zotune.methods import records
from zotune.models import PooledClassifier
from zotune.models.adapter import CHILD, LowRank, adapters, attach, device_of
from zotune.models.shift import Shift, norms_of, shifts
from zotune.tasks.data import fingerprint as data_fingerprint
from zotune.training.batches import spread
from zotune.training.journal import Journal

if TYPE_CHECKING:
    from zotune.training.assembled import Bench

_LOOKED_AT = 256
VERSIONS = ("torch", "numpy", "transformers")


def header_of(bench: Bench) -> dict[str, Any]:
    """What a journal must say so that base + journal give the tuned model back."""
    from importlib.metadata import version

    import zotune
    from zotune.core import noise

    wrapped = isinstance(bench.model, PooledClassifier) and bench.model is not bench.loaded.model
    units = {b.name: b.unit for b in bench.space if isinstance(b.unit, float)}
    return {
        "config": bench.config.as_dict(),
        "method": repr(bench.method),
        "space": repr(bench.spec),
        "blocks": [b.name for b in bench.space],
        "units": units,
        "seed": bench.config.seed,
        "total": bench.config.max_steps,
        "coefficients": bench.coefficients,
        "base": bench.base,
        "prepared": dict(bench.loaded.prepared),
        "before": {k: v for k, v in bench.before.items() if math.isfinite(v)},
        "kind": bench.loaded.kind,
        "labels": list(bench.model.labels) if wrapped else None,  # type: ignore[union-attr,arg-type]
        "head": list(bench.model.head.weight.shape) if wrapped else None,  # type: ignore[union-attr,arg-type]
        "adapters": {p: a.scaling for p, _, a in adapters(bench.model)
                     if f"{p}.{CHILD}.A" in bench.added},
        "shifts": [path for path, _, _ in shifts(bench.model)],
        "stack": bench.evaluator.stack,
        "room": bench.evaluator.room,
        "streamed": bench.streaming is not None,
        "levels": {} if bench.freezing is None else bench.freezing.levels,
        "examples": len(bench.batches.examples),
        "data": None if bench.private else digest_of(bench.batches.examples),
        "task": bench.task.name,
        "noise": noise.VERSION,
        "kernels": bench.kernels,
        "versions": {"zotune": zotune.__version__, **{n: version(n) for n in VERSIONS}},
    }  # fmt: skip


def digest_of(examples: Sequence[Any]) -> str:
    """Tells two data sets apart by their length and 256 rows spread over them."""
    return data_fingerprint([len(examples), *spread(examples, _LOOKED_AT)]).hex()


def check_noise(journal: Journal) -> None:
    """Refuse a journal whose keys stand for other directions here."""
    from zotune.core.noise import VERSION

    if journal.header["noise"] != VERSION:
        raise JournalError(
            f"{journal.path} was written with noise version {journal.header['noise']}; this zotune "
            f"draws version {VERSION}: use zotune {journal.header['versions']['zotune']}"
        )


def check_base(journal: Journal, base: str) -> None:
    """Refuse to go on from another model than the journal's."""
    if journal.header["base"] != base:
        prepared = journal.header.get("prepared")
        searched = (
            f"prepared as {prepared} on the run's own examples, on as many threads" if prepared
            else f"scheme={journal.header['config'].get('scheme')}"
        )  # fmt: skip
        raise JournalError(
            f"this is not the base model of {journal.path}: its fingerprint is {base[:12]}..., the "
            f"journal wants {journal.header['base'][:12]}... "
            f"({journal.header['config'].get('model_name_or_path') or 'a model given in Python'}, "
            f"{searched}); give that one"
        )


def rebuild_space(model: nn.Module, spec: SpaceSpec, journal: Journal) -> Space:
    """The run's own space: adapters and head from the attachments, units from the header."""
    place_added_(model, journal.header, journal.attached)
    space = spec.build(model, None)
    wanted = journal.header["blocks"]
    space = space.without({b.name for b in space} - set(wanted))
    if [b.name for b in space] != wanted:
        raise JournalError(f"{journal.path}: the space has other blocks than the journal names")
    units: Mapping[str, float] = journal.header["units"]
    for block in space:
        block.unit = units.get(block.name, block.unit)
    return space


def place_added_(model: nn.Module, header: dict[str, Any], attached: Mapping[str, Tensor]) -> None:
    """Adapters and head as the run started with them."""
    modules = dict(model.named_modules())
    held = dict(attached)
    for path, scaling in header["adapters"].items():
        layer, a = modules.get(path), held.pop(f"{path}.{CHILD}.A")
        if layer is None:
            raise JournalError(
                f"the journal names an adapter on {path!r}; the model has no such layer"
            )
        b = held.pop(f"{path}.{CHILD}.B", None)
        zeros = a.new_zeros(sizes(layer)[1], a.shape[0])
        attach(layer, LowRank(a, zeros if b is None else b, scaling).to(device_of(layer)))
    norms = dict(norms_of(model))
    for path in header.get("shifts", ()):
        if path not in norms:
            raise JournalError(f"the journal moves the norm {path!r}, which this model has not")
        attach(norms[path], Shift.none(norms[path]))
    if header["head"] and header["head"][1] != model.head.in_features:  # type: ignore[union-attr]
        model.widen_()  # type: ignore[operator]
    own = model.state_dict()
    for name, tensor in held.items():
        if name not in own or own[name].shape != tensor.shape:
            raise JournalError(f"the journal holds {name!r}, which this model does not have")
        own[name].copy_(tensor)


def read_record(text: str, kind: Any) -> Any:
    """A frozen record from its repr: names of `methods.records()` and literals, nothing else runs.

    >>> read_record("SGD()", object)
    SGD()
    """
    try:
        value = _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, TypeError, BadInput) as error:
        raise JournalError(
            f"the journal holds a record that cannot be read: {text!r} ({error})"
        ) from error
    if not isinstance(value, kind):
        raise JournalError(f"the journal holds {text!r} where another kind of record belongs")
    return value


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        kind = records().get(node.func.id)
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            raise ValueError(f"unknown record {node.func.id}")
        return kind(**{str(k.arg): _value(k.value) for k in node.keywords})
    if isinstance(node, ast.Tuple):
        return tuple(map(_value, node.elts))
    if isinstance(node, ast.Name) and node.id in ("inf", "nan"):
        return float(node.id)
    return ast.literal_eval(node)
