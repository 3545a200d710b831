"""What a run consists of, once it is put together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from zotune.core.backprop import AnyTuner, Backprop
from zotune.core.evaluator import TorchEvaluator
from zotune.core.space import Space, SpaceSpec
from zotune.methods import AnyMethod
from zotune.models import Loaded
from zotune.quant.running import kernels_of
from zotune.tasks.task import Task
from zotune.training import privacy
from zotune.training.batches import Batches, PoissonBatches
from zotune.training.config import TrainConfig
from zotune.training.freezing.freezing import Freezing
from zotune.training.streaming import Streaming


@dataclass
class Bench:
    """A run, assembled. `base` is the fingerprint of the model before anything was added to it,
    `before` what the task measured then."""

    config: TrainConfig
    loaded: Loaded
    base: str
    task: Task
    model: nn.Module
    spec: SpaceSpec
    tuner: AnyTuner
    batches: Batches | PoissonBatches
    added: dict[str, Tensor]
    before: dict[str, float]
    freezing: Freezing | None = None
    streaming: Streaming | None = None

    @property
    def method(self) -> AnyMethod:
        """What `auto` or a privacy budget chose, where it was to choose."""
        return self.tuner.method

    @property
    def space(self) -> Space:
        return self.tuner.space

    @property
    def evaluator(self) -> TorchEvaluator:
        found = self.tuner.evaluator
        assert isinstance(found, TorchEvaluator)
        return found

    @property
    def kernels(self) -> dict[str, str]:
        """What each kind of layer runs on in a step."""
        return kernels_of(self.model, gradient=isinstance(self.method, Backprop))

    @property
    def private(self) -> bool:
        """Whether the training examples are hidden from whoever sees what the run leaves."""
        return privacy.private(self.method) is not None

    def promise(self, steps: int) -> privacy.Privacy | None:
        """What a private run promises after so many steps."""
        mechanism, batches = privacy.private(self.method), self.batches
        if mechanism is None or not isinstance(batches, PoissonBatches):
            return None
        return privacy.spent(mechanism, len(batches.examples), steps, batches.together)

    def count(self, step: int) -> int:
        """How many batches a step is measured on, from its own one on."""
        return 1 if isinstance(self.method, Backprop) else self.method.at(step).batches

    @property
    def coefficients(self) -> int:
        """Numbers per journal record."""
        if isinstance(self.method, Backprop):
            return 0
        examples = self.config.examples
        return max(stage.estimator.count(stage.batches * examples) for stage in self.method.stages)
