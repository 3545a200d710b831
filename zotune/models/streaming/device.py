"""Layers that come to a GPU: file or page cache ─► pinned memory ─► device, on a stream of its own.

The thread that reads ahead also starts the copy; the forward waits for its end on the device, not
on the host. What was moved goes back to the work file when the layer leaves. What lies beside the
layers stays on the device.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from zotune.models.streaming.store import Store
from zotune.models.streaming.stream import Unit


class DeviceUnit(Unit):
    """A layer whose tensors are on `device` from `arrive` to `leave`, and in the store else."""

    def __init__(
        self, path: str, module: nn.Module, layer: bool, store: Store, device: torch.device
    ) -> None:
        super().__init__(path, module, layer, store)
        self.device = device
        self.homes: list[Tensor] = []
        self.copies: list[Tensor] = []
        self.copied: Any = None
        self.away = True

    def fetch(self) -> None:
        if not self.away:
            return
        super().fetch()
        self.homes = [tensor.data for tensor in self.tensors]
        if self.device.type != "cuda":
            self.copies = [home.to(self.device, copy=True) for home in self.homes]
            return
        with torch.cuda.stream(_side(self.device)):
            pinned = [torch.empty_like(h, pin_memory=True).copy_(h) for h in self.homes]
            self.copies = [p.to(self.device, non_blocking=True) for p in pinned]
            self.copied = torch.cuda.current_stream(self.device).record_event()

    def arrive(self) -> None:
        if not self.away:
            return
        if self.copied is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(self.copied)
            for copy in self.copies:
                copy.record_stream(here)
        self._put(self.copies)
        self.away = False

    def leave(self) -> None:
        if not self.away and (self.written or not self.held):
            if self.written:
                for home, tensor in zip(self.homes, self.tensors, strict=True):
                    home.copy_(tensor.data)
            if not self.held:
                self._put(self.homes)
                self.away = True
        if self.away:
            self.copies = []
        super().leave()

    def _put(self, values: list[Tensor]) -> None:
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.data = value
        for follow in self.followers:
            follow()


@cache
def _side(device: torch.device) -> Any:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
