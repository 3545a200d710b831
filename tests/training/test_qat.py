"""Quantization-aware training end to end: one loop, a quantized model, runs that go on."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn
from training import lab

from zotune import tasks
from zotune.errors import BadInput, DataError, JournalError
from zotune.models import load
from zotune.quant import QuantLinear
from zotune.quant.qat import fake_layers
from zotune.training.objective import Objective
from zotune.training.preparation import Preparation, fake_, start_
from zotune.training.qat import zeroqat
from zotune.training.quantize import quantize
from zotune.training.rebuild import replay

DATA = Path(os.environ.get("ZOTUNE_DATA", "../shared/data"))
STORIES = DATA / "stories260K-hf"
TEXT = DATA / "text" / "tinystories1000" / "TinyStories-1000.txt"
needs_stories = pytest.mark.skipif(
    not (STORIES.is_dir() and TEXT.is_file()), reason="needs stories260K-hf and tinystories1000"
)
HOW = Preparation("int3-g8-asym", exclude=("head",), examples=8)


def config(out: Path, **options: Any) -> Any:
    given = {
        "method": "mezo(units='relative', eps=0.1, queries=4)",
        "learning_rate": 0.5,
        "space": None,
    }
    return lab.config(out, **{**given, **options})


def test_a_run_leaves_ordinary_quantized_layers_and_says_what_it_reached(tmp_path: Path) -> None:
    model = toys.small()
    found = zeroqat(
        config(tmp_path / "run", max_steps=40, per_device_train_batch_size=16),
        HOW,
        model=model,
        task=lab.task(),
    )
    assert not fake_layers(model)
    assert isinstance(model.up, QuantLinear)
    assert isinstance(model.down, QuantLinear)
    numbers = found.texts["objective"]
    assert list(numbers) == ["float", "rtn", "start", "after"]
    assert numbers["after"] == found.result.after
    assert numbers["after"] < numbers["start"]
    assert set(found.exceptions["unfolded"]) == {"up", "down"}  # no family whose folds are known
    assert found.result.trainable == 2 * 16 * 32 + 2 * (32 * 2 + 16 * 4)  # no transforms to tune


class Headed(nn.Module):
    """A model with a new head, which begins by changing nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.outer = model, nn.Linear(toys.LABELS, toys.LABELS)
        nn.init.eye_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.outer(self.model(input_ids))
        return out


class Heading(Objective):
    """Puts a new head on the model whenever it is prepared, as classification does."""

    def prepare(self, loaded: Any) -> nn.Module:
        return Headed(loaded.model)


def test_what_it_reached_counts_the_head_that_the_task_put_on(tmp_path: Path) -> None:
    task = Heading(toys.cross_entropy, lab.rows(), lab.rows(12))
    given = config(tmp_path / "run", max_steps=40, space="weights(pattern='outer')")
    found = zeroqat(given, HOW, model=toys.small(), task=task)
    numbers = found.texts["objective"]
    assert numbers["after"] == found.result.after
    assert numbers["after"] < 0.98 * numbers["start"]
    how, other = Preparation("int4-g8", exclude=("head",)), config(tmp_path / "other")
    with pytest.raises(BadInput, match="no place for the head"):
        zeroqat(other, how, format="compressed-tensors", model=toys.small(), task=task)
    assert not (tmp_path / "other" / "model").exists()


