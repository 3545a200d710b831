"""`zotune.training.quantize` on a real model: calibration pays, and so does what is written."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from zotune.errors import BadInput, FormatError
from zotune.models import load
from zotune.training.quantize import quantize

DATA = Path(os.environ.get("ZOTUNE_DATA", "../shared/data"))
STORIES = DATA / "stories260K-hf"
TEXT = DATA / "text" / "tinystories1000" / "TinyStories-1000.txt"
needs_stories = pytest.mark.skipif(
    not (STORIES.is_dir() and TEXT.is_file()), reason="needs stories260K-hf and tinystories1000"
)
OPTIONS: dict[str, Any] = {"samples": 24, "length": 128}


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A file to calibrate on, and other text to measure on."""
    text = TEXT.read_text()
    cut = text.find("\n", len(text) // 2)
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(text[:cut])
    return path, text[cut : cut + 40_000]


def perplexity(model: nn.Module, tokenizer: Any, text: str) -> float:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = torch.tensor([[1, *ids[k : k + 127]] for k in range(0, len(ids) - 127, 127)])
    with torch.no_grad():
        logits = model(rows).logits.float()
    return math.exp(cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()))


def measured(
    method: str, scheme: str, halves: tuple[Path, str], folder: Path, **more: Any
) -> float:
    quantize(STORIES, folder, scheme, method=method, data=halves[0], **OPTIONS, **more)
    found = load(folder, compute_dtype="float32")
    return perplexity(found.model, found.tokenizer, halves[1])


@needs_stories
@pytest.mark.parametrize(
    ("scheme", "gap"), [("int4-channel", 0.8), ("int3-channel", 0.7), ("int2-g4", 0.8)]
)
def test_gptq_closes_a_part_of_the_gap_that_rounding_opens(
    scheme: str, gap: float, halves: tuple[Path, str], tmp_path: Path
) -> None:
    float_model = load(STORIES)
    base = math.log(perplexity(float_model.model, float_model.tokenizer, halves[1]))
    rtn = math.log(measured("rtn", scheme, halves, tmp_path / "rtn"))
    gptq = math.log(measured("gptq", scheme, halves, tmp_path / "gptq"))
    assert base < gptq < base + gap * (rtn - base)


@needs_stories
def test_awq_before_gptq_is_better_than_rounding_in_another_format(
    halves: tuple[Path, str], tmp_path: Path
) -> None:
    rtn = measured("rtn", "int4-channel", halves, tmp_path / "rtn")
    both = measured(
        "awq + gptq", "int4-channel", halves, tmp_path / "both", format="compressed-tensors"
    )
    assert both < 0.97 * rtn


@needs_stories
def test_a_gguf_file_brings_its_tokenizer(tmp_path: Path) -> None:
    exclude = ["lm_head", "down_proj"]
    quantize(STORIES, tmp_path / "q", "int8-g32", format="gguf", exclude=exclude)
    found, before = load(tmp_path / "q"), load(STORIES)
    text = TEXT.read_text()[:4000]
    assert found.tokenizer(text).input_ids == before.tokenizer(text).input_ids
    base = perplexity(before.model, before.tokenizer, text)
    assert perplexity(found.model, found.tokenizer, text) == pytest.approx(base, rel=0.01)


def test_what_does_not_go_together_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="unknown"):
        quantize(tmp_path, tmp_path / "q", method="gptqq")
    with pytest.raises(BadInput, match="does not express"):
        quantize(tmp_path, tmp_path / "q", "int4-g64", format="gguf")
    with pytest.raises(FormatError):
        quantize(tmp_path / "none", tmp_path / "q")
    assert not (tmp_path / "q").exists()
