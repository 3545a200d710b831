"""Quantizing a float model folder: calibrate, then write in the format that is asked for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zotune.core.calls import split_calls
from zotune.errors import BadInput
from zotune.quant import Scheme, formats
from zotune.quant.calibrate import Report, calibrate_, recipe
from zotune.quant.export import exporter
from zotune.quant.export.safetensors import float_dtype
from zotune.quant.formats.tensors import listing
from zotune.quant.model import DEFAULT_EXCLUDE, choose
from zotune.tasks.calibration import calibration
from zotune.tasks.sources import Data
from zotune.training.folders import load_model, without_adapters, write_model

log = logging.getLogger("zotune")
WEIGHTS = (".safetensors", ".gguf")


def quantize(
    model: str | Path,
    out: str | Path,
    scheme: str = "int4-g64",
    *,
    method: str = "rtn",
    format: str = "zotune",
    data: Data = "",
    samples: int = 128,
    length: int = 512,
    text_field: str = "text",
    exclude: Sequence[str] | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Quantize a float model and save it.

    Args:
        model: folder or hub id.
        out: where to; new or empty.
        scheme: "int4-g64", "int8-channel-a8", ...
        method: what chooses the codes, with options: "rtn", "gptq(act_order=True)", "awq + gptq".
        format: what to write; see `zotune.quant.export`.
        data: text to calibrate on; see `zotune.tasks.calibration`.
        samples: windows of text.
        length: tokens of a window.
        text_field: the column of the text.
        exclude: layers to leave alone; the output layer when None.
        dtype: of the tensors that stay float.
        trust_remote_code: whether Python files of the checkpoint may run.

    Returns:
        out, scheme, method, format, layers, bytes, tokens looked at, and the report's lists as
        `exceptions`.

    Raises:
        BadInput: before anything is calibrated, for what does not go together.
        DataError: for text that cannot be read.
    """
    folder, wanted = Path(out).expanduser(), Scheme.parse(scheme)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"output_dir {folder} is not empty; give another folder")
    how, to = recipe(split_calls(method)), exporter(format, wanted)
    loaded = load_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
    if loaded.format != "float":
        raise BadInput(f"{model} is already quantized ({loaded.format}); give a float checkpoint")
    with without_adapters(loaded.model):
        inner: Any = loaded.model
        inner = inner.saved_model if isinstance(inner, formats.Wrapper) else inner
        left = DEFAULT_EXCLUDE if exclude is None else tuple(exclude)
        to.check(inner, choose(inner, wanted, left), wanted)
        batches = calibration(loaded, data, samples, length, text_field) if how.needs_data else ()
        stored = to.scale_dtype(float_dtype(inner))
        report = calibrate_(inner, wanted, how, batches, left, stored)
    _say(report)
    write_model(loaded.model, folder, loaded, to)
    return {
        "out": str(folder),
        "scheme": scheme,
        "method": method,
        "format": format,
        "layers": len(report.layers),
        "bytes": sum(p.stat().st_size for p in folder.rglob("*") if p.suffix in WEIGHTS),
        "calibrated_on": sum(batch.numel() for batch in batches),
        "exceptions": {
            "unfolded": report.unfolded,
            "silent": report.silent,
            "unreached": list(report.unreached),
        },
    }


def _say(report: Report) -> None:
    """Warn of what was not done as asked, layer by layer where that tells more."""
    for why in dict.fromkeys(report.unfolded.values()):
        names = {name for name, reason in report.unfolded.items() if reason == why}
        log.warning("not smoothed, as %s: [%s]", why, listing(names))
    if report.silent:
        log.warning(
            "inputs that are zero for the whole text: %d in [%s]",
            sum(report.silent.values()),
            listing(set(report.silent)),
        )
    if report.unreached:
        log.warning("not run by the model, so rounded: [%s]", listing(set(report.unreached)))
