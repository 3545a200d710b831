"""Format "onnx": a graph of ONNX Runtime, as Optimum and torch.onnx leave it beside config.json.

Read are QDQ graphs (QuantizeLinear and DequantizeLinear), those of quantize_dynamic, MatMulNBits
and GatherBlockQuantized of any width, and float ones; the values of what onnx_roles.py finds. All
forward passes run in ONNX Runtime. There is no gradient, no layer to put an adapter on, and no
cache of keys and values. Writing copies the files and overwrites what was tuned.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from zotune.errors import BadInput, FormatError
from zotune.quant.formats.build import model_config
from zotune.quant.formats.folder import copy_companions, copy_source, home_of, is_onnx
from zotune.quant.formats.onnx_file import entries, files, load_model
from zotune.quant.formats.onnx_graph import INPUTS, OnnxGraph
from zotune.quant.formats.origin import Source, set_source_, source_of
from zotune.quant.formats.shards import raw_bytes
from zotune.quant.formats.tensors import listing

SUFFIX: Final = ".onnx"
TEXT: Final = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
PAST: Final = "past"  # how inputs with keys and values of earlier tokens begin
LOGITS, STATES = "logits", "last_hidden_state"


class OnnxModel(nn.Module):
    """A graph called as a transformers model is."""

    def __init__(self, graph: OnnxGraph, config: Any) -> None:
        super().__init__()
        self.graph, self.config = graph, config

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
    ) -> Any:
        """Logits or hidden states, float32, of token ids (batch, tokens).

        Raises:
            BadInput: for what a graph does not give: a cache, states of all layers.
        """
        from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

        if use_cache or past_key_values is not None or output_hidden_states:
            raise BadInput(
                "an ONNX graph is run without a cache and gives its last layer's states only; "
                "use a task that generates no text, and layers='last'"
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp_min(0)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        given = (input_ids, attention_mask, token_type_ids, position_ids)
        found = self.graph(**dict(zip(TEXT, given, strict=True))).float()
        if self.graph.output == STATES:
            return BaseModelOutput(last_hidden_state=found)
        return CausalLMOutput(logits=found)


class OnnxFormat:
    """Graphs run by ONNX Runtime: QDQ and dynamic int8, MatMulNBits of 2 to 8 bits, float."""

    name = "onnx"
    tunable = ("scales", "zeros", "norms", "biases", "weights")

    def detect(self, folder: Path) -> bool:
        """Whether this is an .onnx file, or a folder with one and without safetensors."""
        return folder.suffix == SUFFIX if folder.is_file() else is_onnx(folder)

    def read(
        self, folder: Path, auto: Any, dtype: torch.dtype | None, trust_remote_code: bool
    ) -> nn.Module:
        """The model, of the types that the graph has.

        Raises:
            FormatError: for damaged files, operators or inputs that are not read, or an output that
                is not the kind's.
        """
        path = file_of(folder)
        config = model_config(home_of(folder), trust_remote_code)
        graph = OnnxGraph(path, _output(path, load_model(path), auto))
        _check_inputs(graph)
        if dtype not in (None, *{p.dtype for p in graph.parameters()}):
            raise FormatError(f"{path} has the types it was made with; leave dtype={dtype} out")
        model = OnnxModel(graph, config)
        set_source_(model, Source(self.name, folder.absolute(), {}))
        return model.eval()

    def write(self, model: nn.Module, folder: Path) -> None:
        """The source's files, with what was tuned in its place.

        Raises:
            BadInput: if the model was not read from an ONNX file.
            FormatError: if the source's files are gone or damaged.
        """
        source = source_of(model)
        if source is None or not isinstance(model, OnnxModel):
            raise BadInput(
                f"{type(model).__name__} was not read from an ONNX file, and only such models are "
                "written as one; torch.onnx.export makes the first"
            )
        path = file_of(source.folder)
        parsed = load_model(path)
        found, weights = entries(path, parsed), files(path, parsed)
        if source.folder.is_dir():
            copy_source(source.folder, folder, set(weights))
        else:
            home = home_of(source.folder)
            copy_companions(home, folder)
            for file in (home / "config.json", *weights):
                shutil.copyfile(file, folder / file.name)
        for own, name in model.graph.names.items():
            tensor = model.graph.get_parameter(own).detach()
            if not torch.equal(raw_bytes(tensor), raw_bytes(found[name].read())):
                found[name].overwrite(folder, tensor)


def file_of(folder: Path) -> Path:
    """The file itself, or the one of a folder."""
    if not folder.is_dir():
        return folder
    found = sorted(folder.glob(f"*{SUFFIX}"))
    if len(found) != 1:
        names = listing([p.name for p in found])
        raise FormatError(f"{folder} holds {len(found)} ONNX files [{names}]; give one of them")
    return found[0]


def _output(path: Path, model: Any, auto: Any) -> str:
    """The output that a model of this Auto class gives."""
    wanted, other = (STATES, LOGITS) if auto.__name__ == "AutoModel" else (LOGITS, STATES)
    names = [output.name for output in model.graph.output]
    if wanted in names:
        return wanted
    raise FormatError(
        f"{path} gives {listing(names)}; wanted an output {wanted!r}"
        + (": give another kind" if other in names else ": export it with output_names")
    )


def _check_inputs(graph: OnnxGraph) -> None:
    """Refuse inputs that nobody would fill."""
    wrong = []
    for name, record in graph.inputs.items():
        kind = record.type.tensor_type
        sizes = [axis.dim_value for axis in kind.shape.dim]  # 0 where any size will do
        empty = name.startswith(PAST) and 0 in sizes[1:] and min(sizes) >= 0
        if not (name in TEXT or empty) or kind.elem_type not in INPUTS:
            wrong.append(name)
    if wrong:
        raise FormatError(
            f"{graph.path} wants inputs that are not known here: [{listing(wrong)}]; filled are "
            f"{listing(list(TEXT))} and past keys and values (empty)"
        )


FORMAT = OnnxFormat()
