"""Every record that a method's or a space's repr may name: the namespace that reads them back."""

from zotune.core.backprop import Backprop
from zotune.core.estimator import OneSided, PerExample, TwoSided
from zotune.core.grid import Grid, Rounded
from zotune.core.method import Method, Schedule
from zotune.core.noise import Key
from zotune.core.perturbation import (
    Gaussian,
    LowRank,
    Rademacher,
    Sparse,
    Sphere,
    Uniform,
)
from zotune.core.rule import SGD, Adam, GridSign, SignSGD
from zotune.core.shaping import Clip, Sign, Standardize
from zotune.core.space import SpaceSum
from zotune.core.spaces import (
    Adapter,
    Biases,
    Codes,
    Head,
    Lora,
    Norms,
    Scales,
    Weights,
    Zeros,
)

__all__ = [
    "SGD", "Adam", "Adapter", "Backprop", "Biases", "Clip", "Codes", "Gaussian", "Grid",
    "GridSign", "Head", "Key", "Lora", "LowRank", "Method", "Norms", "OneSided", "PerExample",
    "Rademacher", "Rounded", "Scales", "Schedule", "Sign", "SignSGD", "SpaceSum", "Sparse",
    "Sphere", "Standardize", "TwoSided", "Uniform", "Weights", "Zeros",
]  # fmt: skip
