"""DiZO: MeZO, with now and then a few steps on how far each layer lies from where it started."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from zotune.core.block import Block, FloatBlock, part
from zotune.core.estimator import TwoSided
from zotune.core.method import Decay, Interlude, Method, Schedule, Units
from zotune.core.noise import Key
from zotune.core.rule import Grads, Rule
from zotune.core.space import Space, matching
from zotune.core.subspace import Subspace
from zotune.errors import BadInput
from zotune.methods import method

ATTENTION = r"(^|\.)(k|v|key|value|qkv|query_key_value|c_attn|Wqkv)(_proj|_lin)?\.weight$"
"""Keys and values, or the layer that holds them: OPT, Llama, GPT-2, BERT, NeoX, ModernBERT."""


@dataclass(frozen=True)
class Distances(Subspace):
    """u = z (theta - anchor), one z ~ clip(N(0, 1), -limit, limit) per block; anchor: its start.

    Blocks that `targets` matches move: if None, keys and values, or all matrices of layers where
    no name tells. `steps` such steps come behind `every` of another law's.
    """

    every: int = 50
    steps: int = 10
    limit: float = 2.0
    targets: str | None = None

    def check(self, space: Space) -> None:
        if any(b.exact for b in space):
            raise BadInput("steps on distances have no use for exact gradients; drop exact=True")
        self.chosen(space)

    def notes(self, space: Space) -> list[str]:
        chosen = self.chosen(space)
        return [f"distances of {len(chosen)} blocks are learned, such as {chosen[0]}"]

    def chosen(self, space: Space) -> list[str]:
        blocks = {b.name: b for b in space.probed if isinstance(b, FloatBlock) and b.shape}
        if self.targets is not None:
            return list(filter(matching(blocks, self.targets), blocks))
        found = [n for n in blocks if re.search(ATTENTION, n)]
        found = found or [n for n, b in blocks.items() if b.decay]
        if not found:
            raise BadInput("no matrix whose distance could be learned; use 'weights', or mezo")
        return found

    def states(self, space: Space) -> dict[str, dict[str, Tensor]]:
        chosen = self.chosen(space)
        return {b.name: {"anchor": b.state().clone()} if b.name in chosen else {} for b in space}

    def inner(self, block: Block) -> tuple[int, ...]:
        return (1,) if "anchor" in block.memory else (0,)

    def draw_inner(self, key: Key, block: Block) -> Tensor:
        return super().draw_inner(key, block).clamp_(-self.limit, self.limit)

    def expand(
        self, z: Tensor, key: Key, block: Block, start: int = 0, stop: int | None = None
    ) -> Tensor:
        stop = block.rows if stop is None else stop
        if not len(z):
            return torch.zeros((stop - start, *block.shape[1:]), device=block.device)
        theta, anchor = block.state()[start:stop], block.memory["anchor"][start:stop]
        wide = torch.promote_types(theta.dtype, torch.float32)
        away = (theta.to(wide) - anchor.to(wide)).float()
        return z * away / part(block.reach, start, stop, block.rows)

    def carry(self, z: Tensor, block: Block, old: Key, new: Key) -> Tensor:
        """Ratios count from where this run of steps began."""
        period = self.every + self.steps
        same = old.step // period == new.step // period and old.step % period >= self.every
        return z if same else torch.ones_like(z)


@dataclass(frozen=True)
class Ratio(Rule):
    """rho <- clip(rho (1 - lr g), 1 - tau, 1 + tau), with the step that takes theta there."""

    tau: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.tau < 1:
            raise BadInput(f"tau={self.tau}; want 0 < tau < 1")

    def state(self, block: Block, shape: tuple[int, ...]) -> dict[str, Tensor]:
        return {"ratio": torch.ones(shape, device=block.device)}

    def step(
        self, grads: Grads, state: dict[str, Tensor], t: int, lr: float, block: Block, start: int
    ) -> Tensor:
        # A ratio is not measured in its block's own eps and lr.
        before, g = state["ratio"].clone(), grads(0) * block.eps_ratio
        after = (before * (1 - lr * g)).clamp_(1 - self.tau, 1 + self.tau)
        state["ratio"].copy_(after)
        return (1 - after / before) * (block.eps_ratio / block.lr_ratio)


@method(
    paper="Harmony in Divergence: Towards Fast, Accurate, and Memory-efficient Zeroth-order LLM "
    "Fine-tuning",
    year=2025,
    arxiv="2502.03304",
    spaces=("weights", "latents"),
    memory="one copy of the projected weights, 4 bytes for each",
)
def dizo(
    lr: float = 1e-6,
    eps: float = 1e-3,
    every: int = 50,
    steps: int = 10,
    tau: float = 0.2,
    ratio_lr: float = 2.0,
    ratio_eps: float = 0.1,
    targets: str | None = None,
    queries: int = 1,
    weight_decay: float = 0.0,
    schedule: Decay = "constant",
    warmup: int = 0,
    units: Units = "absolute",
) -> Method:
    """MeZO steps; behind every `every` come `steps` on the layers' distances (Tan et al. 2025).

        theta <- theta - lr c u,  as MeZO
        c = (L(theta(+)) - L(theta(-))) / (2 ratio_eps),  z_l ~ clip(N(0, 1), -+tau / ratio_eps)
        theta_l(+-) = theta0_l + (1 +- ratio_eps z_l) (theta_l - theta0_l)
        rho_l <- clip(rho_l (1 - ratio_lr c z_l), 1 - tau, 1 + tau),  rho_l = 1 at first
        theta_l <- theta0_l + (rho_l / rho_l before) (theta_l - theta0_l)

    Layers l: weights whose name `targets` matches, by default keys and values. Defaults are the
    released code's. Changed: it probes distances by absolute amounts; ours are ratios, so ratio_lr
    counts otherwise; and only what is rescaled has a copy.

    >>> dizo().at(50).name, dizo().at(60).name
    ('dizo-distances', 'dizo')
    """
    sides = TwoSided(ratio_eps, queries)
    law = Distances(every, steps, tau / ratio_eps, targets)
    inner = Method("dizo-distances", sides, law, Ratio(tau), lr=ratio_lr, units=units)
    return Method(
        "dizo", TwoSided(eps, queries), lr=lr, schedule=Schedule(schedule, warmup),
        weight_decay=weight_decay, units=units, interlude=Interlude(every, steps, inner),
    )  # fmt: skip
