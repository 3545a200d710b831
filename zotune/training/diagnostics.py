"""Is anything being learned? What a run's coefficients say of themselves, and advice."""

from __future__ import annotations

import math
from statistics import fmean, stdev

from zotune.core.block import CodeBlock
from zotune.core.space import Space
from zotune.core.step import StepReport

FEW = 40  # steps below which nothing is said
NOISE = 0.1  # signal-to-noise under which coefficients tell next to nothing


class Diagnostics:
    """Watches the steps of one process's share of a run.

    signal: (mean / standard error)^2 - 1 of the coefficients over the examples of a batch, 0 when
    they are all noise. moved: share of integer codes that a step changed. cosine: between the
    estimate and the true gradient, where it was asked for.
    """

    def __init__(self, space: Space) -> None:
        self.codes = [b for b in space if isinstance(b, CodeBlock)]
        self.losses: list[float] = []
        self.signals: list[float] = []
        self.cosine: float | None = None
        self._noted = self._steps = self._seen = 0

    def note(self, report: StepReport) -> None:
        """Take in one step."""
        self._steps += 1
        if math.isfinite(report.loss):
            self.losses.append(report.loss)
        if report.estimate is not None and report.estimate.signal is not None:
            self.signals.append(report.estimate.signal)

    def row(self) -> dict[str, float]:
        """What there is to log of the steps since the last call."""
        out: dict[str, float] = {}
        if self._seen < len(self.signals):
            out["signal"] = fmean(self.signals[self._seen :])
            self._seen = len(self.signals)
        if self.codes and self._steps > self._noted:
            moved = int(sum(b.moved for b in self.codes))
            out["codes_moved"] = moved / sum(b.numel for b in self.codes)
            out["codes_moved"] /= self._steps - self._noted
            for block in self.codes:
                block.forget_moved_()
        if self.cosine is not None:
            out["gradient_cosine"], self.cosine = self.cosine, None
        self._noted = self._steps
        return out

    def advice(self) -> str | None:
        """One sentence where the training loss has not fallen, None where it has."""
        count = len(self.losses)
        if count < FEW or len(set(self.losses)) == 1:  # a private run shows no losses
            return None
        first, last = self.losses[: max(FEW // 4, count // 20)], self.losses[-(count // 4) :]
        fallen = fmean(first) - fmean(last)
        error = math.hypot(stdev(first) / len(first) ** 0.5, stdev(last) / len(last) ** 0.5)
        if fallen > 2 * error:
            return None
        said = f"the training loss has not fallen ({fmean(first):.4f} -> {fmean(last):.4f}): "
        if fallen < -2 * error:
            return said + "it rises, so the steps are too long: lower learning_rate"
        if self.signals and fmean(self.signals) < NOISE:
            return said + (
                f"the coefficients are noise (signal-to-noise {fmean(self.signals):.2f}): use a "
                "larger batch, more queries, a larger eps, or a smaller space such as adapter"
            )
        return said + "raise learning_rate, train for longer, or try --method auto"
