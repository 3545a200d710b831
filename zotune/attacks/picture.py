"""A grid of pictures: original, perturbation, result."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from zotune.attacks.outcome import Outcome

SHOWN = 8  # images at most


def picture(outcome: Outcome) -> bytes:
    """A PNG of the first images that were fooled, or else of the first that were attacked: the
    original, the perturbation (grey is none, black and white its largest number) and the result.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen = outcome.success if bool(outcome.success.any()) else outcome.correct
    numbers = chosen.nonzero().flatten().tolist()[:SHOWN]
    columns = max(1, len(numbers))
    figure = Figure(figsize=(1.2 * columns + 1, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, columns, squeeze=False)
    for place in axes.flat:
        place.set_axis_off()
    for column, number in enumerate(numbers):
        before, after = outcome.images[number], outcome.adversarial[number]
        d = after.int() - before.int()
        grey = 127.5 + 127.5 * d / d.abs().amax().clamp_min(1)
        for row, shown in enumerate((before, grey.round().to(torch.uint8), after)):
            axes[row][column].imshow(_pixels(shown), cmap="gray", vmin=0, vmax=255)
        axes[0][column].set_title(
            f"#{number}, class {int(outcome.labels[number])}\n{int(outcome.queries[number])} q",
            fontsize=7,
        )
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=120)
    return held.getvalue()


def _pixels(image: torch.Tensor) -> Any:
    """(height, width, 3) for colour images, else (height, width), of the first channel."""
    return image.permute(1, 2, 0).numpy() if len(image) == 3 else image[0].numpy()
