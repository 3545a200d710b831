"""Tokens that rows share run once, and nothing else changes.

Run: pytest tests/tasks/test_prefixes.py
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tasks import tiny
from torch import Tensor, nn

from zotune.core import spaces
from zotune.core.evaluator import TorchEvaluator
from zotune.core.meter import Meter
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.core.probe import Probe
from zotune.models import Loaded
from zotune.tasks import Task, prefixes
from zotune.tasks.batch import Batch, Narrow
from zotune.tasks.choice import Choice
from zotune.tasks.classification import Classification
from zotune.tasks.scoring import CausalScorer, Target, stack_targets
from zotune.tasks.sft import SFT

SHOTS = "a man eats an apple It was good\na woman reads a book It was bad\n"


def opt(tokenizer: Any) -> Loaded:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=16, ffn_dim=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=96, word_embed_proj_dim=8,
    )  # fmt: skip
    return tiny.loaded(tiny.fill_(OPTForCausalLM(config)), tokenizer, "causal")


MODELS: dict[str, Callable[[Any], Loaded]] = {"llama": tiny.llama, "gpt2": tiny.gpt2, "opt": opt}
SPACES = ("weights", "head", "weights(pattern='[.]1[.]')")


@pytest.fixture(autouse=True)
def _free_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever saves one token is done."""
    monkeypatch.setattr(prefixes, "FORWARD", 0)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.make_tokenizer()


def tasks() -> dict[str, Task]:
    films = ["fun", "dull and terrible", "great fun and I liked it"]
    labelled = [{"text": f"the film was {t}", "label": i % 2} for i, t in enumerate(films)]
    words = ["good and great", "bad"]
    asked = [
        {"prompt": SHOTS + p, "choices": [f"because {c}" for c in ("apple", "a book", "Rome")],
         "label": 1}
        for p in ("premise so", "premise hypothesis a man eats so")
    ]  # fmt: skip
    chats = [{"prompt": f"{SHOTS}question {q} answer ", "completion": q} for q in films]
    return {
        "words of several tokens": Classification(
            {"train": labelled}, ["0", "1"], SHOTS + "{text} It was", words
        ),
        "words of one token": Classification(
            {"train": labelled}, ["0", "1"], SHOTS + "{text} It was", ["good", "bad"]
        ),
        "choice": Choice({"train": asked}),
        "sft": SFT({"train": chats}),
    }


def probes(lanes: bool) -> list[Probe]:
    return [Probe(Key(3, query=q), s, lanes) for q in range(2) for s in (0.1, -0.1)]


def losses(
    task: Task, model: nn.Module, space: str, lanes: bool, narrow: bool, **options: Any
) -> Tensor:
    built = spaces.parse(space).build(model)
    built.bind_(0.1, 1.0, "relative")
    evaluator = TorchEvaluator(model, built, task.losses, narrow=narrow, **options)
    batch = task.batch(task.split("train"))
    return evaluator.losses(probes(lanes), batch, Gaussian()).per_example


