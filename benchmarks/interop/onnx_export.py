"""A transformers model as an ONNX graph of two inputs and one output, without a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import torch


class _Text(torch.nn.Module):
    def __init__(self, model: Any, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        extra = {"use_cache": False} if self.output == "logits" else {}
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, **extra)
        return getattr(found, self.output)  # type: ignore[no-any-return]


def export(model: Any, path: Path) -> None:
    """Write the graph, without the traces of Python that the exporter notes at every node."""
    model.config._attn_implementation = "eager"
    output = "logits" if hasattr(model, "lm_head") else "last_hidden_state"
    ids, mask = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), torch.ones(2, 4, dtype=torch.long)
    mask[1, 3:] = 0
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    names = ["input_ids", "attention_mask"]
    torch.onnx.export(
        _Text(model, output), (ids, mask), path, input_names=names, output_names=[output],
        dynamo=True, external_data=False, dynamic_shapes=dict.fromkeys(names, axes), verbose=False,
    )  # fmt: skip
    graph = onnx.load(path)
    for node in graph.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    graph.graph.ClearField("value_info")
    onnx.save(graph, path)
