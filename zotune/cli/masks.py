"""`--show-mask`: what the model sees of an example, and which of it the loss counts."""

from __future__ import annotations

from typing import Any

from zotune.errors import BadInput

SHOWN = 3


def first_examples(config: Any) -> list[str]:
    """The first examples of the train split, what is trained on between ⟦ and ⟧."""
    from zotune.training.opening import open_model, open_task

    task = open_task(config)
    show = getattr(task, "show_mask", None)
    if show is None:
        raise BadInput(f"task {task.name!r} has no mask to show; the 'sft' task has one")
    task.prepare(open_model(config, None))
    return [show(example) for example in task.split("train")[:SHOWN]]
