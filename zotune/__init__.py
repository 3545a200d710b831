"""Train quantized checkpoints with forward passes only."""

from __future__ import annotations

__version__ = "0.1.0"