class Rows:
    """Tokens that each layer computes."""

    def __init__(self, model: nn.Module) -> None:
        layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
        self.layers = [0] * len(layers)
        for i, layer in enumerate(layers):
            inner = next(layer.children())  # hooks of the layer itself see rows that it shares
            inner.register_forward_pre_hook(self._count(i), with_kwargs=True)

    def _count(self, i: int) -> Callable[..., None]:
        def count(module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            self.layers[i] += states.shape[0] * states.shape[1]

        return count


@pytest.mark.parametrize("lanes", [False, True], ids=["shared", "lanes"])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", MODELS)
def test_losses_of_shared_prefixes_are_those_of_whole_rows(
    name: str, space: str, lanes: bool, tokenizer: Any
) -> None:
    for title, task in tasks().items():
        model = task.prepare(MODELS[name](tokenizer)).requires_grad_(False)
        plain = losses(task, model, space, lanes, narrow=False)
        assert float(plain.std(0).max()) > 1e-3  # the probes differ, so agreement says something
        for options in ({}, {"stack": 1, "micro_batch": 2}):
            found = losses(task, model, space, lanes, narrow=True, **options)
            assert torch.allclose(found, plain, rtol=1e-5, atol=2e-5), (title, options)


@pytest.mark.parametrize("name", MODELS)
def test_a_common_prompt_runs_once_per_probe_and_below_the_first_site_once(
    name: str, tokenizer: Any
) -> None:
    task = tasks()["sft"]
    model = task.prepare(MODELS[name](tokenizer)).requires_grad_(False)
    batch = task.batch(task.split("train"))
    rows, length = batch["input_ids"].shape
    starts = batch["target_positions"].masked_fill(batch["target_mask"] == 0, length).amin()
    same = (batch["input_ids"] == batch["input_ids"][:1]).all(0).long().cumprod(0).sum()
    common = int(torch.minimum(same, starts))
    counted = Rows(model)
    losses(task, model, "weights", False, narrow=True)
    assert common > 10
    assert counted.layers == [4 * (common + rows * (length - common))] * 2
    counted.layers = [0, 0]
    losses(task, model, "weights(pattern='[.]1[.]')", False, narrow=True)
    below, above = counted.layers
    assert above == 4 * below == 4 * (common + rows * (length - common))


def test_candidates_read_their_examples_prompt_once(tokenizer: Any) -> None:
    task = tasks()["choice"]
    model = task.prepare(tiny.llama(tokenizer)).requires_grad_(False)
    counted = Rows(model)
    losses(task, model, "weights", True, narrow=False)
    plain, counted.layers = counted.layers[0], [0, 0]
    losses(task, model, "weights", True, narrow=True)
    assert counted.layers[0] < 0.5 * plain


texts = st.lists(st.integers(1, 5), min_size=1, max_size=7)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    front=st.lists(st.integers(1, 5), max_size=6),
    examples=st.lists(
        st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=3
    ),
    copies=st.integers(1, 3),
    forward=st.integers(-50, 5),
)
def test_any_rows_give_the_same_logprobs(
    front: list[int], examples: list[Any], copies: int, forward: int, tokenizer: Any
) -> None:
    """Empty prompts, equal rows, uneven answers; `forward` chooses between the ways."""
    model = tiny.llama(tokenizer).model
    width = max(len(answers) for _, answers in examples)
    targets = []
    for prompt, answers in examples:
        for j in range(width):
            ids = [*front, *prompt, *answers[j % len(answers)]]
            first = max(1, len(ids) - len(answers[j % len(answers)]))
            targets.append(Target(ids, list(range(first, len(ids))) or [len(ids) - 1]))
            if len(ids) < 2:
                return
    batch = Batch(stack_targets(targets, 0), len(examples)).repeat(copies)
    prefixes.FORWARD = forward  # set back by the fixture
    scorer = CausalScorer(split=True, cached=True)
    shared = replace(batch, narrow=Narrow(lambda _: nullcontext()))
    with torch.no_grad():
        whole = scorer.token_logprobs(model, batch)
        found = scorer.token_logprobs(model, shared)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


def test_models_without_keys_and_longer_texts_than_a_window_run_whole(tokenizer: Any) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    bloom = BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=16, n_layer=1, n_head=2))
    assert not CausalScorer.probe(tiny.fill_(bloom)).cached
    model = tiny.llama(tokenizer).model
    assert CausalScorer.probe(model).cached
    model.config.sliding_window = 8
    assert prefixes.windowed(model, 9)
    assert not prefixes.windowed(model, 8)


def test_rows_padded_on_the_left_run_whole() -> None:
    ids = torch.ones(2, 4, dtype=torch.long)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    batch = Batch(
        {"input_ids": ids, "attention_mask": mask}, 2, narrow=Narrow(lambda _: nullcontext())
    )
    assert not prefixes.plan(batch, torch.tensor([[3], [3]]), None).shares


