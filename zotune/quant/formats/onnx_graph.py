"""A model that ONNX Runtime runs with the tensors that a torch module holds.

Two sessions take turns, one alive at a time. As long as the parameters stand in their places, it is
the graph as it will be deployed, current values as its constants: what is measured here is what
plain ONNX Runtime measures on the file that will be written. While probes hold other tensors in
their places (core/sites.py), those tensors are inputs of the graph, so that a step builds no
session. What ONNX Runtime fuses only around constants then runs unfused; how far the two graphs lie
apart is measured once, and far apart is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from zotune.errors import BadInput, FormatError
from zotune.quant.formats.onnx_file import (
    EXTERNAL,
    digest,
    entries,
    files,
    load_model,
    onnx_packages,
)
from zotune.quant.formats.onnx_roles import check_operators, roles
from zotune.quant.graph import Graph

log = logging.getLogger("zotune")
# Root mean square of what probes see minus what will be deployed, as a share of the latter.
FAR: Final = 0.3
# numpy's types by ONNX's numbers, of inputs.
INPUTS: Final = {1: np.float32, 6: np.int32, 7: np.int64, 9: np.bool_, 10: np.float16}


class OnnxGraph(Graph):
    """A graph with its float tensors as parameters, "/" for "." in their names.

    Args:
        path: the ONNX file.
        output: the output that `forward` gives.

    Raises:
        FormatError: for damaged files, or operators that are not read.
    """

    rest: Tensor

    def __init__(self, path: Path, output: str) -> None:
        super().__init__()
        model = load_model(path)
        check_operators(path, model)
        self.path, self.output = path, output
        found = entries(path, model)
        self._roles: dict[str, str] = {}
        self.names: dict[str, str] = {}
        for name, role in roles(model, output).items():
            if name in found and bool((value := found[name].read()).isfinite().all()):
                self._add(name, role, value)
        if not self.names:
            raise FormatError(f"{path} holds no float tensor that could be tuned")
        stored = {tensor.name for tensor in model.graph.initializer}
        self.inputs = {i.name: i for i in model.graph.input if i.name not in stored}
        # What is not tuned is told apart by its hash.
        tuned = [found[name] for name in self.names.values()]
        self.register_buffer("rest", digest(files(path, model), tuned))
        self._as_read = self._state(self.names)
        self._session: Any = None
        self._key: Any = None
        self._compared: set[frozenset[str]] = set()
        self._built({})  # what ONNX Runtime refuses is refused here

    def _add(self, name: str, role: str, value: Tensor) -> None:
        own = name.replace(".", "/")
        if hasattr(self, own):
            raise FormatError(f"{self.path} has a tensor called {name!r}; rename it")
        self.register_parameter(own, nn.Parameter(value, requires_grad=False))
        self._roles[own], self.names[own] = role, name

    @property
    def roles(self) -> Mapping[str, str]:
        """What each parameter is."""
        return self._roles

    def forward(self, **inputs: Tensor) -> Tensor:
        """The output, with whatever tensors stand in the parameters' places.

        Raises:
            BadInput: if a gradient is wanted, or ONNX Runtime refuses the inputs.
        """
        now = {name: getattr(self, name) for name in self.names}
        probed = {n: t for n, t in now.items() if not isinstance(t, nn.Parameter)}
        if torch.is_grad_enabled() and any(t.requires_grad for t in probed.values()):
            raise BadInput(
                "ONNX Runtime gives no gradients; use a method of forward passes (auto, mezo, qzo)"
            )
        feeds = self._feeds(inputs)
        if probed and frozenset(probed) not in self._compared:
            self._compare(probed, feeds)
        return self._run(self._built(probed), {**feeds, **self._arrays(probed)})

    def _feeds(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """numpy arrays by input; nothing came before the first token."""
        rows = len(next(iter(inputs.values())))
        feeds: dict[str, Any] = {}
        for name, record in self.inputs.items():
            kind = record.type.tensor_type
            if name in inputs:
                array = inputs[name].numpy(force=True)
            else:
                sizes = [d.dim_value for d in kind.shape.dim]  # 0 where any size will do
                array = np.zeros([rows, *sizes[1:]])
            feeds[name] = np.ascontiguousarray(array, dtype=INPUTS[kind.elem_type])
        return feeds

    def _arrays(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {self.names[n]: t.detach().contiguous().numpy() for n, t in tensors.items()}

    def _run(self, session: Any, feeds: Mapping[str, Any]) -> Tensor:
        try:
            (output,) = session.run([self.output], feeds)
        except Exception as error:  # pybind11's, without a common base
            raise BadInput(f"ONNX Runtime cannot run {self.path} on this batch: {error}") from error
        return torch.from_numpy(output)

    def _state(self, names: Collection[str]) -> dict[str, tuple[int, int]]:
        """Which tensors stand where, and how often each was written."""
        return {n: (id(t := getattr(self, n)), t._version) for n in names}

    def _built(self, probed: Mapping[str, Tensor]) -> Any:
        """The session for these inputs, built anew only where a constant of it has changed."""
        fixed = self._state([n for n in self.names if n not in probed])
        if self._key != (set(probed), fixed):
            self._session = None  # its memory goes first
            self._session = self._build(set(probed), self._changed(probed))
            self._key = (set(probed), fixed)
        return self._session

    def _changed(self, but: Collection[str]) -> dict[str, Tensor]:
        """Parameters that differ from the file's."""
        now = self._state([n for n in self.names if n not in but])
        return {n: getattr(self, n) for n, state in now.items() if state != self._as_read[n]}

    def _compare(self, probed: Mapping[str, Tensor], feeds: Mapping[str, Any]) -> None:
        """Hold the graph that probes run against the one that will be deployed, at one point."""
        self._session = self._key = None  # its memory goes first
        deployed = self._build((), {**self._changed(probed), **probed})
        wanted = self._run(deployed, feeds).double()
        del deployed
        found = self._run(self._built(probed), {**feeds, **self._arrays(probed)}).double()
        known = wanted.isfinite()
        error = (found - wanted)[known].square().mean().sqrt()
        share = float(error / wanted[known].square().mean().sqrt().clamp_min(1e-30))
        if known.any() and not share <= FAR:
            raise FormatError(
                f"{self.path}: with {len(probed)} tensors as inputs ONNX Runtime computes another "
                f"output than with them inside ({share:.0%} off); one of its operators wants them "
                "constant: tune another space"
            )
        if share > 0:
            log.info(
                "ONNX Runtime fuses less around tuned tensors: probes see outputs %.2g %% away "
                "from those of the deployed graph, which evaluations run", 100 * share,
            )  # fmt: skip
        self._compared.add(frozenset(probed))

    def _build(self, inputs: Collection[str], constants: Mapping[str, Tensor]) -> Any:
        """A session with some tensors as inputs, others as constants of these values."""
        _, runtime = onnx_packages()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        # Threads that wait for work would take torch's cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        model: str | bytes = str(self.path)
        if inputs or constants:
            model = self._edited(
                {self.names[n] for n in inputs}, {self.names[n] for n in constants}
            )
            folder = "session.model_external_initializers_file_folder_path"
            options.add_session_config_entry(folder, str(self.path.parent))
            arrays = self._arrays(constants)
            values = [runtime.OrtValue.ortvalue_from_numpy(a) for a in arrays.values()]
            options.add_external_initializers(list(arrays), values)
        try:
            return runtime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except Exception as error:  # pybind11's, without a common base
            raise FormatError(f"ONNX Runtime cannot load {self.path}: {error}") from error

    def _edited(self, inputs: set[str], outside: set[str]) -> bytes:
        """The graph with some initializers as inputs and others as external data."""
        onnx, _ = onnx_packages()
        model = load_model(self.path)
        declared = {i.name for i in model.graph.input}
        for k in reversed(range(len(model.graph.initializer))):
            tensor = model.graph.initializer[k]
            if tensor.name in inputs:
                if tensor.name not in declared:
                    kind = (tensor.name, tensor.data_type, list(tensor.dims))
                    model.graph.input.append(onnx.helper.make_tensor_value_info(*kind))
                del model.graph.initializer[k]
            elif tensor.name in outside:
                for field in ("raw_data", "float_data", "external_data"):
                    tensor.ClearField(field)
                tensor.data_location = EXTERNAL
                tensor.external_data.add(key="location", value=self.path.name)
        for node in model.graph.node:
            # Its kernel for int8 activations (level 4) takes scales from the packed weight, where
            # they are only if they were constant; it gives zeros else.
            if node.op_type == "MatMulNBits" and inputs.intersection(node.input):
                for k in reversed(range(len(node.attribute))):
                    if node.attribute[k].name == "accuracy_level":
                        del node.attribute[k]
        return bytes(model.SerializeToString())

    def _apply(self, fn: Any, recurse: bool = True) -> OnnxGraph:
        """Stay where and what it is: the file fixes the types, and the session runs on the CPU."""
        seen = fn(torch.empty(0))
        if seen.device.type != "cpu" or seen.dtype != torch.float32:
            raise BadInput(
                f"an ONNX graph has the types it was made with and runs on the CPU here, not as "
                f"{seen.dtype} on {seen.device}; leave dtype and device out"
            )
        return self
