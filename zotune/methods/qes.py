"""QES: evolution strategies on integer codes, with what rounding loses carried on."""

from dataclasses import dataclass

from torch import Tensor

from zotune.core import noise
from zotune.core.block import Block, CodeBlock
from zotune.core.estimator import Estimate, Estimator
from zotune.core.feedback import ErrorFeedback, Residual
from zotune.core.method import Decay, Method, Schedule
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian, Perturbation
from zotune.core.probe import Losses, Probe
from zotune.core.space import Space
from zotune.errors import BadInput
from zotune.methods import method


@dataclass(frozen=True)
class Population(Estimator):
    """2 queries members in antithetic pairs, W + u_j and W - u_j, fitness normalised over all:

        c_j = (l_j+ - l_j-) / (2 eps std l)

    >>> Population(eps=0.5).tell(Key(0), Losses.of([3.0, 1.0])).coefficients
    (2.0,)
    """

    @property
    def forwards(self) -> int:
        return 2 * self.queries

    def ask(self, key: Key) -> list[Probe]:
        return [Probe(k, step) for k in self.keys(key, self.queries) for step in (1.0, -1.0)]

    def tell(self, key: Key, losses: Losses) -> Estimate:
        pairs = losses.mean.view(self.queries, 2)
        spread = float(pairs.std(correction=0))
        slopes = (pairs[:, 0] - pairs[:, 1]) / (2 * self.eps)
        return self._estimate(key, slopes / spread if spread else slopes, pairs.mean())


@dataclass(frozen=True)
class WholeSteps(Perturbation):
    """u = floor(sigma z) + Bernoulli(frac(sigma z)), z ~ N(0, I): whole codes, most of them 0.

    P(u != 0) = sigma sqrt(2 / pi) for small sigma, which is also the variance.
    """

    sigma: float = 0.01

    def check(self, space: Space) -> None:
        for block in space:
            if not isinstance(block, CodeBlock):
                raise BadInput(f"qes moves whole codes and {block.name!r} has none; use 'codes'")
            if block.reach != 1.0 or block.stride != 1.0:
                raise BadInput(f"{block.name!r} has its own eps or lr; in qes all codes share one")

    def draw(self, key: Key, block: Block, start: int = 0, stop: int | None = None) -> Tensor:
        z = Gaussian().draw(key, block, start, stop)
        low = start * (block.numel // max(block.rows, 1))
        name = f"{block.name}#round"
        chance = noise.draw("uniform", key, name, low, low + z.numel(), block.device)
        return z.mul_(self.sigma).add_(chance.mul_(0.5).add_(0.5).view_as(z)).floor_()


@method(
    paper="Quantized Evolution Strategies: High-precision Fine-tuning of Quantized LLMs at "
    "Low-precision Cost",
    year=2026,
    arxiv="2602.03120",
    spaces=("codes",),
    memory="residual='stored': 4 bytes per code; 'rebuilt': none, `window` x the noise per step",
)
def qes(
    lr: float = 0.025,
    eps: float = 0.01,
    gamma: float = 0.9,
    residual: Residual = "stored",
    window: int = 50,
    queries: int = 25,
    schedule: Decay = "constant",
    warmup: int = 0,
) -> Method:
    """Evolution strategies whose steps of less than a code add up until they are one.

        u_j = floor(eps z_j) + Bernoulli(frac(eps z_j)),  l_j+- = L(W +- u_j)
        g = mean_j (l_j+ - l_j-) / (2 eps std l) u_j,  over `queries` pairs
        v = lr g + gamma e,  D = gate(round(v)),  W <- W - D,  e <- v - D

    residual="stored" keeps e. "rebuilt" draws the last `window` steps again from the journal, as
    the paper does: 2 queries (window + 1) numbers per code and step. lr and eps count codes.

    Defaults: the release's for a 1.5B model in INT4; its lr 5e-4 lacks the mean over 50 members.
    Changed: antithetic members share one rounding; a probe clamps what the paper's gate holds,
    which differs for |u| > 1 only; e starts at 0 and is not clamped.

    >>> qes(queries=4).forwards
    8
    """
    if residual == "rebuilt" and (schedule != "constant" or warmup):
        raise BadInput(
            "a rebuilt residual takes today's lr for the past: use schedule='constant' and "
            "warmup=0, or residual='stored'"
        )
    return Method(
        "qes", Population(eps, queries), WholeSteps(eps), ErrorFeedback(gamma, residual, window),
        lr=lr, schedule=Schedule(schedule, warmup),
    )  # fmt: skip
