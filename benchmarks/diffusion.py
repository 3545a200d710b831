"""A small diffusion model, quantized, moved to other images by forward passes and by backprop.

    python benchmarks/diffusion.py
    python benchmarks/diffusion.py --shapes sd35      # needs a GPU; see benchmarks/sd35.py

A DDPM (285,000 parameters) learns scikit-learn's digits 0 to 4 by backprop and is quantized to
int4-g16 (its linear layers: convolutions stay float). The target set is the same digits inverted,
dark on white: 700 images to train on, 50 (dev) to choose each learning rate by (a third
of the budget, one seed), 151 (test) for the table. Every contender may spend the same passes of a
batch through the network, a forward with its backward counted three times, what `auto` looks at
first included. "frechet" is the Fréchet distance of 128 samples to all 901 images, on the 64
pixels; 128 of the inverted digits themselves, and 128 digits as the model knew them, are marks to
read it by.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from benchmarks import sd35
from benchmarks.harness import Row, begin, parser, report
from zotune import methods
from zotune.core.backprop import Backprop
from zotune.tasks.gallery import frechet, pooled
from zotune.training import TrainConfig, train

MEASURED = 72  # passes that `auto` looks at before the first step
PARTS = {"train": (0, 700), "dev": (700, 750), "test": (750, 901)}


@dataclass(frozen=True)
class Contender:
    """A method on a space, and the learning rates to choose from; none: it measures its own."""

    method: str
    space: str
    rates: tuple[float, ...] = ()
    scheme: str | None = "int4-g16"

    @property
    def name(self) -> str:
        base = "float" if self.scheme is None else "int4"
        return f"{self.method} on {self.space}, {base}"

    def steps(self, budget: int) -> int:
        made = methods.parse(self.method)
        looked = MEASURED if self.method == "auto" else 0
        return (budget - looked) // (3 if isinstance(made, Backprop) else made.forwards)


CONTENDERS = (
    Contender("mezo(units='relative', eps=0.05)", "norms+biases", (0.03, 0.1)),
    Contender("adamw", "norms+biases", (3e-3, 1e-2)),
    Contender("qzo", "scales", (0.03, 0.3, 3.0)),
    Contender("adamw", "scales", (3e-3, 1e-2)),
    Contender("mezo(units='relative', eps=0.05)", "lora", (0.03, 0.3, 3.0)),
    Contender("lora", "lora", (3e-3, 1e-2)),
    Contender("auto", "norms+biases"),
    Contender("auto", "scales"),
    Contender("auto", "lora"),
)


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    flags = parser(__doc__, seeds=3, budget=150, batch=16, pretraining=1000)
    flags.add_argument("--only", nargs="+", default=None, help="contenders whose name holds these")
    flags.add_argument("--shapes", choices=["sd35"], help="memory at a large model's shapes")
    return flags.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    given = options(words)
    begin(given)
    if given.shapes:
        report("diffusion-sd35", sd35.rows(sd35.LARGE), given)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        images = digits()
        save_images(folder / "target", 255 - images)
        base = Path(given.model) if given.model else pretrained(folder / "base", images, given)
        rows, details = marks(images), dict[str, Any]()
        for contender in CONTENDERS:
            if given.only is None or any(word in contender.name for word in given.only):
                rate = chosen_rate(contender, base, folder, given)
                steps = contender.steps(given.budget)
                found = [
                    run(contender, rate, seed, base, folder / "target", steps, given)
                    for seed in range(given.seeds)
                ]
                rows += rows_of(contender, rate, found, given)
                details[contender.name] = {"rate": rate, "runs": found}
                report("diffusion", rows, given, contenders=details)  # a killed run keeps its rows


def digits() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """scikit-learn's digits 0 to 4, uint8 (901, 8, 8), in an order of their own."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.round(found.images[found.target < 5] * (255 / 16)).astype(np.uint8)
    return images[np.random.default_rng(0).permutation(len(images))]


