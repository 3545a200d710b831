"""What may be attacked. Run: pytest tests/attacks/test_classifiers.py"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from attacks.classifiers import pictures
from torch import Tensor, nn

import zotune
from zotune.attacks.classifier import Classifier
from zotune.errors import BadInput


def network(channels: int = 1) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3)
        ).eval()  # fmt: skip


class Art:
    """As much of an adversarial-robustness-toolbox estimator as is looked at."""

    def __init__(self, model: nn.Module, clip_values: tuple[float, float] | None) -> None:
        self.model, self.clip_values = model, clip_values

    def predict(self, x: Any) -> Any:
        assert isinstance(x, np.ndarray)
        assert x.dtype == np.float32
        low, high = self.clip_values or (0, 1)
        with torch.no_grad():
            return self.model((torch.from_numpy(x) - low) / (high - low)).numpy()


class Foolbox:
    """As much of a foolbox model as is looked at."""

    def __init__(self, model: nn.Module, bounds: tuple[float, float]) -> None:
        self.model, self.bounds = model, bounds

    def __call__(self, x: Tensor) -> Tensor:
        low, high = self.bounds
        result: Tensor = self.model((x - low) / (high - low))
        return result


MODEL = network()
WAYS: dict[str, Any] = {
    "float64 module": network().double(),
    "function": lambda images: MODEL(images.float() / 255),
    "numpy function": lambda images: MODEL(images.float() / 255).numpy(),
    "output with logits": lambda images: SimpleNamespace(logits=MODEL(images.float() / 255)),
    "ART": Art(MODEL, (0.0, 1.0)), "ART, -1 to 1": Art(MODEL, (-1.0, 1.0)),
    "ART, no range": Art(MODEL, None),
    "foolbox": Foolbox(MODEL, (0.0, 1.0)), "foolbox, 0 to 255": Foolbox(MODEL, (0.0, 255.0)),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_one_model_gives_the_same_scores_in_whatever_form(way: str) -> None:
    images = pictures(5, 1, 6, 6)
    wanted = Classifier(MODEL)(images)
    found = Classifier(WAYS[way])(images)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("library", ["foolbox", "art"])
def test_the_libraries_own_models_are_accepted(library: str) -> None:
    pytest.importorskip(library, reason="interoperates with it, does not need it")
    images = pictures(4, 1, 6, 6)
    if library == "foolbox":
        import foolbox

        model: Any = foolbox.PyTorchModel(MODEL, bounds=(0, 1), device="cpu")
    else:
        from art.estimators.classification import PyTorchClassifier

        model = PyTorchClassifier(
            MODEL, nn.CrossEntropyLoss(), (1, 6, 6), 3, clip_values=(0.0, 1.0), device_type="cpu"
        )
    labels = Classifier(MODEL)(images).argmax(1)
    found, wanted = (
        zotune.attack(m, images, labels, budget="20/255", queries=20) for m in (model, MODEL)
    )
    torch.testing.assert_close(found.success, wanted.success)
    torch.testing.assert_close(Classifier(model)(images), Classifier(MODEL)(images), rtol=1e-4,
                               atol=1e-5)  # fmt: skip


def test_probabilities_are_read_as_their_logarithms() -> None:
    images = pictures(5, 1, 6, 6)
    chances = Classifier(lambda x: MODEL(x.float() / 255).softmax(1), probabilities=True)(images)
    logits = Classifier(MODEL)(images)
    torch.testing.assert_close(
        chances - chances[:, :1], logits - logits[:, :1], rtol=1e-4, atol=1e-5
    )
    sure = Classifier(lambda x: torch.tensor([[1.0, 0.0]]), probabilities=True)(images[:1])
    assert bool(sure.isfinite().all())


def test_a_module_is_asked_in_eval_mode_and_left_as_it_was() -> None:
    model = network().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images = pictures(3, 1, 6, 6)
    labels = Classifier(model)(images).argmax(1)
    one, again = (zotune.attack(model, images, labels, queries=20) for _ in range(2))
    assert torch.equal(one.adversarial, again.adversarial), "dropout would differ"
    assert all(module.training for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("model", "told"), [
    (network(channels=3), "cannot take images of shape .1, 6, 6."),
    (lambda images: torch.zeros(len(images)), "want .images, classes."),
    (lambda images: torch.zeros(1, 3), "want .images, classes."),
    (lambda images: torch.zeros(len(images), 1), "at least two classes"),
    (3, "a int is no classifier"),
])  # fmt: skip
def test_what_is_no_classifier_of_these_images_is_refused(model: Any, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        zotune.attack(model, pictures(2, 1, 6, 6), [0, 1])


def test_a_classifier_keeps_its_number_of_classes() -> None:
    asked = Classifier(lambda images: torch.zeros(len(images), 1 + len(images)))
    asked(pictures(2, 1, 2, 2))
    with pytest.raises(BadInput, match="want one number of classes"):
        asked(pictures(3, 1, 2, 2))


def test_an_error_of_the_users_function_comes_through() -> None:
    def wrong(images: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        zotune.attack(wrong, pictures(1, 1, 2, 2), [0])