# ---- logits --------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("space", ["norms", "head", "head(exact=True) + norms", "lora"])
def test_label_words_of_one_token_need_only_their_rows_of_the_output_layer(
    name: str, space: str, tokenizer: Any
) -> None:
    """Where the output layer is tuned itself all of it is multiplied, at one place per row."""
    task = tasks()["words of one token"]
    model = task.prepare(MODELS[name](tokenizer)).requires_grad_(False)
    if "exact" in space and name != "llama":  # a head that shares the embedding has no exact part
        return
    built = spaces.parse(space).build(model)
    built.bind_(0.1, 1.0, "relative")
    evaluator = TorchEvaluator(model, built, task.losses)
    batch = task.batch(task.split("train"))
    evaluator.losses(probes(False), batch, Gaussian())  # compiles what there is to compile
    with Meter() as meter:
        found = evaluator.losses(probes(False), batch, Gaussian())
    scorer, rows = CausalScorer.probe(model), 4 * batch.size
    whole: list[Tensor] = []

    def plain(module: nn.Module, here: Batch) -> tuple[Tensor, Tensor]:
        logits = scorer.logits(module, here).squeeze(1)
        scores = logits.gather(-1, here["candidate_ids"])
        whole.append(logits)
        loss = nn.functional.cross_entropy(scores, here["label"], reduction="none")
        return loss, torch.ones_like(loss)

    truth = TorchEvaluator(model, built, plain).losses(probes(False), batch, Gaussian())
    torch.testing.assert_close(found.per_example, truth.per_example, rtol=1e-5, atol=1e-5)
    for block, g in truth.exact.items():
        torch.testing.assert_close(found.exact[block], g, rtol=1e-4, atol=1e-6)
    assert whole[0].shape == (rows, len(tokenizer))
    if space == "norms":
        assert not [n for n in meter.sizes if n == rows * len(tokenizer)]


def test_no_piece_of_logits_is_larger_than_it_may_be(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    from zotune.tasks import scoring

    rows, vocabulary = 3, len(tokenizer)
    for title in ("sft", "words of several tokens", "choice"):
        task = tasks()[title]
        model = task.prepare(tiny.llama(tokenizer)).requires_grad_(False)
        batch = task.batch(task.split("train"))
        rows = len(batch["input_ids"])
        with torch.no_grad():
            plain, _ = task.losses(model, batch)
        monkeypatch.setattr(scoring, "MAX_LOGITS", 2 * rows * vocabulary)
        with torch.no_grad(), Meter() as meter:
            found, _ = task.losses(model, batch)
        torch.testing.assert_close(found, plain)
        assert batch["target_positions"].shape[1] > 2
        logits = [n for n in meter.sizes if n % vocabulary == 0]  # a prime
        assert 0 < max(logits) <= 2 * rows * vocabulary
        monkeypatch.undo()


def test_models_that_scale_their_logits_make_only_those_that_are_wanted(tokenizer: Any) -> None:
    """Their output layer is not all there is behind the body, so the model itself is asked."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0,
    )  # fmt: skip
    loaded = tiny.loaded(tiny.fill_(Gemma2ForCausalLM(config)), tokenizer, "causal")
    task = tasks()["words of one token"]
    model = task.prepare(loaded)
    batch = task.batch(task.split("train"))
    scorer = CausalScorer.probe(model)
    assert not scorer.split
    rows, length = batch["input_ids"].shape
    with torch.no_grad(), Meter() as meter:
        found = scorer.label_logits(model, batch)
        whole = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    last = whole[torch.arange(rows), batch["target_positions"].squeeze(1)]
    torch.testing.assert_close(found, last.gather(-1, batch["candidate_ids"]))
    assert meter.sizes.count(rows * length * len(tokenizer)) == meter.sizes.count(whole.numel())
