"""Models: loading and saving, their linear layers, an encoder with a head."""

from __future__ import annotations

from zotune.models.encoder import PooledClassifier
from zotune.models.fingerprint import fingerprint
from zotune.models.linears import linears
from zotune.models.load import Loaded, load, set_compute_dtype_
from zotune.models.tokenizer import pad_token_id
from zotune.quant.formats import write

__all__ = [
    "Loaded",
    "PooledClassifier",
    "fingerprint",
    "linears",
    "load",
    "pad_token_id",
    "set_compute_dtype_",
    "write",
]
