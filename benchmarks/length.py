"""What like lengths together, shared prompts and sizes from free memory save.

    ZOTUNE_DATA=DIR python benchmarks/length.py

tokens: padded tokens per step on the lengths of real texts, in pieces of like length and with
batches of like length, over whole batches. step: seconds of `qzo` on int4 MiniLM, whole batches and
pieces in turn. prompts: tokens and seconds of `mezo` on a random Llama whose rows share a prompt.
room: what `micro_batch=auto` predicts of a step's memory. tensors: what lives in a step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

from benchmarks.harness import Row, Work, begin, interleave, parser, report
from zotune import methods, tasks
from zotune.bench.models import folder_of
from zotune.bench.workload import Workload
from zotune.core import spaces
from zotune.core.evaluator import TorchEvaluator
from zotune.core.fitting import fitted, trial_of
from zotune.core.meter import peak_of
from zotune.core.method import Method
from zotune.core.step import Tuner
from zotune.models import Loaded, load
from zotune.models.load import find_folder
from zotune.tasks.batch import Batch
from zotune.tasks.choice import Choice
from zotune.tasks.classification import Classification
from zotune.tasks.task import Task
from zotune.training.batches import Batches

INT4 = "int4-g64"
MOST = 1 << 14
"""Tokens per piece: more than any batch here has, so that padding alone decides."""
SHOTS = (
    "It is a warm and funny film. It was great\nThe story goes nowhere. It was terrible\n"
    "Two hours that feel like five. It was terrible\nA small wonder from start to end. It was "
    "great\n"
)
TEXTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "trec": lambda row: row["text"],
    "sst2": lambda row: row["text"],
    "boolq": lambda row: f"{row['passage']} {row['question']}",
    "squad": lambda row: f"{row['context']} {row['question']}",
}


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    flags = parser(
        __doc__, batch=16, steps=50, texts=2000, rounds=5, timed=4, layers=4, hidden=256,
    )  # fmt: skip
    flags.add_argument("--sets", nargs="+", choices=list(TEXTS), default=list(TEXTS))
    return flags.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    given = options(words)
    begin(given)
    rows = [row for name in given.sets for row in token_rows(name, given)]
    for name in given.sets:
        rows += step_rows(name, given) if name != "squad" else []
    rows += [row for name in prompted(given) for row in prompt_rows(name, given)]
    report("length", [*rows, *room_rows(given), *tensor_rows(given)], given)


class Lengths:
    """The part of a task that batches of like length ask for: texts as numbers of tokens."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths

    def encode(self, example: int) -> int:
        return self.lengths[example]

    def extent(self, features: int) -> tuple[int, int]:
        return 1, features

    def collate(self, features: Sequence[int]) -> Batch:
        return Batch({"x": torch.zeros(len(features), max(features))}, len(features))

    def varied(self, batch: Batch, draw: Any) -> Batch:
        return batch


def folder(given: argparse.Namespace) -> Path:
    """Where the encoder lies, whose tokenizer the Llama shares."""
    return find_folder(given.model or folder_of("minilm"))


def rows_of(name: str, count: int) -> list[dict[str, Any]]:
    """The first examples of a task's largest split."""
    task = tasks.get(name)
    return list(max((task.split(split) for split in task.splits), key=len)[:count])


def token_rows(name: str, given: argparse.Namespace) -> list[Row]:
    """Padded tokens of the same steps; the last row is all that is not padding."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder(given))
    texts = [TEXTS[name](row) for row in rows_of(name, given.texts)]
    ids = tokenizer(texts, truncation=True, max_length=512)["input_ids"]
    task: Any = Lengths([len(row) for row in ids])
    found = {}
    for title, how in {"whole": {}, "pieces": {"most": MOST}, "grouped": {"grouped": True}}.items():
        batches = Batches(task, range(len(ids)), given.batch, 0, **how)  # type: ignore[arg-type]
        read = [piece for step in range(given.steps) for piece in batches.read(step)]
        found[title] = sum(piece.numbers for piece in read)
        if title == "whole":
            chosen = [i for step in range(given.steps) for i in batches.chosen(step)]
            found["real"] = sum(task.lengths[i] for i in chosen)
    base = f"whole batches of {given.batch}: {found['whole'] / given.steps:,.0f} tokens a step"
    titles = {"pieces": "pieces of like length", "grouped": "batches of like length",
              "real": "no padding at all"}  # fmt: skip
    return [
        Row(f"{name}, {title}: padded tokens", found[key] / found["whole"], "x", base)
        for key, title in titles.items()
    ]


def step_rows(name: str, given: argparse.Namespace) -> list[Row]:
    """The same steps of qzo on int4 MiniLM, whole and in pieces."""
    task = tasks.get(name, max_length=256 if given.model is None else 48)
    model = task.prepare(load(folder(given), kind="encoder", scheme=INT4))
    tuner = tuner_of("qzo", "scales", model.requires_grad_(False), task)
    examples = rows_of(name, given.texts)
    works: dict[str, Work] = {}
    for title, most in (("whole", None), ("pieces", MOST)):
        batches = Batches(task, examples, given.batch, 0, most=most)
        read = [batches[step] for step in range(given.timed)]
        works[title] = lambda read=read: [measured(tuner, batch) for batch in read]  # type: ignore
    found = interleave(works, rounds=given.rounds, calls=1, warmup=1)
    base = f"whole batches: {found.median('whole') or 0:.3f} s for {given.timed} steps' probes"
    return [Row(f"{name}, qzo int4 in pieces: seconds", found.ratio("pieces", "whole"), "x", base)]


def tuner_of(method: str, space: str, model: nn.Module, task: Task, **options: Any) -> Tuner:
    chosen = methods.get(method)
    assert isinstance(chosen, Method)
    built = spaces.parse(space).build(model)
    evaluator = TorchEvaluator(model, built, task.losses, **options)
    return Tuner(built, chosen, 0, evaluator=evaluator, total=1)


def measured(tuner: Tuner, batch: Batch | Sequence[Batch]) -> object:
    assert tuner.evaluator is not None
    return tuner.evaluator.losses(tuner.ask(), batch, tuner.now.perturbation)


def llama(given: argparse.Namespace) -> Loaded:
    """A random Llama behind the tokenizer of the encoder."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder(given))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=given.hidden, intermediate_size=3 * given.hidden,
        num_hidden_layers=given.layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return Loaded(model, tokenizer, "causal", Path("random"), config, "float")


