"""Train the quantized model you already have, with forward passes only.

    import zotune
    zotune.train(zotune.TrainConfig(model_name_or_path="my-int4-model", task="sst2",
                                    method="qzo", output_dir="runs/sst2"))

Everything here loads on first use; importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "attack": "zotune.attacks",
    "train": "zotune.training",
    "evaluate": "zotune.training",
    "replay": "zotune.training",
    "TrainConfig": "zotune.training",
    "Tuner": "zotune.core.step",
    "Method": "zotune.core.method",
    "TorchEvaluator": "zotune.core.evaluator",
    "FunctionEvaluator": "zotune.core.evaluator",
    "load": "zotune.models",
    "ZotuneError": "zotune.errors",
}

if TYPE_CHECKING:
    from zotune.attacks import attack
    from zotune.core.evaluator import FunctionEvaluator, TorchEvaluator
    from zotune.core.method import Method
    from zotune.core.step import Tuner
    from zotune.errors import ZotuneError
    from zotune.models.load import load
    from zotune.training import TrainConfig, evaluate, replay, train

__all__ = [
    "FunctionEvaluator",
    "Method",
    "TorchEvaluator",
    "TrainConfig",
    "Tuner",
    "ZotuneError",
    "__version__",
    "attack",
    "evaluate",
    "load",
    "replay",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'zotune' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
