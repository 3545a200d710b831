"""Real checkpoints, skipped where absent. Run: pytest tests/models/test_real.py"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from zotune.models import PooledClassifier, fingerprint, load, write
from zotune.quant import kernels

STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside"


@pytest.mark.parametrize("scheme", [None, "int8-channel-a8", "int4-g4"])
def test_stories_survive_quantization_and_saving(
    stories: Path, scheme: str | None, tmp_path: Path
) -> None:
    loaded = load(stories, scheme=scheme, compute_dtype="float32")
    prompt = torch.tensor([[1, *loaded.tokenizer("Once upon a time")["input_ids"]]])
    if scheme is None:
        ids = loaded.model.generate(prompt, max_new_tokens=24, do_sample=False)[0]
        assert loaded.tokenizer.decode(ids, skip_special_tokens=True).strip().startswith(STORY)
    write(loaded.model, tmp_path / "out", source=loaded.path)
    again = load(tmp_path / "out", compute_dtype="float32")
    assert again.tokenizer("Once upon")["input_ids"] == loaded.tokenizer("Once upon")["input_ids"]
    assert fingerprint(again.model) == fingerprint(loaded.model)
    with torch.no_grad():
        assert torch.equal(again.model(prompt).logits, loaded.model(prompt).logits)
    if scheme is None:
        stored = [(f / "tokenizer.json").read_bytes() for f in (stories, tmp_path / "out")]
        assert stored[0] == stored[1]


@pytest.mark.parametrize(
    ("scheme", "cosine"), [("int8-channel-a8", 0.99), ("int4-g64", 0.93), ("int4-g64-asym", 0.93)]
)
def test_minilm_embeddings_stay_near_the_float_ones(
    minilm: Path, scheme: str, cosine: float
) -> None:
    texts = ["a gripping, funny film", "the plot makes no sense at all"]
    exact = load(minilm)
    batch = dict(exact.tokenizer(texts, padding=True, return_tensors="pt"))
    model = load(minilm, scheme=scheme).model
    with torch.no_grad():
        a, b = (
            PooledClassifier.from_texts(m, exact.tokenizer, ["x", "y"]).embed(**batch)
            for m in (exact.model, model)
        )
        assert (a * b).sum(-1).min() > cosine
        fast = model(**batch).last_hidden_state
        with kernels.force("reference"):
            slow = model(**batch).last_hidden_state
    # A sum that is rounded another way makes one activation's code another now and then, and every
    # layer above sees it: layers agree to 3e-6 on equal inputs (`test_rounded.py`).
    assert (fast - slow).norm() / slow.norm() < (0.1 if "a8" in scheme else 0.01)