def prompted(given: argparse.Namespace) -> dict[str, Task]:
    """Tasks whose rows share a prompt: demonstrations in front, or an example's own options."""
    films = [{"text": row["text"], "label": i % 2}
             for i, row in enumerate(rows_of("sst2", given.batch))]  # fmt: skip
    passages = [
        {"prompt": TEXTS["boolq"](row), "choices": ["that is wrong", "that is right", "nobody "
         "knows", "it depends"], "label": 0}
        for row in rows_of("boolq", max(1, given.batch // 4))
    ]  # fmt: skip
    words = ["terrible", "great"]
    return {
        "demonstrations": Classification({"train": films}, words, SHOTS + "{text} It was"),
        "four options": Choice({"train": passages}),
    }


def prompt_rows(name: str, given: argparse.Namespace) -> list[Row]:
    """Tokens that the layers compute and seconds, with shared prompts over whole rows."""
    task = prompted(given)[name]
    model = task.prepare(llama(given))
    batch, count = task.batch(task.split("train")), list[int]()
    watch = model.model.layers[
        -1
    ].self_attn.register_forward_pre_hook(  # type: ignore
        lambda module, args, kwargs: count.append(kwargs["hidden_states"].shape[:2].numel()),
        with_kwargs=True,
    )
    works: dict[str, Work] = {}
    tokens = {}
    for title, narrow in (("whole rows", False), ("shared", True)):
        tuner = tuner_of("mezo", "norms", model, task, narrow=narrow)
        works[title] = lambda tuner=tuner: measured(tuner, batch)  # type: ignore[misc]
        count.clear()
        works[title]()
        tokens[title] = sum(count)
    watch.remove()
    found = interleave(works, rounds=given.rounds, calls=2, warmup=1)
    base = f"whole rows: {tokens['whole rows']:,} tokens"
    time = found.ratio("shared", "whole rows")
    return [
        Row(f"{name}: tokens", tokens["shared"] / tokens["whole rows"], "x", base),
        Row(f"{name}: seconds", time, "x", f"{found.median('whole rows') or 0:.3f} s"),
    ]


def room_rows(given: argparse.Namespace) -> list[Row]:
    """What two small trials say of a whole step's bytes, over what it takes."""
    task = prompted(given)["demonstrations"]
    model = task.prepare(llama(given))
    batch = task.batch(task.split("train"))
    tuner, cpu = tuner_of("mezo", "weights", model, task), torch.device("cpu")
    assert tuner.evaluator is not None
    evaluator, probes = tuner.evaluator, tuner.ask()

    def run(part: Batch, count: int) -> object:
        return evaluator.losses(probes[:count], part, tuner.now.perturbation)

    each, whole = batch.numbers // batch.size, len(probes) * batch.numbers
    trial = trial_of(run, batch, len(probes))
    room = fitted(trial, each, len(probes) * each, whole, 1 << 40, cpu)
    peak = peak_of(lambda: run(batch, len(probes)), cpu)
    said = room.fixed + room.each * whole
    base = f"{peak / 1e6:,.0f} MB that a step's forwards hold beyond the model"
    return [Row("micro_batch=auto: bytes predicted", said / peak, "x", base)]


def tensor_rows(given: argparse.Namespace) -> list[Row]:
    """The model and what lives beside it in a step, its preparation included, over the same in an
    evaluation of the batch; `zotune bench memory` looks at whole processes."""
    rows = []
    for method, space, scheme in (("mezo", "weights", None), ("qzo", "scales", INT4)):
        prepared = Workload(given.model or "minilm", given.batch, 48).prepared(scheme)
        cpu, held = torch.device("cpu"), tensors_of(prepared.model)
        plain = held + peak_of(prepared.evaluate, cpu)
        base = f"evaluating the batch: {plain / 1e6:,.0f} MB of tensors"
        for words, stack, target in (("one probe at a time", 1, 1.03), ("stacked", None, None)):

            def step(
                stack: int | None = stack, how: Any = (method, space), prepared: Any = prepared
            ) -> object:
                return prepared.tuner(*how, stack).step(prepared.batch)

            title = f"{method} {scheme or 'fp32'}, {words}: tensors of a step"
            rows.append(Row(title, (held + peak_of(step, cpu)) / plain, "x", base, target))
    return rows


def tensors_of(model: nn.Module) -> int:
    """Bytes of a model's tensors, each storage once."""
    held = (*model.parameters(), *model.buffers())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(storages.values())


if __name__ == "__main__":
    main()
