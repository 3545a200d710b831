"""The frozen part of a model, on the disk instead of in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from zotune.training.snapshots import fresh_file

FILE = "lower.safetensors"


class Parked:
    """Tensors of modules that are seldom run, mapped from a file.

    Memory holds the pages that are in use, and gives them up when it runs short. On a CPU the
    modules run as before, bit for bit; on another device `present` brings them there first.
    """

    def __init__(self, tensors: dict[str, Tensor], path: Path) -> None:
        self.tensors = tensors
        self.device = next((t.device for t in tensors.values()), torch.device("cpu"))
        self.away = True
        _write(tensors, path)
        self.mapped = _mapped(path)
        self._put(self.mapped)

    def _put(self, values: dict[str, Tensor]) -> None:
        for name, tensor in self.tensors.items():
            tensor.data = values[name]

    @contextmanager
    def present(self) -> Iterator[None]:
        """The tensors where the model runs; may be entered again inside."""
        if self.device.type == "cpu" or not self.away:
            yield
            return
        self.away = False
        self._put({name: value.to(self.device) for name, value in self.mapped.items()})
        try:
            yield
        finally:
            for name, tensor in self.tensors.items():
                self.mapped[name].copy_(tensor.data)
            self._put(self.mapped)
            self.away = True


def parkable(modules: Sequence[nn.Module], model: nn.Module) -> dict[str, Tensor]:
    """The saved tensors of `modules` that nobody else in the model holds, each under one name.

    >>> table = nn.Embedding(3, 2)
    >>> head = nn.Linear(2, 3, bias=False)
    >>> head.weight = table.weight
    >>> parkable([table], nn.ModuleList([table, head]))
    {}
    """
    inside = {id(m) for module in modules for m in module.modules()}
    others = {t.data_ptr() for m in model.modules() if id(m) not in inside for t in _own(m)}
    found, seen = dict[str, Tensor](), set[int]()
    for number, module in enumerate(modules):
        for name, tensor in module.state_dict(keep_vars=True).items():
            if tensor.data_ptr() not in others | seen and tensor.numel():
                seen.add(tensor.data_ptr())
                found[f"{number}.{name}"] = tensor
    return found


def _own(module: nn.Module) -> Iterable[Tensor]:
    held = (*module._parameters.values(), *module._buffers.values())
    return (t for t in held if t is not None)


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    """Stream the tensors to the disk beside their place, then let the file take its name."""
    from safetensors.torch import save_file

    with fresh_file(path) as fresh:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, fresh)


def _mapped(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
