"""A model folder attacked on the images of a task, as the command line does."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from zotune.attacks.config import AttackConfig
from zotune.attacks.outcome import Outcome
from zotune.attacks.run import attack
from zotune.errors import BadInput
from zotune.tasks import Batch, ImageClassification
from zotune.tasks.task import device_of, evaluating
from zotune.training.batches import spread
from zotune.training.folders import need_empty, use_threads
from zotune.training.opening import open_model, open_task
from zotune.training.settings import EvalConfig


def attack_task(
    config: AttackConfig,
    source: EvalConfig,
    output_dir: str | Path,
    targeted: bool = False,
) -> Outcome:
    """Attack the model that `source` names on its task's images and save what came out.

    `targeted` wants each image to be taken for the class after its own.

    Raises:
        BadInput: a task without images, a folder that is not empty, what `attack` refuses.
    """
    folder = Path(output_dir).expanduser()
    need_empty(folder)
    use_threads(source.threads)
    task = open_task(source)
    if not isinstance(task, ImageClassification):
        raise BadInput(f"task {task.name!r} shows no images; want digits, mnist, cifar10 or images")
    model = task.prepare(open_model(source, None))
    device = device_of(model)

    def scores(images: Tensor) -> Tensor:
        batch = Batch({"pixels": images}, len(images)).to(device)
        with evaluating(model):
            return task.scores(model, batch)

    split = source.split or next(n for n in ("test", "dev", "train") if n in task.splits)
    rows = spread(task.split(split), source.max_eval_samples)
    shown = task.collate([task.encode(row) for row in rows])
    images, labels = shown["pixels"], shown["label"]
    targets = (labels + 1) % len(task.labels) if targeted else None
    found = attack(scores, images, labels, targets=targets, config=config)
    found.save(folder)
    return found
