"""What the tensors of an ONNX graph are, told by the operators that read them, never by names.

A tensor is tuned if every operator that reads it is known to, and it has a way to the output.

    scale    of stored integers: input of DequantizeLinear, MatMulNBits, GatherBlockQuantized, or
             multiplied with what DynamicQuantizeLinear measures (quantize_dynamic's MatMulInteger)
    zero     float zero points of MatMulNBits
    norm     gains and offsets of normalisations, also of those written out (x / sqrt(mean) * gain)
    bias     vectors that are added
    weight   matrices, convolutions, tables of words

Scales of activations stay as they were calibrated, and so do scales around a bias of int32: there
the kernel takes the product of two other scales for the bias's own.
"""

from __future__ import annotations

import math
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Final

from zotune.errors import FormatError

# Role by operator and input.
READS: Final = {
    "MatMulNBits": {2: "scale", 3: "zero", 5: "bias"},
    "GatherBlockQuantized": {2: "scale"},
    "LayerNormalization": {1: "norm", 2: "norm"},
    "RMSNormalization": {1: "norm"},
    "SimplifiedLayerNormalization": {1: "norm"},
    "SkipLayerNormalization": {2: "norm", 3: "norm", 4: "bias"},
    "SkipSimplifiedLayerNormalization": {2: "norm", 3: "bias"},
    "BatchNormalization": {1: "norm", 2: "norm"},
    "InstanceNormalization": {1: "norm", 2: "norm"},
    "GroupNormalization": {1: "norm", 2: "norm"},
    "Gemm": {0: "weight", 1: "weight", 2: "bias"},
    "MatMul": {0: "weight", 1: "weight"},
    "Conv": {1: "weight", 2: "bias"},
    "Gather": {0: "weight"},
}
# Operators whose output is their first input in another shape.
VIEWS: Final = ("Transpose", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Cast")
# Quantized operators of other layouts.
UNREAD: Final = ("QAttention", "QGemm", "QMoE", "MatMulBnb4", "MatMulFpQ4", "MatMulIntegerToFloat",
                 "DynamicQuantizeMatMul", "DynamicQuantizeLSTM")  # fmt: skip
DOMAINS: Final = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
INTEGERS: Final = (2, 3, 21, 22, 25, 26)  # int8, int4 and int2, with a sign or without
INT32: Final = 6


def check_operators(path: Path, model: Any) -> None:
    """Refuse operators that no plain ONNX Runtime has, quantized ones that are not trained, loops.

    Raises:
        FormatError: naming them.
    """
    links = {name: list(node.input) for node in model.graph.node for name in node.output}
    try:
        TopologicalSorter(links).prepare()
    except CycleError as error:
        raise FormatError(f"{path} is damaged: {error.args[1][:3]} wait for each other") from None
    own = {function.domain for function in model.functions}
    known = own.union(DOMAINS)
    foreign = {f"{n.domain}.{n.op_type}" for n in model.graph.node if n.domain not in known}
    if foreign:
        raise FormatError(
            f"{path} needs operators of other libraries: {sorted(foreign)[:5]}; they are not "
            "loaded, because a library is code: export the model without them"
        )
    other = {
        n.op_type
        for n in model.graph.node
        if n.op_type in UNREAD or n.op_type.startswith("QLinear")
    }
    if other:
        raise FormatError(
            f"{path} is quantized by {sorted(other)[:5]}, which is not read; quantize the float "
            "file again with quant_format=QuantFormat.QDQ, quantize_dynamic or MatMulNBitsQuantizer"
        )


def roles(model: Any, output: str) -> dict[str, str]:
    """The role of every float initializer that is tuned.

    Args:
        model: a ModelProto.
        output: the output that is looked at.
    """
    graph = _Links(model)
    reached = graph.reached(output)
    found: dict[str, str] = {}
    for tensor in model.graph.initializer:
        uses = graph.uses(tensor.name, reached)
        named = [role for use in uses if (role := graph.role(tensor, *use)) is not None]
        # One tensor may serve twice: an embedding as output layer, ones as gains of two norms.
        if named and len(named) == len(uses):
            found[tensor.name] = min(named)
    return found


class _Links:
    """Who makes and who reads what."""

    def __init__(self, model: Any) -> None:
        self.stored = {t.name: t for t in model.graph.initializer}
        self.maker = {name: node for node in model.graph.node for name in node.output}
        self.readers: dict[str, list[tuple[Any, int]]] = {}
        for node in model.graph.node:
            for place, name in enumerate(node.input):
                self.readers.setdefault(name, []).append((node, place))

    def reached(self, output: str) -> set[str]:
        """Every name that the output depends on."""
        seen, waiting = set(), [output]
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += self.maker[name].input if name in self.maker else ()
        return seen

    def uses(self, name: str, reached: set[str]) -> list[tuple[Any, int]]:
        """Operators that read a tensor on the way to the output, views of it followed."""
        found, waiting = [], [name]
        while waiting:
            for node, place in self.readers.get(waiting.pop(), ()):
                if not reached.intersection(node.output):
                    continue
                if node.op_type in VIEWS and place == 0:
                    waiting.append(node.output[0])
                else:
                    found.append((node, place))
        return found

    def role(self, tensor: Any, node: Any, place: int) -> str | None:
        """What a tensor is to one operator that reads it; None where that is not known."""
        numbers = math.prod(tensor.dims)
        if node.op_type == "DequantizeLinear" and place == 1:
            free = self.is_stored(node.input[0]) and not self.beside_int32_bias(node.output[0])
            return "scale" if free else None
        if node.op_type == "Mul" and self.is_measured(node.input[1 - place]):
            return "scale"
        if numbers < 2:
            return None  # a constant of the formula
        if node.op_type in READS:
            found = READS[node.op_type].get(place)
            return found if found != "weight" or len(tensor.dims) > 1 else None
        if numbers != tensor.dims[-1] or node.op_type not in ("Mul", "Add"):
            return None
        other = node.input[1 - place]
        if node.op_type == "Mul":
            return "norm" if self.is_normalised(other) else None
        return None if other in self.stored else "norm" if self.is_gained(other) else "bias"

    def is_stored(self, name: str) -> bool:
        """Whether integers come from the file, looked up or transposed at most."""
        while (node := self.maker.get(name)) is not None:
            if node.op_type not in (*VIEWS, "Gather"):
                return False
            name = node.input[0]
        tensor = self.stored.get(name)
        return tensor is not None and tensor.data_type in INTEGERS and math.prod(tensor.dims) > 1

    def beside_int32_bias(self, name: str) -> bool:
        """Whether what is dequantized meets a bias of int32 whose scale is two others' product."""
        return any(
            any(self.is_int32(other) for other in node.input[2:3])
            for node, _ in self.readers.get(name, ())
            if node.op_type in ("Gemm", "Conv")
        )

    def is_int32(self, name: str) -> bool:
        """Whether a name is the dequantized form of stored int32."""
        node = self.maker.get(name)
        if node is None or node.op_type != "DequantizeLinear":
            return False
        stored = self.stored.get(node.input[0])
        return stored is not None and stored.data_type == INT32

    def is_measured(self, name: str) -> bool:
        """Whether a name is the scale that DynamicQuantizeLinear measured."""
        node = self.maker.get(name)
        return node is not None and node.op_type == "DynamicQuantizeLinear"

    def is_normalised(self, name: str, steps: int = 5) -> bool:
        """Whether a name is x over the root of a mean: x / sqrt(m), or x times its reciprocal."""
        node = self.maker.get(name)
        if node is None or steps == 0:
            return False
        if node.op_type == "Sqrt":
            return self.is_mean(node.input[0])
        chain = node.op_type in ("Mul", "Div", "Reciprocal", "Cast")
        return chain and any(self.is_normalised(source, steps - 1) for source in node.input)

    def is_mean(self, name: str, steps: int = 3) -> bool:
        """Whether a name is a mean, something small added or not."""
        node = self.maker.get(name)
        if node is None or steps == 0:
            return False
        chain = node.op_type in ("Add", "Max", "Cast")
        return node.op_type == "ReduceMean" or (
            chain and any(self.is_mean(source, steps - 1) for source in node.input)
        )

    def is_gained(self, name: str) -> bool:
        """Whether a name is what is normalised times a stored vector."""
        node = self.maker.get(name)
        if node is None or node.op_type != "Mul":
            return False
        own = [k for k, source in enumerate(node.input) if source in self.stored]
        return len(own) == 1 and self.is_normalised(node.input[1 - own[0]])