def interrupted(after: int) -> Objective:
    calls = {"n": 0}

    def losses(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        calls["n"] += 1
        if calls["n"] > after:
            raise KeyboardInterrupt
        return toys.cross_entropy(model, batch)

    return Objective(losses, lab.rows(), lab.rows(12))


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    zeroqat(config(whole), HOW, model=toys.small(), task=lab.task())
    with pytest.raises(KeyboardInterrupt):
        zeroqat(config(broken), HOW, model=toys.small(), task=interrupted(30))
    again = config(broken, resume_from_checkpoint=True)
    found = zeroqat(again, HOW, model=toys.small(), task=lab.task())
    assert found.result.steps == 12
    files = [folder / "model" / "model.safetensors" for folder in (whole, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_light_tunes_queries_and_values_only() -> None:
    model = toys.llama()
    fake_(model, Preparation("int4-channel"))
    from zotune.training.folders import from_module

    start_(from_module(model), lab.task(), Preparation("int4-channel", light=True), config(Path()))
    assert {name.split(".")[-1] for name in fake_layers(model)} == {"q_proj", "v_proj"}
    frozen = toys.small()
    fake_(frozen, HOW)
    light = Preparation("int3-g8-asym", exclude=("head",), light=True, examples=8)
    with pytest.raises(BadInput, match="no query and value projections known by name"):
        start_(from_module(frozen), lab.task(), light, config(Path()))


@needs_stories
@pytest.mark.parametrize(
    ("scheme", "format"),
    [("int8-channel", "gptq"), ("int4-channel-a4", "compressed-tensors"),
     ("int4-channel-a4asym", "compressed-tensors"), ("int2-channel-asym", "zotune"),
     ("int6-channel-a6asym", "zotune"), ("int4-g32", "gguf"), ("int5-g32-asym", "gguf")],
)  # fmt: skip
def test_what_is_exported_evaluates_to_the_same_number(
    scheme: str, format: str, tmp_path: Path
) -> None:
    text = tmp_path / "stories.txt"
    text.write_text(TEXT.read_text()[:20_000])
    clip = ", clip_inputs=True" if scheme == "int6-channel-a6asym" else ""
    turned = scheme in ("int4-channel-a4", "int4-g32")
    left = ("lm_head", "down_proj") if format == "gguf" else None  # 32 does not divide 172
    found = quantize(
        STORIES, tmp_path / "run", scheme, data=text, format=format, length=32, exclude=left,
        method=f"zeroqat(steps=2, method='mezo', examples=16, batch_size=8, max_eval_samples=12, "
        f"report_to='none', rotate={turned}{clip})",
    )  # fmt: skip
    after = found["texts"]["lm"]["after"]
    loaded = load(tmp_path / "run" / "model", compute_dtype="float32")
    assert sum(isinstance(m, QuantLinear) for m in loaded.model.modules()) == (30 if left else 35)
    # A tokenizer from a GGUF file begins every text with its own mark.
    loaded = dataclasses.replace(loaded, tokenizer=load(STORIES).tokenizer)
    task = tasks.get("lm", data=str(text), max_length=32)
    model = task.prepare(loaded)
    from zotune.training.batches import spread

    examples = spread(task.split("dev"), 12)
    assert task.evaluate(model, examples, 64)["perplexity"] == pytest.approx(after, rel=1e-5)


@needs_stories
def test_bad_input_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    def run(method: str, scheme: str = "int4-channel-a8", **options: Any) -> None:
        quantize(STORIES, tmp_path / "run", scheme, method=method, **{"data": TEXT, **options})

    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(DataError, match="holds no text"):
        run("zeroqat", data=empty)
    with pytest.raises(BadInput, match="no place for clipped activations"):
        run("zeroqat(clip_inputs=True)", "int8-channel-a8", format="compressed-tensors")
    with pytest.raises(BadInput, match="format 'gptq' does not express"):
        run("zeroqat", format="gptq")
    with pytest.raises(BadInput, match="unknown option 'stepz'"):
        run("zeroqat(stepz=3)")
    with pytest.raises(BadInput, match="searches its own start"):
        run("zeroqat + gptq")
    with pytest.raises(BadInput, match="group_size=48 does not divide"):
        run("zeroqat", "int4-g48")
    for scheme, message in (
        ("int9-channel", "bits=9"), ("int1-channel", "bits=1"), ("int4-channel-a3", "act_bits=3"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=message):
            run("zeroqat", scheme)
    assert not (tmp_path / "run").exists()


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no layer to quantize"):
        zeroqat(config(tmp_path / "r"), HOW, model=toys.small(0, "int4-g8"), task=lab.task())
    assert torch.is_grad_enabled()


def test_a_run_given_as_objects_is_replayed_with_its_task_and_says_so_without(
    tmp_path: Path,
) -> None:
    whole = toys.small()
    zeroqat(config(tmp_path / "run"), HOW, model=whole, task=lab.task())
    with pytest.raises(JournalError, match="give task="):
        replay(tmp_path / "run", toys.small())
    again = toys.small()
    found = replay(tmp_path / "run", again, task=lab.task())
    assert found["steps"] == 12
    assert toys.digest(again) == toys.digest(whole)


def test_a_preparation_survives_json() -> None:
    how = Preparation("int2-g8", exclude=("a", "b"), rotate=True, light=True)
    assert Preparation.of(json.loads(json.dumps(dataclasses.asdict(how)))) == how


@pytest.mark.parametrize("make", [toys.llama, toys.gpt2, toys.bert])
def test_a_rotated_start_loses_nothing_but_rounding_and_lists_what_it_does_not_reach(
    make: Any,
) -> None:
    model = make()
    ids = toys.batch(4)["input_ids"]
    with torch.no_grad():
        before = model(ids).logits
        exceptions = fake_(model, Preparation("int8-channel", rotate=True), seed=3)
        after = model(ids).logits
    assert float((after - before).abs().max()) < 0.05 * float(before.abs().max())
    assert set(exceptions["unrotated"]) <= set(fake_layers(model))
    assert exceptions["unrotated"]
