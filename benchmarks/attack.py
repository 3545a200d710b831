"""Black-box attacks at equal L-inf and queries: zotune's methods beside ART's and foolbox's.

    python benchmarks/attack.py

Two int8 classifiers (weights and activations): a small CNN on scikit-learn's digits, and ResNet-20
on the lossy CIFAR-10 of ZOTUNE_DATA. All attack the same images of the test split, those that are
classified rightly. Peers are counted by `attack_peers.py`, in their favour. PGD by backprop on the
float model shows what gradients find. Rows are written as they come, to
`results/attack-digits.json` and `-resnet20.json`; `-speed.json` times zoqo on the digits CNN.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from statistics import mean, stdev

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zotune
from benchmarks import attack_peers
from benchmarks.attack_peers import PEERS
from benchmarks.harness import Row, begin, parser, report
from zotune import tasks
from zotune.quant import quantize_model_
from zotune.tasks import ImageClassification

DATA = Path(os.environ.get("ZOTUNE_DATA", Path(__file__).parents[1] / "../shared/data"))
SCHEME = "int8-channel-a8"
OURS = ("zoqo", "zo-sign", "zo-adam", "zo-sgd", "zoqo on pixels")
FASTEST = 50.0  # images a second that digits shall reach
ZOO, PGD, SPEED = "ART ZOO", "foolbox PGD", "speed"


@dataclass(frozen=True)
class Setup:
    """A float model, its int8 twin, both of float images in [0, 1], and what is attacked."""

    name: str
    float_model: nn.Module
    model: nn.Module
    images: Tensor
    labels: Tensor
    accuracy: float
    budget: str

    @property
    def share(self) -> float:
        return float(Fraction(self.budget))

    @torch.no_grad()
    def scores(self, shown: Tensor) -> Tensor:
        out = self.model(shown)
        return (out if isinstance(out, Tensor) else out.logits).float()


class DigitsNet(nn.Module):
    """Two convolutions and a head for 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        out: Tensor = self.head(F.max_pool2d(F.relu(self.second(x)), 2).flatten(1))
        return out


