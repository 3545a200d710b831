"""What all contenders share: one model, one fixed batch, one loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zotune import methods, tasks
from zotune.bench.models import LLAMAS, folder_of, random_llama, shape_of
from zotune.bench.settings import BenchConfig
from zotune.core import noise, spaces
from zotune.core.evaluator import Objective, TorchEvaluator
from zotune.core.method import Method
from zotune.core.noise import Key
from zotune.core.step import Tuner
from zotune.models import load
from zotune.models.load import find_folder, parse_dtype, resolve_kind
from zotune.quant.formats.tensors import read_json
from zotune.quant.scheme import Scheme
from zotune.tasks.batch import Batch
from zotune.tasks.scoring import CausalScorer, Target
from zotune.tasks.spans import collate_targets, span_losses
from zotune.tasks.task import batch_loss


@dataclass(frozen=True)
class Prepared:
    """A model and the batch that all its contenders are measured on."""

    model: nn.Module
    losses: Objective
    batch: Batch

    def loss(self) -> Tensor:
        """The mean loss of the batch, differentiable where a parameter wants it."""
        return batch_loss(*self.losses(self.model, self.batch))

    def evaluate(self) -> float:
        """One plain forward, nothing perturbed: what evaluating this batch costs."""
        with torch.no_grad():
            return float(self.loss())

    def tuner(self, method: str, space: str, stack: int | None = None, **options: Any) -> Tuner:
        """A tuner as `zotune train` assembles it: blocks that no forward reads are dropped."""
        chosen = methods.get(method, **options)
        assert isinstance(chosen, Method)
        built = spaces.parse(space).build(self.model)
        evaluator = TorchEvaluator(self.model, built, self.losses, stack=stack)
        tuner = Tuner(built, chosen, 0, evaluator=evaluator, total=1 << 20)
        unused = evaluator.check(self.batch, tuner.ask(), chosen.perturbation)
        if unused:
            built = built.without(unused)
            evaluator = TorchEvaluator(self.model, built, self.losses, stack=evaluator.stack)
            tuner = Tuner(built, chosen, 0, evaluator=evaluator, total=1 << 20)
        return tuner


@dataclass(frozen=True)
class Workload:
    """A model's name and batch x length tokens of it, without padding."""

    model: str
    batch: int
    length: int

    @classmethod
    def of(cls, config: BenchConfig) -> Workload:
        shape = shape_of(config.model_name_or_path)
        return cls(
            config.model_name_or_path, config.batch or shape.batch, config.length or shape.length
        )

    def prepared(self, scheme: str | None = None, dtype: str = "float32") -> Prepared:
        """A fresh copy of the model, quantized or not, with its batch and loss."""
        if self.model in LLAMAS:
            parsed = None if scheme is None else Scheme.parse(scheme)
            model = random_llama(LLAMAS[self.model], parsed, parse_dtype(dtype))
            return self._language(model)
        folder = find_folder(folder_of(self.model))
        if resolve_kind(read_json(folder / "config.json"), "auto", folder) == "causal":
            found = load(folder, kind="causal", scheme=scheme, dtype=dtype)
            return self._language(found.model.requires_grad_(False))
        return self._tickets(load(folder, kind="encoder", scheme=scheme, dtype=dtype))

    def _tickets(self, loaded: Any) -> Prepared:
        """An encoder with a head for the labels of the shipped tickets."""
        task = tasks.get("tickets", max_length=self.length)
        model = task.prepare(loaded).requires_grad_(False)
        rows = task.split("train")[: self.batch]
        # Every ticket is repeated until it fills the row: no padding, as many real tokens for all.
        full = [{**row, "text": " ".join([row["text"]] * self.length)} for row in rows]
        return Prepared(model, task.losses, task.batch(full))

    def _language(self, model: nn.Module) -> Prepared:
        """A causal model that predicts random tokens."""
        size = int(model.config.vocab_size)  # type: ignore[union-attr,arg-type]
        drawn = noise.draw("uniform", Key(0), "tokens", 0, self.batch * self.length)
        ids = ((drawn + 1) / 2 * size).long().clamp_(0, size - 1).view(self.batch, self.length)
        places = list(range(1, self.length))
        batch = collate_targets([Target(row, places) for row in ids.tolist()], 0)
        scorer = CausalScorer.probe(model)

        def objective(module: nn.Module, here: Batch) -> tuple[Tensor, Tensor]:
            return span_losses(scorer, module, here)

        return Prepared(model, objective, batch)
