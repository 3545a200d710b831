"""What came out of an attack: per image, and in a few numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from zotune.attacks.config import AttackConfig
from zotune.core.inputs import TOP, Budget
from zotune.training.report import RESULT, plain
from zotune.training.snapshots import write_atomic, write_json

PICTURE, IMAGES = "pictures.png", "images.safetensors"


@dataclass(frozen=True, eq=False)
class Outcome:
    """Every image's fate.

    Attributes:
        config: the attack.
        images, adversarial: uint8 (n, channels, height, width); an image that was not fooled
            comes as it was left, one that was not attacked as it came.
        labels: (n,), the true classes. targets: (n,) the classes wanted, None if untargeted.
        correct: (n,), whether the original was classified rightly; only such images are attacked.
        success: (n,), whether `adversarial` fools the classifier.
        broken: (n,), whether an answer was not finite, at which the image was left.
        queries: (n,), how often the classifier was asked about the image.
        seconds: of the whole attack.
    """

    config: AttackConfig
    images: Tensor
    adversarial: Tensor
    labels: Tensor
    targets: Tensor | None
    correct: Tensor
    success: Tensor
    broken: Tensor
    queries: Tensor
    seconds: float = field(default=0.0)

    def distances(self, norm: Any) -> Tensor:
        """The perturbations' norms for images in [0, 1]: float64 (n,)."""
        return Budget(norm).sizes(self.images, self.adversarial) / TOP

    @property
    def accuracy(self) -> float:
        """Share of images classified rightly before."""
        return float(self.correct.double().mean())

    @property
    def robust_accuracy(self) -> float:
        """Share of images classified rightly before and not fooled."""
        return float((self.correct & ~self.success).double().mean())

    @property
    def success_rate(self) -> float | None:
        """Share of the attacked images that were fooled; None where none was attacked."""
        attacked = int(self.correct.sum())
        return int(self.success.sum()) / attacked if attacked else None

    def as_dict(self) -> dict[str, Any]:
        """What `result.json` holds. Queries are means over the attacked images, distances means
        over those that were fooled, of images in [0, 1]."""
        fooled, attacked = self.success, self.correct
        numbers = {
            "images": len(self.images),
            "accuracy": self.accuracy,
            "robust_accuracy": self.robust_accuracy,
            "success_rate": self.success_rate,
            "attacked": int(attacked.sum()),
            "fooled": int(fooled.sum()),
            "queries_mean": mean(self.queries[attacked]),
            "queries_of_success": mean(self.queries[fooled]),
            "linf": mean(self.distances("linf")[fooled]),
            "l2": mean(self.distances("l2")[fooled]),
            "not_finite": self.broken.nonzero().flatten().tolist(),
            "seconds": self.seconds,
            "images_per_second": len(self.images) / self.seconds if self.seconds else None,
            "targeted": self.targets is not None,
            "config": repr(self.config),
        }
        return dict(plain(numbers))

    def save(self, folder: str | Path) -> Path:
        """Write `result.json`, `pictures.png` and `images.safetensors` into a folder."""
        from safetensors.torch import save

        from zotune.attacks.picture import picture

        place = Path(folder).expanduser()
        place.mkdir(parents=True, exist_ok=True)
        tensors = {
            "images": self.images, "adversarial": self.adversarial, "labels": self.labels,
            "correct": self.correct, "success": self.success, "queries": self.queries,
        }  # fmt: skip
        write_atomic(place / IMAGES, save({k: v.contiguous() for k, v in tensors.items()}))
        write_atomic(place / PICTURE, picture(self))
        write_json(place / RESULT, self.as_dict())
        return place


def mean(values: Tensor) -> float | None:
    """None of nothing."""
    return float(values.double().mean()) if len(values) else None
