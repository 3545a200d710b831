"""zotune's own folders, as `zotune.quant.formats.native` writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from zotune.errors import BadInput
from zotune.quant.formats import formats
from zotune.quant.formats.origin import quantized
from zotune.quant.scheme import Scheme


class NativeExporter:
    """Every scheme; columns in their own order."""

    name: Final = "zotune"
    schemes: Final = "every integer scheme"

    def refusal(self, scheme: Scheme) -> str | None:
        """None: all are expressed."""
        return None

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float32."""
        return torch.float32

    def check(
        self, model: nn.Module, layers: Mapping[str, nn.Linear | nn.Conv2d], scheme: Scheme
    ) -> None:
        """Anything goes."""

    def write_(self, model: nn.Module, folder: Path, tokenizer: Any) -> None:
        """The format's own `write`."""
        moved = [name for name, layer in quantized(model) if layer.order is not None]
        if moved:
            raise BadInput(
                f"columns of {moved[0]!r} are in another order, which zotune's folders do not "
                "hold; use static_groups=True, or format 'gptq' or 'compressed-tensors'"
            )
        formats()["zotune"].write(model, folder)


EXPORTS = (NativeExporter(),)
