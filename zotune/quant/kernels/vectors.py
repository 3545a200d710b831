# mypy: allow-untyped-calls
"""Vector instructions for compiled kernels, where numba's own loops would not become any."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils

LANES = 16  # of 32 bits, in a register of 512
WORD, BYTE, FLOAT = ir.IntType(32), ir.IntType(8), ir.FloatType()
WORDS, FLOATS = ir.VectorType(WORD, LANES), ir.VectorType(FLOAT, LANES)


@cache
def processor_has(*features: str) -> bool:
    """Whether this processor has all of these instructions, by LLVM's names.

    >>> processor_has("no such thing")
    False
    """
    found = binding.get_host_cpu_features()
    return all(found.get(feature, False) for feature in features)


class Code:
    """Writes instructions into a function that numba compiles; offsets are in bytes."""

    def __init__(self, context: Any, builder: Any) -> None:
        self.context, self.builder = context, builder

    def data(self, kind: Any, array: Any) -> Any:
        """The bytes of an array."""
        found = self.context.make_array(kind)(self.context, self.builder, array).data
        return self.builder.bitcast(found, BYTE.as_pointer())

    def at(self, pointer: Any, offset: Any, kind: Any) -> Any:
        place = cgutils.pointer_add(self.builder, pointer, offset)
        return self.builder.bitcast(place, kind.as_pointer())

    def load(self, pointer: Any, offset: Any, kind: Any) -> Any:
        return self.builder.load(self.at(pointer, offset, kind), align=1)

    def fetch(self, pointer: Any, offset: Any) -> None:
        """Ask for the line at this place, to be written soon."""
        kind = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), WORD, WORD, WORD])
        ask = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        self.builder.call(ask, [self.at(pointer, offset, BYTE), WORD(1), WORD(3), WORD(1)])

    def spread(self, value: Any) -> Any:
        """The same number in every lane."""
        kind = ir.VectorType(value.type, LANES)
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, WORD(0))
        return self.builder.shuffle_vector(one, one, ir.Constant(WORDS, [0] * LANES))

    def external(self, name: str, kind: Any) -> Any:
        function = ir.FunctionType(kind, [kind] * 3)
        return cgutils.get_or_insert_function(self.builder.module, function, name)

    def constant(self, value: float) -> Any:
        """A float in every lane."""
        return ir.Constant(FLOATS, [value] * LANES)

    def accumulate(self, begin: Any, steps: Any, more: Callable[[Any, Any], Any]) -> Any:
        """held = more(k, held) for k = 0, ..., steps - 1 >= 0, in registers, from `begin`: lists
        of vectors by row."""
        b, size = self.builder, steps.type
        start, loop, done = b.block, b.append_basic_block("more"), b.append_basic_block("enough")
        b.branch(loop)
        b.position_at_end(loop)
        k = b.phi(size)
        k.add_incoming(size(0), start)
        held = [[b.phi(one.type) for one in row] for row in begin]
        moved = more(k, held)
        following = b.add(k, size(1))
        k.add_incoming(following, loop)
        for phis, first, then in zip(held, begin, moved, strict=True):
            for phi, one, other in zip(phis, first, then, strict=True):
                phi.add_incoming(one, start)
                phi.add_incoming(other, loop)
        b.cbranch(b.icmp_signed("<", following, steps), loop, done)
        b.position_at_end(done)
        return moved
