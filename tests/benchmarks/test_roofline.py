"""What `zotune bench roofline` counts and sorts. Run: pytest tests/benchmarks/test_roofline.py"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zotune.bench import growth, models, peaks, where
from zotune.bench.contenders import all_contenders
from zotune.bench.models import RandomLlama, Shape
from zotune.bench.products import operations
from zotune.bench.run import run
from zotune.bench.settings import BenchConfig
from zotune.bench.workload import Workload
from zotune.errors import BadInput

TINY = RandomLlama(3, 64, 128, 2, 1, vocabulary=96, shape=Shape(4, 8, 2, 1))


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.LLAMAS, "llama-tiny", TINY)
    measure = peaks.measure
    monkeypatch.setattr(peaks, "measure", lambda: measure(((8, 8, 8),), 1 << 10))


def test_operations_are_those_of_layers_head_and_attention_by_their_arithmetic() -> None:
    """2 tokens in out of each matrix; queries on keys and weights on values, 4 L^2 width each."""
    tokens, length = 4 * 8, 8
    body = (TINY.weights - TINY.vocabulary * TINY.hidden) * 2 * tokens
    head = 2 * 4 * (length - 1) * TINY.vocabulary * TINY.hidden  # the last token predicts nothing
    attention = TINY.layers * 4 * tokens * length * TINY.hidden
    for scheme, name in (("int8-channel-a8", "int8"), (None, "fp32")):
        prepared = Workload("llama-tiny", 4, length).prepared(scheme)
        found = operations(prepared.model, prepared.evaluate)
        assert found[name] == body + (head + attention if name == "fp32" else 0)
        assert sum(found.values()) == body + head + attention


def test_products_of_two_batches_of_matrices_are_counted_once() -> None:
    q, k = torch.ones(2, 3, 5, 4), torch.ones(2, 3, 7, 4)

    def eager() -> None:
        (q @ k.mT).softmax(-1) @ k

    counted = operations(nn.Identity(), eager)
    assert counted == operations(nn.Identity(), lambda: F.scaled_dot_product_attention(q, k, k))
    assert counted == {"fp32": 2 * 2 * 2 * 3 * 5 * 7 * 4}


def test_every_function_with_a_span_exists_and_comes_back() -> None:
    places = [place for names in where.SPANS.values() for place in names]
    before = [getattr(*where.owner_of(place)) for place in places]
    with where.spans():
        assert [getattr(*where.owner_of(p)) for p in places] != before
    assert [getattr(*where.owner_of(p)) for p in places] == before


def test_time_is_sorted_by_what_it_is_spent_on() -> None:
    x = torch.ones(256, 256)
    found = where.shares(lambda: [x @ x for _ in range(20)])
    assert max(found, key=lambda part: found[part]) == where.PRODUCTS
    contender = all_contenders(BenchConfig(only="qzo int8"))["qzo int8"]
    work = contender.start(Workload("llama-tiny", 4, 8).prepared(contender.scheme))
    found = where.shares(work)
    assert set(found) == set(where.PARTS)
    assert all(share > 0 for share in found.values()), found
    assert sum(found.values()) == pytest.approx(1)


def test_a_curve_is_no_line() -> None:
    straight = growth.Line.through([1, 2, 3, 4], [2.0, 3.0, 4.0, 5.0])
    assert straight.residual < 1e-9
    curved = growth.Line.through([1, 2, 3, 4], [1.0, 4.0, 9.0, 16.0])
    assert curved.residual > 0.1


def note(called: list[int], number: int, *seen: object) -> None:
    called.append(number)


def test_fewer_layers_and_shorter_rows_are_run_and_the_model_comes_back(encoder: str) -> None:
    for name in ("llama-tiny", encoder):
        prepared = Workload(name, 2, 8).prepared()
        before, (owner, whole) = prepared.evaluate(), growth.layers_of(prepared.model)
        called: list[int] = []
        for number, layer in enumerate(whole):
            layer.register_forward_hook(partial(note, called, number))
        with growth.keeping(prepared.model, 1):
            assert prepared.evaluate() > 0
        assert called == [0]
        assert growth.layers_of(prepared.model) == (owner, whole)
        assert prepared.evaluate() == before
        shorter = growth.cut(prepared.batch, 5)
        assert shorter["input_ids"].shape == (2, 5)
        if "target_ids" in shorter:
            assert shorter["target_ids"].shape == (2, 4)
            assert int(shorter["target_positions"].max()) == 3
        assert len(prepared.losses(prepared.model, shorter)[0]) == 2
    with pytest.raises(BadInput, match="no row of layers"):
        growth.layers_of(nn.Linear(1, 1))


def test_the_roofline_has_shares_growth_and_a_picture(tmp_path: Path) -> None:
    from schema import conforms

    settings = {"batch": 4, "length": 8, "rounds": 2, "calls": 1, "warmup": 1, "threads": 1}
    made = run("roofline", BenchConfig(
        model_name_or_path="llama-tiny", only="qzo int8", output_dir=str(tmp_path), **settings,  # type: ignore[arg-type]
    ))  # fmt: skip
    conforms({k: v for k, v in made.items() if k not in ("written", "plot")})
    found = made["details"]["contenders"]["qzo int8"]
    assert set(found["operations"]) == {"int8", "fp32"}
    assert found["growth"]["layers"]["sizes"] == [1, 2, 3]
    assert found["growth"]["length"]["sizes"] == [2, 4, 6, 8]
    judged = [row for row in made["rows"] if row["target"] is not None]
    assert len(judged) == 3
    assert Path(made["plot"]).read_bytes().startswith(b"\x89PNG")