def save_images(folder: Path, images: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    """As PNG, with train, dev and test; `folder`-dev has the first two, so that choices made there
    see no test image."""
    from PIL import Image

    for split, (start, stop) in PARTS.items():
        for root in (folder,) if split == "test" else (folder, Path(f"{folder}-dev")):
            (root / split).mkdir(parents=True)
            for i in range(start, stop):
                Image.fromarray(images[i]).save(root / split / f"{i:03d}.png")


def pretrained(folder: Path, images: np.ndarray[Any, np.dtype[np.uint8]], given: Any) -> Path:
    """A DDPM pipeline trained on the images by AdamW."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32, 32),
        layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler: Any = DDPMScheduler()
    x = torch.from_numpy(images[: PARTS["train"][1]]).unsqueeze(1) / 127.5 - 1
    rule = torch.optim.AdamW(model.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(rule, given.pretraining)
    for _ in range(given.pretraining):
        clean = x[torch.randint(len(x), (64,))]
        noise, t = torch.randn_like(clean), torch.randint(1000, (64,))
        made = model(scheduler.add_noise(clean, noise, t), t).sample
        rule.zero_grad()
        (made - noise).square().mean().backward()
        rule.step()
        decay.step()
    DDPMPipeline(model.eval(), scheduler).save_pretrained(folder)
    return folder


def marks(images: np.ndarray[Any, np.dtype[np.uint8]]) -> list[Row]:
    """What distances mean: of the target set to 128 of its own, and to the digits themselves."""
    target = pooled(torch.from_numpy(255 - images).unsqueeze(1))
    own, other = target[:128], pooled(torch.from_numpy(images[:128]).unsqueeze(1))
    return [
        Row("mark: 128 inverted digits to the target set", frechet(own, target), "frechet"),
        Row("mark: 128 digits as they are to the target set", frechet(other, target), "frechet"),
    ]


def chosen_rate(contender: Contender, base: Path, folder: Path, given: Any) -> float | None:
    """The rate with the lowest dev loss, after a third of the budget with seed 0."""
    if not contender.rates:
        return None
    dev = Path(f"{folder / 'target'}-dev")
    third = max(1, contender.steps(given.budget) // 3)
    tried = {r: run(contender, r, 0, base, dev, third, given, 0) for r in contender.rates}
    losses = {r: found["after"]["loss"] for r, found in tried.items()}
    return min(losses, key=lambda r: losses[r] if losses[r] == losses[r] else float("inf"))


def run(
    contender: Contender, rate: float | None, seed: int, base: Path, data: Path, steps: int,
    given: argparse.Namespace, samples: int = 128,
) -> dict[str, Any]:  # fmt: skip
    """Numbers before and after a run in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as out:
        result = train(
            TrainConfig(
                model_name_or_path=str(base),
                task="diffusion",
                data=str(data),
                output_dir=out,
                task_options={"samples": samples, "sample_steps": 10},
                method=contender.method,
                space=contender.space,
                scheme=contender.scheme,
                learning_rate=rate,
                seed=seed,
                max_steps=contender.steps(given.budget),
                threads=given.threads,
                save_steps=0,
                per_device_train_batch_size=given.batch,
                report_to="none",
                show_progress=False,
            )
        )
    return {**result.numbers, "forwards": result.forwards, "seconds": result.train_seconds}


def rows_of(
    contender: Contender, rate: float | None, found: list[dict[str, Any]], given: Any
) -> list[Row]:
    before = found[0]["before"]
    name = f"{contender.name}, {contender.steps(given.budget)} steps"
    rows = []
    for metric in ("loss", "frechet"):
        values = [o["after"][metric] for o in found]
        chosen = "measured" if rate is None else rate
        words = f"before: {before[metric]:.3f}; lr {chosen}"
        rows.append(Row(f"{name}: {metric}", mean(values), metric, words, before[metric]))
        if len(values) > 1:
            rows.append(Row(f"{name}: {metric}, sd of {len(values)}", stdev(values), metric))
    return rows


if __name__ == "__main__":
    main()
