"""PeZO-style directions: few uniform numbers read many times instead of Gaussians.

A reconstruction from the paper's abstract: its formulas could not be read.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from zotune.core import noise
from zotune.core.block import Block
from zotune.core.estimator import TwoSided
from zotune.core.method import Decay, Method, Schedule, Units
from zotune.core.noise import Key
from zotune.core.registers import cycle
from zotune.core.reuse import Pointer, Reused, run
from zotune.errors import BadInput
from zotune.methods import FLOATS, method


@dataclass(frozen=True)
class Pool(Reused):
    """u_i = a p_((i + offset) mod P): p uniforms less their mean, a = sqrt(P) / ||p||.

    A restart draws an offset for each tensor. Weights i and i + P share a number.
    """

    def ticks(self, count: int) -> int:
        return count

    def streams(self, sizes: list[int]) -> list[int]:
        return sizes if self.pointer == "restart" else [sum(sizes)]

    def read(self, key: Key, block: Block, low: int, high: int, total: int) -> Tensor:
        pool = _pool(key.seed, self.period)
        scaled = pool * self.scale(float(pool.square().mean()))
        offset = low + self.begin(key, f"{block.name}#pool", total)
        return run(scaled.to(block.device), offset, high - low)


@lru_cache(maxsize=8)
def _pool(seed: int, size: int) -> Tensor:
    uniforms = noise.draw("uniform", Key(seed), "#pool", 0, size)
    return uniforms - uniforms.mean()


@dataclass(frozen=True)
class Lfsr(Reused):
    """u_i is the word of shift register i mod n after i // n ticks; the n are P / n ticks apart.

    A word w stands for x = 2 (w - 2^(bits-1)) / P and u = x sqrt(d) / ||x||, whose factor follows
    from the state at the direction's start and sums of squares along the cycle. All passes of a
    step start from that state; a restart loads another one. Numbers n apart correlate by a half.
    """

    registers: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.registers <= self.period:
            raise BadInput(
                f"registers={self.registers}; want 1..{self.period}, the period at {self.bits} bits"
            )

    def ticks(self, count: int) -> int:
        return -(-count // self.registers)

    def streams(self, sizes: list[int]) -> list[int]:
        return [sum(sizes)]

    def read(self, key: Key, block: Block, low: int, high: int, total: int) -> Tensor:
        n, x = self.registers, cycle(self.bits)[0].to(block.device)
        first, last = low // n, -(-high // n)
        rows = [run(x, s + first, last - first) for s in self.heads(key, total)]
        u = torch.stack(rows, dim=1).flatten()[low - first * n : high - first * n]
        return u * self.scale(self.energy(key, total) / total)

    def heads(self, key: Key, total: int) -> list[int]:
        """Where in the cycle each register stands when a direction begins."""
        begin, n = self.begin(key, "#registers", total), self.registers
        return [(begin + r * self.period // n) % self.period for r in range(n)]

    def energy(self, key: Key, total: int) -> float:
        """||x||^2 of a whole direction."""
        sums = cycle(self.bits)[1]
        found = 0.0
        for r, head in enumerate(self.heads(key, total)):
            turns, rest = divmod(self.ticks(total - r), self.period)
            found += turns * float(sums[self.period]) + float(sums[head + rest] - sums[head])
        return found


@method(
    paper="Perturbation-efficient Zeroth-order Optimization for Hardware-friendly On-device "
    "Training (reconstruction)",
    year=2025,
    arxiv="2504.20314",
    spaces=FLOATS,
    memory="16 bytes per tensor, beside one table of at most 20 (2^bits - 1) bytes",
)
def pezo(
    lr: float = 1e-6,
    eps: float = 1e-3,
    source: Literal["pool", "lfsr"] = "pool",
    bits: int = 13,
    pointer: Pointer = "restart",
    registers: int = 32,
    power_of_two: bool = False,
    queries: int = 1,
    weight_decay: float = 0.0,
    schedule: Decay = "constant",
    warmup: int = 0,
    units: Units = "absolute",
) -> Method:
    """MeZO along directions that reuse 2^bits - 1 uniform numbers (PeZO-style, a reconstruction).

        c = (L(theta + eps u) - L(theta - eps u)) / (2 eps),  theta <- theta - lr (c u + wd theta)

    `source` of u: "pool" reads stored uniforms, "lfsr" as many words of `registers` shift
    registers. `pointer`: u begins at a random place ("restart": one number per tensor of a pool,
    one for all registers), or where the last one ended ("continue": none). `power_of_two` rounds
    the pool's factor 1.73 to 2: eps acts as 1.15 eps, lr as 1.33 lr.

    Weights that share a number move together for ever: a continuing pointer leaves 2^bits - 1
    dimensions to train in, a restarted pool as many in each tensor.

    Defaults: MeZO's lr and eps; the others are ours, no number was readable. 2^13 - 1 is prime: a
    continuing pointer comes round after 2^bits - 1 directions, or a divisor of it (see `notes`).

    >>> pezo(source="lfsr", bits=16).perturbation.period
    65535
    """
    if source not in ("pool", "lfsr"):
        raise BadInput(f"source={source!r}; want 'pool' or 'lfsr'")
    law: Reused = Pool(bits, pointer, power_of_two, queries)
    if source == "lfsr":
        law = Lfsr(bits, pointer, power_of_two, queries, registers)
    return Method(
        "pezo",
        TwoSided(eps, queries),
        law,
        lr=lr,
        schedule=Schedule(schedule, warmup),
        weight_decay=weight_decay,
        units=units,
    )
