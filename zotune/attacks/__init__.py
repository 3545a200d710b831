"""Black-box attacks on classifiers of images: how robust is a model of one's own?

    found = zotune.attack(model, images, labels, method="zoqo", budget="8/255", queries=500)
    found.robust_accuracy; found.save("runs/attack")

    images ─► InputBlock ─► Tuner (any method with directions per example) ─► Oracle ─► Outcome
              every point a uint8 image inside the budget          the only one that asks

Nothing here is a second implementation: estimators, rules, shaping and noise are those of
training, on the space of the images. Test models that are yours to test.
"""

from zotune.attacks.config import AttackConfig
from zotune.attacks.outcome import Outcome
from zotune.attacks.run import attack

__all__ = ["AttackConfig", "Outcome", "attack"]
