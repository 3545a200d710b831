"""What a result file of a benchmark must hold: benchmarks/results/schema.json, checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCHEMA = json.loads((Path(__file__).parents[1] / "benchmarks/results/schema.json").read_text())
KINDS: dict[str, type] = {
    "string": str,
    "null": type(None),
    "object": dict,
    "array": list,
    "boolean": bool,
}


def conforms(value: Any, schema: dict[str, Any] = SCHEMA, where: str = "result") -> None:
    """The part of JSON Schema that results/schema.json uses."""
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    right = any(numeric if k == "number" else isinstance(value, KINDS[k]) for k in kinds)
    assert right, f"{where} is {value!r}; want {kinds}"
    if isinstance(value, dict):
        assert set(schema.get("required", ())) <= set(value), where
        known = schema.get("properties", {})
        assert schema.get("additionalProperties", True) or set(value) <= set(known), where
        for key in set(known) & set(value):
            conforms(value[key], known[key], f"{where}.{key}")
    if isinstance(value, list):
        assert len(value) >= schema.get("minItems", 0), where
        for i, item in enumerate(value):
            conforms(item, schema.get("items", {}), f"{where}[{i}]")
