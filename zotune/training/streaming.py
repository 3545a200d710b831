"""Whether a run streams its model, and what cannot be streamed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import torch
from torch import nn

from zotune.core.backprop import Backprop
from zotune.core.block import FloatBlock
from zotune.core.method import Method
from zotune.core.space import Space
from zotune.core.step import Tuner
from zotune.core.streaming import StreamedBlocks
from zotune.errors import BadInput
from zotune.methods import AnyMethod
from zotune.models import Loaded
from zotune.models.load import find_folder
from zotune.models.streaming import Store, Stream
from zotune.quant.formats.folder import WEIGHTS
from zotune.training.config import TrainConfig
from zotune.training.freezing.plan import parse_bytes
from zotune.training.settings import EvalConfig

log = logging.getLogger("zotune")
_FITS = 0.8  # of what is free: batches and activations want the rest


@dataclass
class Streaming:
    """The streamed model of one run. `limit`: bytes of it in memory."""

    store: Store
    limit: int
    device: str = "cpu"
    stream: Stream | None = None
    blocks: StreamedBlocks | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls, config: TrainConfig | EvalConfig, model: nn.Module | Loaded | None
    ) -> Streaming | None:
        """What the configuration asks for; None where the model is simply in memory."""
        limit = int(psutil.virtual_memory().available * _FITS)
        if config.memory_limit is not None:
            limit = parse_bytes(config.memory_limit, "memory_limit")
        auto = config.stream == "auto" or (config.memory_limit is not None and not config.stream)
        if not config.stream and not auto:
            return None
        if auto and model_bytes(config, model) <= limit:
            return None
        return cls(Store(config.offload_folder), limit, config.device)

    def begin_(self, model: nn.Module) -> None:
        """Layers come and go from now on."""
        self.stream = Stream(model, self.store, self.limit, device=self.device)
        layers = sum(unit.layer for unit in self.stream.units)
        log.info(
            "streaming %d layers, %s bytes, of which %s at most are in memory; work file: %s bytes",
            layers, f"{self.stream.size:,}", f"{self.stream.need:,}", f"{self.store.written:,}",
        )  # fmt: skip

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        """`begin_`, and `close` at the end."""
        self.begin_(model)
        try:
            yield
        finally:
            self.close()

    def own_(self, space: Space, method: AnyMethod) -> None:
        """What is tuned moves to where it may be written.

        Raises:
            BadInput: the method keeps more numbers of these blocks than may be in memory.
        """
        assert self.stream is not None
        self.blocks = StreamedBlocks(space, self.stream)
        streamed = sum(b.numel for b in space if b.name in self.blocks.units)
        each = 0 if isinstance(method, Backprop) else bytes_per_number(method)  # type: ignore[arg-type]
        if each * streamed > self.limit:
            raise BadInput(
                f"{method.name} keeps {each} bytes for each of {streamed:,} tuned numbers, more "
                f"than memory_limit={self.limit:,}: tune a smaller space, or use a method that "
                "keeps none (`zotune list methods`)"
            )

    def serve_(self, tuner: Tuner) -> None:
        """Updates wait for their layers from now on."""
        assert self.blocks is not None
        self.blocks.serve_(tuner)

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
        self.store.close()


def check(config: TrainConfig, method: AnyMethod, model: nn.Module | Loaded | None) -> None:
    """Refuse what needs the whole model at once, before anything is loaded.

    Raises:
        BadInput: naming it.
    """
    backprop = isinstance(method, Backprop)
    for asked, what in (
        (backprop, f"method {method.name} goes back through all layers"),
        (config.check_gradient, "check_gradient goes back through all layers"),
        (config.freeze, "freeze moves lower layers to a file of its own"),
        (config.scheme and model is None, "quantizing while loading (scheme) needs all layers"),
    ):
        if asked:
            raise BadInput(f"{what}, which a streamed model does not allow; drop it, or --stream")


def model_bytes(config: TrainConfig | EvalConfig, model: nn.Module | Loaded | None) -> int:
    """Bytes of a model: of its files, or of its tensors where it is in memory already."""
    if model is not None:
        inner = model.model if isinstance(model, Loaded) else model
        held = {id(t): t for t in (*inner.parameters(), *inner.buffers())}
        return sum(t.numel() * t.element_size() for t in held.values())
    folder = find_folder(config.model_name_or_path, config.trust_remote_code)
    files = [folder] if folder.is_file() else [
        path for path in folder.iterdir() if path.suffix in WEIGHTS
    ]  # fmt: skip
    return sum(path.stat().st_size for path in files)


def bytes_per_number(method: Method) -> int:
    """What a method keeps of each tuned number, told by one of a thousand numbers.

    >>> from zotune.methods import parse
    >>> bytes_per_number(parse("zo-adam")), bytes_per_number(parse("mezo"))
    (8, 0)
    """
    count = 1000
    block = FloatBlock.of("block", torch.zeros(100, 10))
    kept = list[torch.Tensor]()
    for stage in method.stages:
        kept += stage.rule.state(block, block.shape).values()
        kept += stage.perturbation.states(Space([block])).get("block", {}).values()
    return sum(t.numel() * t.element_size() for t in kept) // count
