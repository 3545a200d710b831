"""The encoder with a head. Run: pytest tests/models/test_encoder.py"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from zotune.errors import BadInput, FormatError
from zotune.models import PooledClassifier, fingerprint, linears, load, write
from zotune.quant import quantize_model_

Tiny = Callable[..., Any]


class Words:
    """A tokenizer of one token per letter, padded at the end."""

    def __call__(self, texts: list[str], **_: Any) -> dict[str, torch.Tensor]:
        ids = [[5 + ord(c) % 90 for c in text] for text in texts]
        width = max(map(len, ids))
        return {
            "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in ids]),
            "attention_mask": torch.tensor(
                [[1] * len(row) + [0] * (width - len(row)) for row in ids]
            ),
        }


@pytest.fixture
def classifier(tiny: Tiny) -> PooledClassifier:
    return PooledClassifier.from_texts(tiny("bert"), Words(), ["bad", "good"], ["awful", "lovely"])


def test_embeddings_are_masked_means_of_unit_length(classifier: PooledClassifier) -> None:
    batch = Words()(["short", "a longer text"])
    found = classifier.embed(**batch)
    for row, text in zip(found, ("short", "a longer text"), strict=True):
        alone = classifier.encoder(**Words()([text])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(row, alone / alone.norm(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))


def test_the_head_starts_as_cosines_times_temperature(classifier: PooledClassifier) -> None:
    logits = classifier(**Words()(["awful", "lovely", "other"]))
    assert logits.shape == (3, 2)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.diagonal(), torch.tensor([20.0, 20.0]))
    assert (logits <= 20.0 + 1e-4).all()


def test_labels_are_their_own_texts_by_default(tiny: Tiny) -> None:
    encoder = tiny("bert")
    a = PooledClassifier.from_texts(encoder, Words(), ["x", "yy"], temperature=1.0)
    b = PooledClassifier.from_texts(encoder, Words(), ["0", "1"], ["x", "yy"], temperature=1.0)
    assert torch.equal(a.head.weight, b.head.weight)
    assert a.labels == ("x", "yy")


def test_labels_texts_and_head_must_match(tiny: Tiny) -> None:
    with pytest.raises(BadInput, match="got 1 texts for 2 labels"):
        PooledClassifier.from_texts(tiny("bert"), Words(), ["a", "b"], ["a"])
    with pytest.raises(BadInput, match="head has 3 outputs for 2 labels"):
        PooledClassifier(tiny("bert"), ["a", "b"], nn.Linear(32, 3))
    with pytest.raises(BadInput, match=r"head has 33 inputs; want 32 \(the last layer\) or 96"):
        PooledClassifier(tiny("bert"), ["a", "b"], nn.Linear(33, 2))


def test_a_bfloat16_encoder_gives_float32_logits(tiny: Tiny) -> None:
    model = PooledClassifier.from_texts(tiny("bert").bfloat16(), Words(), ["a", "b"])
    assert model(**Words()(["c"])).dtype == torch.float32


def test_a_head_on_every_layer_starts_with_the_last_ones_logits(
    classifier: PooledClassifier,
) -> None:
    batch = Words()(["any text", "a longer one"])
    narrow, last = classifier(**batch), classifier.embed(**batch)
    classifier.widen_()
    classifier.widen_()
    torch.testing.assert_close(classifier(**batch), narrow)
    states = classifier.embed(**batch)
    assert states.shape == (2, 32 * classifier.states)
    assert torch.equal(states[:, -32:], last)
    first = classifier.encoder.embeddings(Words()(["a"])["input_ids"])[0]
    assert torch.allclose(classifier.embed(**Words()(["a"]))[0, :32], first[0] / first.norm())


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("scheme", [None, "int4-g16"])
def test_a_classifier_is_saved_and_loaded_bit_for_bit(
    scheme: str | None, wide: bool, classifier: PooledClassifier, tmp_path: Path
) -> None:
    if scheme:
        quantize_model_(classifier.encoder, scheme)
    if wide:
        classifier.widen_()
    folder = write(classifier, tmp_path / "out")
    loaded = load(folder, compute_dtype="float32")
    assert loaded.kind == "classifier"
    assert isinstance(loaded.model, PooledClassifier)
    assert loaded.model.labels == ("bad", "good")
    assert loaded.format == ("zotune" if scheme else "float")
    batch = Words()(["any text", "more"])
    with torch.no_grad():
        assert torch.equal(loaded.model(**batch), classifier(**batch))
    assert fingerprint(loaded.model) == fingerprint(classifier)
    again = write(loaded.model, tmp_path / "again")
    for name in ("config.json", "model.safetensors", "head.safetensors"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_the_encoder_alone_can_be_loaded(classifier: PooledClassifier, tmp_path: Path) -> None:
    loaded = load(write(classifier, tmp_path), kind="encoder")
    assert loaded.kind == "encoder"
    assert type(loaded.model) is type(classifier.encoder)


def test_a_head_that_does_not_fit_is_refused(classifier: PooledClassifier, tmp_path: Path) -> None:
    write(classifier, tmp_path)
    save_file({"weight": torch.zeros(3, 32)}, tmp_path / "head.safetensors")
    with pytest.raises(FormatError, match="no weight with 2 rows"):
        load(tmp_path)
    (tmp_path / "head.safetensors").unlink()
    with pytest.raises(FormatError, match=r"head\.safetensors is missing"):
        load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["zotune_head"] = {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="it is no classifier"):
        load(tmp_path)


def test_linear_layers_are_those_of_encoder_and_head(classifier: PooledClassifier) -> None:
    names = [name for name, _ in linears(classifier)]
    assert names[0] == "embed.encoder.encoder.layer.0.attention.self.query"
    assert names[-1] == "head"
    assert len(names) == 2 * 6 + 2


@pytest.mark.parametrize(("name", "count"), [("llama", 14), ("gpt2", 8), ("opt", 12)])
def test_linear_layers_leave_out_the_output_embedding(name: str, count: int, tiny: Tiny) -> None:
    model = tiny(name)
    before = [n for n, _ in linears(model)]
    assert len(before) == count
    assert "lm_head" not in before
    quantize_model_(model, "int8-channel")
    assert [n for n, _ in linears(model)] == before


def test_fingerprints_tell_models_apart(tiny: Tiny) -> None:
    model, twin = tiny("llama"), tiny("llama")
    assert fingerprint(model) == fingerprint(twin)
    with torch.no_grad():
        twin.model.norm.weight[0] += 1e-6
    assert fingerprint(model) != fingerprint(twin)
    assert fingerprint(model) != fingerprint(tiny("llama").bfloat16())
