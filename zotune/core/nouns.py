"""Every record that a method's or a space's repr may name: the namespace that reads them back."""

from zotune.core.backprop import Backprop
from zotune.core.estimator import OneSided, PerExample, TwoSided
from zotune.core.feedback import ErrorFeedback
from zotune.core.grid import Grid, Rounded
from zotune.core.image_laws import PerImage, Square, Tiled
from zotune.core.low_rank import LowRank
from zotune.core.method import Interlude, Method, Schedule
from zotune.core.noise import Key
from zotune.core.perturbation import (
    Gaussian,
    Rademacher,
    Sparse,
    Sphere,
    Uniform,
)
from zotune.core.rule import SGD, Adam, GridSign, MomentumSGD, SignSGD
from zotune.core.shaping import Clip, Sign, Standardize
from zotune.core.space import SpaceSum
from zotune.core.spaces import (
    Activations,
    Adapter,
    Biases,
    Clipping,
    Codes,
    Head,
    Latents,
    Lora,
    Norms,
    Scales,
    Transforms,
    Weights,
    Zeros,
)

__all__ = [
    "SGD", "Activations", "Adam", "Adapter", "Backprop", "Biases", "Clip", "Clipping", "Codes",
    "ErrorFeedback", "Gaussian", "Grid", "GridSign", "Head", "Interlude", "Key", "Latents",
    "Lora", "LowRank", "Method", "MomentumSGD", "Norms", "OneSided", "PerExample", "PerImage",
    "Rademacher", "Rounded", "Scales", "Schedule", "Sign", "SignSGD", "SpaceSum", "Sparse",
    "Sphere", "Square", "Standardize", "Tiled", "Transforms", "TwoSided", "Uniform", "Weights",
    "Zeros",
]  # fmt: skip
