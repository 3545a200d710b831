"""A piece of a model with its inputs for all batches, run to see what its layers get."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.quant.calibrate.method import Moments


class Call(NamedTuple):
    """What a module is called with: its first argument, and the others."""

    x: Tensor
    args: tuple[Any, ...] = ()
    options: Mapping[str, Any] = {}

    @classmethod
    def of(cls, args: tuple[Any, ...], options: Mapping[str, Any]) -> Call:
        """The call behind a hook's arguments; transformers may name the first one."""
        if args:
            return cls(args[0], args[1:], options)
        rest = {k: v for k, v in options.items() if k != "hidden_states"}
        return cls(options["hidden_states"], (), rest)


class Reached(Exception):
    """Ends a forward whose rest nobody needs."""


class Stage:
    """A block, or the model, with the layers in it that are to be quantized.

    Args:
        module: called with one of `inputs` and then as `call` says.
        layers: names and modules.
        inputs: one per batch.
        call: the further arguments, the same for all batches.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Mapping[str, nn.Module],
        inputs: list[Tensor],
        call: Call | None = None,
    ) -> None:
        self.module, self.layers, self.inputs = module, layers, inputs
        self._call = call or Call(inputs[0])

    def run(self, x: Tensor) -> Any:
        """The module's output for one batch."""
        return self.module(x, *self._call.args, **self._call.options)

    def groups(self) -> list[list[str]]:
        """Names of the layers that run, in that order; those with the same input together."""
        seen: list[tuple[str, Tensor]] = []
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                stack.enter_context(watched(layer, _noting(name, seen)))
            self.run(self.inputs[0])
        found: list[tuple[Tensor, list[str]]] = []
        for name in dict.fromkeys(name for name, _ in seen):
            inputs = [x for other, x in seen if other == name]
            same = [names for x, names in found if len(inputs) == 1 and x is inputs[0]]
            if same:
                same[0].append(name)
            else:
                # A layer that runs several times has no one input to share.
                found.append((inputs[0] if len(inputs) == 1 else torch.empty(0), [name]))
        return [names for _, names in found]

    def moments(self, name: str, gram: bool) -> Moments:
        """Of the inputs of a layer, over all batches.

        Raises:
            BadInput: if they are not finite, or the layer is never run.
        """
        moments = Moments(gram)
        with watched(self.layers[name], lambda call: moments.add(call.x)):
            for x in self.inputs:
                self.run(x)
        if not moments.tokens:
            raise BadInput(f"layer {name!r} is not run by the model; exclude it")
        if not torch.isfinite(moments.highest).all():
            raise BadInput(
                f"the inputs of {name!r} hold NaN or infinity with this text: the checkpoint "
                "overflows in its dtype; give dtype='float32', or exclude the layer"
            )
        return moments


@contextmanager
def watched(module: nn.Module, see: Callable[[Call], None]) -> Iterator[None]:
    """Show every call of a module before it runs; `see` may raise `Reached` to end the forward."""

    def hook(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        see(Call.of(args, options))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with suppress(Reached):
            yield
    finally:
        handle.remove()


def _noting(name: str, seen: list[tuple[str, Tensor]]) -> Callable[[Call], None]:
    return lambda call: seen.append((name, call.x))
