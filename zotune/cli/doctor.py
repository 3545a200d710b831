"""`zotune doctor`: versions, instructions, threads, devices, data, and what is wrong."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

NEEDED = ("torch", "numpy", "numba", "transformers", "safetensors", "jsonargparse", "rich")
OPTIONAL = (
    "datasets",
    "peft",
    "tensorboard",
    "matplotlib",
    "pyarrow",
    "psutil",
    "wandb",
    "dp-accounting",
)
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def examine() -> dict[str, Any]:
    """Everything worth knowing in a bug report; `problems` is empty when all is well."""
    problems: list[str] = []
    found = {
        "versions": _versions(problems),
        "machine": _machine(problems),
        "devices": _devices(),
        "kernels": _kernels(problems),
        "data": _data(problems),
    }
    return {**found, "problems": problems}


def _versions(problems: list[str]) -> dict[str, str]:
    import zotune

    found = {"zotune": zotune.__version__, "python": platform.python_version()}
    for name in (*NEEDED, *OPTIONAL):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
            if name in NEEDED:
                problems.append(f"{name} is not installed: pip install {name}")
    return found


def _machine(problems: list[str]) -> dict[str, Any]:
    import torch

    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    flags = _cpu_flags()
    if flags is not None and platform.machine() in ("x86_64", "AMD64") and "avx2" not in flags:
        problems.append("this CPU has no AVX2: products will be slow")
    if threads > cores:
        problems.append(
            f"torch uses {threads} threads on {cores} cores: set OMP_NUM_THREADS={cores}"
        )
    return {
        "system": platform.platform(),
        "cores": cores,
        "threads": threads,
        "memory": _memory(),
        "instructions": " ".join(f for f in FLAGS if flags and f in flags) or "unknown",
    }


def _cpu_flags() -> set[str] | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((set(x.partition(":")[2].split()) for x in lines if x.startswith("flags")), set())


def _memory() -> str:
    from zotune.training.progress import readable

    try:
        return readable(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return "unknown"


def _devices() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {"cuda": "none"}
    return {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}


def _kernels(problems: list[str]) -> dict[str, Any]:
    """One small product on every path, compared with the reference."""
    import torch

    from zotune.quant import QuantLinear, Scheme

    found = {}
    layer = torch.nn.Linear(64, 8).requires_grad_(False)
    x = torch.linspace(-1, 1, 128).view(2, 64)
    for text in ("int4-g64", "int8-channel", "int8-channel-a8"):
        quantized = QuantLinear.from_linear(layer, Scheme.parse(text))
        try:
            error = float((quantized(x) - layer(x)).abs().max())
            found[text] = "works" if error < 0.5 else f"wrong by {error:.3g}"
        except Exception as error:  # whatever a kernel raises is the finding
            found[text] = f"{type(error).__name__}: {error}"
        if found[text] != "works":
            problems.append(f"kernel {text}: {found[text]}")
    found["triton"] = "installed" if importlib.util.find_spec("triton") else "not installed"
    return found


def _data(problems: list[str]) -> dict[str, Any]:
    named = os.environ.get("ZOTUNE_DATA")
    if named and not Path(named).expanduser().is_dir():
        problems.append(f"ZOTUNE_DATA={named!r} is not a folder: unset it or correct it")
    return {"ZOTUNE_DATA": named or "not set"}
