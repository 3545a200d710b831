"""Black-box attacks on classifiers of images: how robust is a model of one's own?

    found = zotune.attack(model, images, labels, method="zoqo", budget="8/255", queries=500)
    found.robust_accuracy; found.save("runs/attack")

    images ─► InputBlock ─► Tuner ◄─► Oracle ─► Outcome

`InputBlock`: every point is a uint8 image inside the budget. `Tuner`: any two-sided method, each
image along directions of its own. `Oracle`: the only one that asks the classifier, and counts.

Nothing here is a second implementation: estimators, rules, shaping and noise are those of
training, on the space of the images. Test models that are yours to test.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zotune.attacks.config import AttackConfig
    from zotune.attacks.outcome import Outcome
    from zotune.attacks.run import attack

_WHERE = {"AttackConfig": "config", "Outcome": "outcome", "attack": "run"}

__all__ = ["AttackConfig", "Outcome", "attack"]


def __getattr__(name: str) -> Any:
    """Parts come when they are asked for: the command line reads `config` without torch."""
    if name in _WHERE:
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
