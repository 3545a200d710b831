"""Compiles every Triton kernel for a GPU that need not be there, and prints what it takes.

    python tests/compiled.py 90 [NAME ...]

One JSON object: by kernel, registers and bytes of stack per thread, shared memory per program, and
how many products were fused with sums. Run in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from zotune.core import dense_triton, noise_triton, points_triton, sweep_triton
from zotune.quant.kernels.product import product

POINTERS = {
    "out": "*i16", "theta": "*i16", "stored": "*i16", "master": "*i16", "bias": "*i16",
    "x": "*bf16", "x_scale": "*fp32", "codes": "*u8", "scale": "*fp32", "zero": "*fp32",
    "table": "*i32", "streams": "*i32", "reach": "*fp32", "stride": "*fp32", "ids": "*i64",
    "moved": "*i64",
}  # fmt: skip
FLOATS = ("reach_value", "minimum", "stride_value")
WHOLE_TILES = ("tokens", "outputs", "columns", "width", "row")  # multiples of 16, as in any model
LAW = {"law": 0, "gain": 1.0, "spread": True, "bounded": True}
BF16 = {"dtype": tl.bfloat16, "held": tl.bfloat16}
PRODUCT = {
    "bits": 4, "planes": 2, "parts": 2, "uniform": True, "zeroed": False, "biased": False,
    "lookup": False, "rounded": False, "integer": False, "shared": True, "bm": 64, "bn": 64,
    "bk": 64, **LAW, **BF16,
}  # fmt: skip
DENSE = {"biased": True, "kind": 1, "into": 1, "pairs": 2, "bn": 64, **LAW, **BF16}
LINEAR = {"out": "*bf16", "bias": "*fp32", "table": "*fp32"}
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "fill": (noise_triton._fill, {"law": 0, "add": True, "size": 256}, {"out": "*fp32"}),
    "points": (points_triton._points, {"kind": 1, "into": 1, "pairs": 2, "size": 256, **LAW}, {}),
    "rows": (points_triton._rows, {"kind": 1, "into": 1, "size": 256, **LAW}, {}),
    "dense": (dense_triton._dense, {"bm": 16, **DENSE}, {}),
    "dense, most rows": (dense_triton._dense, {"bm": 64, **DENSE}, {"warps": 8}),
    "product": (product, {"drawn": False, **PRODUCT}, LINEAR),
    "product, drawn": (product, {"drawn": True, **PRODUCT}, LINEAR),
    "floats": (
        sweep_triton._floats,
        {"law": 0, "sign": False, "spread": True, "bounded": True, "kind": 1, "copied": False,
         "counters": 256}, {},
    ),
    "codes": (sweep_triton._codes, {"law": 0, "sign": False, "bits": 4, "counters": 256}, {}),
}  # fmt: skip


def taken(kernel: Any, constants: dict[str, Any], options: dict[str, Any], arch: int) -> Any:
    """Compile one kernel, down to the machine's instructions."""
    names = kernel.arg_names
    kinds = {**POINTERS, **options}
    signature = {n: "constexpr" if n in constants else _kind(n, kinds) for n in names}
    aligned = [n for n, kind in signature.items() if kind[0] == "*" or n in WHOLE_TILES]
    source = ASTSource(
        kernel, signature, {(names.index(n),): v for n, v in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )  # fmt: skip
    flags = {"num_warps": options.get("warps", 4), "enable_fp_fusion": False}
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=flags)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {k.lower(): int(v) for k, v in re.findall(r"(REG|STACK):(\d+)", usage)}
    fused = made.asm["ptx"].count("fma.rn.f32")
    return {**numbers, "shared": made.metadata.shared, "fused": fused}


def _kind(name: str, kinds: dict[str, Any]) -> str:
    return str(kinds.get(name, "fp32" if name in FLOATS else "i32"))


if __name__ == "__main__":
    chosen = {name: CASES[name] for name in sys.argv[2:] or CASES}
    found = {name: taken(*case, int(sys.argv[1])) for name, case in chosen.items()}
    print(json.dumps(found))
