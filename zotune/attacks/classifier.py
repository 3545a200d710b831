"""Whatever answers images with scores: a module, a function, a foolbox or an ART model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zotune.core.inputs import TOP
from zotune.errors import BadInput
from zotune.tasks.task import evaluating

Answer = Callable[[Tensor], Any]
SMALLEST = 1e-30  # probability whose logarithm stands for that of 0


class Classifier:
    """uint8 images (n, channels, height, width) to float64 scores (n, classes) on the CPU.

    An `nn.Module` sees float32 in [0, 1] and is put into eval mode while asked; a foolbox model
    (`bounds`) and an ART estimator (`predict`, `clip_values`) see their own range; any other
    callable sees the uint8 images. Of probabilities the logarithms are taken, so that differences
    of scores are those of the logits.

    >>> one = Classifier(lambda images: images.flatten(1).float())
    >>> one(torch.tensor([[[[3, 5]]]], dtype=torch.uint8)).tolist()
    [[3.0, 5.0]]
    """

    def __init__(self, model: Any, probabilities: bool = False) -> None:
        self.answer, self.probabilities = _answer(model), probabilities
        self.classes: int | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        given = self.answer(images)
        scores = torch.as_tensor(getattr(given, "logits", given)).detach().cpu().double()
        if scores.dim() != 2 or len(scores) != len(images) or scores.shape[1] < 2:
            raise BadInput(
                f"the classifier answers {len(images)} images by shape {tuple(scores.shape)}; want "
                "(images, classes) with at least two classes"
            )
        if self.classes not in (None, scores.shape[1]):
            raise BadInput(
                f"the classifier answers with {scores.shape[1]} classes, and before with "
                f"{self.classes}; want one number of classes"
            )
        self.classes = scores.shape[1]
        return self._logarithms(scores) if self.probabilities else scores

    def _logarithms(self, scores: Tensor) -> Tensor:
        known = scores[scores.isfinite().all(1)]
        if bool((known < 0).any()) or bool(((known.sum(1) - 1).abs() > 1e-3).any()):
            raise BadInput(
                "probabilities=True, but the classifier's answers are not probabilities (at least "
                "0, with sum 1): leave it out for logits"
            )
        return scores.clamp_min(SMALLEST).log()


def _answer(model: Any) -> Answer:
    if isinstance(model, nn.Module):
        return lambda images: _of_module(model, images)
    if hasattr(model, "predict") and hasattr(model, "clip_values"):
        low, high = model.clip_values if model.clip_values is not None else (0.0, 1.0)
        return lambda images: model.predict(
            (np.asarray(images, np.float32) / TOP * (high - low) + low).astype(np.float32)
        )
    if callable(model) and hasattr(model, "bounds"):
        low, high = model.bounds
        return lambda images: model(images.float() / TOP * (high - low) + low)
    if callable(model):
        return model
    raise BadInput(
        f"a {type(model).__name__} is no classifier; want an nn.Module, a function of uint8 "
        "images, a foolbox model or an adversarial-robustness-toolbox estimator"
    )


def _of_module(model: nn.Module, images: Tensor) -> Any:
    first = next((t for t in model.parameters() if t.is_floating_point()), None)
    shown = images.float() / TOP
    shown = shown if first is None else shown.to(first)
    with evaluating(model):
        try:
            return model(shown)
        except RuntimeError as error:
            raise BadInput(
                f"the classifier cannot take images of shape {tuple(images.shape[1:])} (channels, "
                f"height, width): {error}"
            ) from error
