"""Quantizing a float model folder: calibrate, then write in the format that is asked for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zotune.core.calls import split_calls
from zotune.errors import BadInput
from zotune.models import Loaded
from zotune.quant import Scheme, formats
from zotune.quant.calibrate import Report, calibrate_, recipe
from zotune.quant.export import exporter
from zotune.quant.formats.tensors import listing
from zotune.quant.model import choose, default_exclude, float_dtype
from zotune.tasks.calibration import calibration
from zotune.tasks.sources import Data
from zotune.training.folders import load_model, need_empty, without_adapters, write_model

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
        method: what chooses the codes, with options: "rtn", "awq + gptq", "rotate + gptq";
            "zeroqat(steps=500)" trains through the rounding, and `out` is then the folder of a run
            whose `model/` is the result (`zotune.training.qat.quantize_aware`).
        format: what to write; see `zotune.quant.export`.
        data: text to calibrate on; see `zotune.tasks.calibration`.
        samples: windows of text.
        length: tokens of a window.
        text_field: the column of the text.
        exclude: layers to leave alone; the output layer when None.
        dtype: of the tensors that stay float.
        trust_remote_code: whether Python files of the checkpoint may run.

    Returns:
        out, scheme, method, format, layers, bytes, tokens looked at, and exceptions.

    Raises:
        BadInput: before anything is calibrated, for what does not go together.
        DataError: for text that cannot be read.
    """
    terms = split_calls(method)
    if terms[0][0] == "zeroqat":
        from zotune.training.qat import quantize_aware

        if len(terms) > 1:
            raise BadInput(f"method {method!r}: zeroqat searches its own start; give it alone")
        return quantize_aware(
            terms[0][1], scheme, format, exclude, model=str(model), out=str(out), task="lm",
            data=str(data) or None, max_length=length, task_options={"text_field": text_field},
            dtype=dtype, trust_remote_code=trust_remote_code,
        )  # fmt: skip
    folder, wanted = Path(out).expanduser(), Scheme.parse(scheme)
    need_empty(folder)
    how, to = recipe(terms), exporter(format, wanted)
    loaded = load_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
    _check(loaded, format)
    with without_adapters(loaded.model):
        inner: Any = loaded.model
        inner = inner.saved_model if isinstance(inner, formats.Wrapper) else inner
        left = default_exclude(loaded.kind) if exclude is None else tuple(exclude)
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
            "unrotated": report.unrotated,
            "silent": report.silent,
            "nearest": report.nearest,
        },
    }


def _check(loaded: Loaded, format: str) -> None:
    if loaded.format != "float":
        raise BadInput(
            f"{loaded.path} is already quantized ({loaded.format}); give a float checkpoint"
        )
    if loaded.kind == "diffusion" and format != "zotune":
        raise BadInput(
            f"the denoiser of a pipeline is not written in format {format!r}; use format='zotune'"
        )


def _say(report: Report) -> None:
    """Warn of what was not done as asked, layer by layer where that tells more."""
    for what, exceptions in (
        ("smoothed", report.unfolded),
        ("rotated", report.unrotated),
        ("calibrated", report.nearest),
    ):
        for why in dict.fromkeys(exceptions.values()):
            names = {name for name, reason in exceptions.items() if reason == why}
            log.warning("not %s (%s): [%s]", what, why, listing(names))
    if report.silent:
        log.warning(
            "inputs that are zero for the whole text: %d in [%s]",
            sum(report.silent.values()),
            listing(set(report.silent)),
        )