class Normalised(nn.Module):
    """A checkpoint's model with its normalisation in front."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        for name, value in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model((x - self.mean) / self.std).logits
        return out


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    flags = parser(__doc__, images=100, queries=500, seeds=3, epochs=15, timed=1000)
    flags.add_argument("--only", nargs="+", choices=[*MODELS, SPEED], default=[*MODELS, SPEED])
    flags.add_argument("--ours", nargs="+", choices=OURS, default=OURS)
    flags.add_argument("--peers", nargs="*", choices=[*PEERS, PGD], default=[*PEERS, PGD])
    return flags.parse_args(words)


def shown(task: str, split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    found = tasks.get(task)
    assert isinstance(found, ImageClassification)
    rows = list(found.split(split))[:count]
    batch = found.collate([found.encode(row) for row in rows])
    return batch["pixels"], batch["label"]


def digits(given: argparse.Namespace) -> Setup:
    """The CNN trained on the train split: 15 epochs of Adam, 2e-3, batches of 32."""
    images, labels = shown("digits", "train")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DigitsNet()
        adam = torch.optim.Adam(model.parameters(), 2e-3)
        for _ in range(given.epochs):
            for part in torch.randperm(len(images)).split(32):
                adam.zero_grad()
                F.cross_entropy(model(images[part] / 255), labels[part]).backward()
                adam.step()
    return setup("digits CNN int8", model, DigitsNet(), "digits", "32/255", given)


def resnet20(given: argparse.Namespace) -> Setup:
    from zotune.models.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification

    file = DATA / "cifar10_resnet/resnet20-12fca82f.th"
    stored = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    print(f"read {file.name} of {file.parent.name}")
    renamed = {k.removeprefix("module.").replace("linear", "classifier"): v
               for k, v in stored.items()}  # fmt: skip

    def empty() -> CifarResNetForImageClassification:
        return CifarResNetForImageClassification(CifarResNetConfig(depth=20))

    model = empty()
    model.load_state_dict(renamed)
    return setup(
        "ResNet-20 int8", Normalised(model), Normalised(empty()), "cifar10", "4/255", given
    )  # fmt: skip


MODELS: dict[str, Callable[[argparse.Namespace], Setup]] = {
    "digits": digits, "resnet20": resnet20
}  # fmt: skip


def setup(
    name: str, model: nn.Module, twin: nn.Module, task: str, budget: str, given: argparse.Namespace
) -> Setup:
    """The first test images that the quantized twin of a model classifies rightly."""
    twin.load_state_dict(model.state_dict())
    quantize_model_(twin.eval(), SCHEME)
    images, labels = shown(task, "test", max(300, 3 * given.images))
    made = Setup(name, model.eval(), twin, images, labels, 0.0, budget)
    right = torch.cat([made.scores(part / 255) for part in images.split(256)]).argmax(1) == labels
    kept = right.nonzero().flatten()[: given.images]
    accuracy = float(right.double().mean())
    return Setup(name, model, twin, images[kept], labels[kept], accuracy, budget)


def ours(made: Setup, contender: str, given: argparse.Namespace, seed: int) -> tuple[float, float]:
    """Success rate and mean queries of a registered method."""
    method, _, pixels = contender.partition(" on ")
    found = zotune.attack(
        made.model, made.images, made.labels, method=method, pattern=pixels or "square",
        budget=made.budget, queries=given.queries, seed=seed,
    )  # fmt: skip
    assert int(found.queries.max()) <= given.queries
    return found.success_rate or 0.0, float(found.queries.double().mean())


def rows_of(made: Setup, given: argparse.Namespace, add: Callable[[Row], None]) -> None:
    """Every contender's success and queries on one model; ZOO first, which sets the target."""
    label = f"{made.name}, L-inf {made.budget}"
    add(Row(f"{made.name}: accuracy of the first test images, no attack", made.accuracy, ""))
    target = None
    order = sorted([*given.peers, *given.ours], key=lambda name: (name != ZOO, name in PEERS))
    for contender in (name for name in order if name != PGD):
        found = []
        for seed in range(given.seeds):
            if contender in PEERS:
                found.append(attack_peers.attacked(
                    contender, made.scores, made.images, made.labels, made.share, given.queries,
                    seed,
                ))  # fmt: skip
            else:
                found.append(ours(made, contender, given, seed))
        success, queries = ([f[k] for f in found] for k in (0, 1))
        if contender == ZOO:
            target = mean(success)
        judged = target if contender in given.ours else None
        base = None if judged is None else ZOO
        add(Row(f"{label}: {contender}, success", mean(success), "", base, judged, at_least=True))
        spread = stdev(success) if len(success) > 1 else 0.0
        add(Row(f"{label}: {contender}, spread over seeds", spread, ""))
        add(Row(f"{label}: {contender}, queries", mean(queries), ""))
    if PGD in given.peers:
        gradient = attack_peers.pgd(
            made.float_model, made.scores, made.images, made.labels, made.share, steps=40
        )
        text = f"{label}: {PGD}, 40 backprop steps on the float model, success"
        add(Row(text, gradient, ""))


def speed(made: Setup, given: argparse.Namespace, add: Callable[[Row], None]) -> None:
    """Images a second: as the attack goes, where an image that is fooled leaves, and as if each
    took all its queries, which is what the target is for."""
    repeats = -(-given.timed // len(made.images))
    images, labels = (t.repeat(repeats, *[1] * (t.dim() - 1))[: given.timed]
                      for t in (made.images, made.labels))  # fmt: skip
    began, cpu = time.perf_counter(), time.process_time()
    found = zotune.attack(made.model, images, labels, budget=made.budget, queries=given.queries)
    wall, busy = time.perf_counter() - began, time.process_time() - cpu
    whole = int(found.queries.sum()) / given.queries  # images' worth of queries
    text = f"{made.name}: images a second, {given.queries} queries"
    add(Row(f"{text} each", whole / wall, "1/s", "target", FASTEST, at_least=True))
    add(Row(f"{text} each, per second of one core", whole / busy, "1/s"))
    add(Row(f"{text} at most, fooled images leaving", len(images) / wall, "1/s"))


def main(words: Sequence[str] | None = None) -> None:
    given = options(words)
    begin(given)
    for name in given.only:
        rows: list[Row] = []

        def add(row: Row, name: str = name, rows: list[Row] = rows) -> None:
            rows.append(row)
            report(f"attack-{name}", rows, given)

        if name == SPEED:
            speed(digits(given), given, add)
        else:
            rows_of(MODELS[name](given), given, add)


if __name__ == "__main__":
    main()
