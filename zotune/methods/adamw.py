"""AdamW with exact gradients: the backprop baseline."""

from zotune.core.backprop import Backprop
from zotune.core.method import Decay, Schedule
from zotune.methods import FLOATS, method


@method(
    paper="Decoupled Weight Decay Regularization",
    year=2019,
    arxiv="1711.05101",
    spaces=FLOATS,
    memory="activations + 16 bytes per tuned element (leaf, gradient, two moments)",
)
def adamw(
    lr: float = 3e-5,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    schedule: Decay = "linear",
    warmup: int = 0,
) -> Backprop:
    """torch.optim.AdamW on any float space, by backpropagation (Loshchilov & Hutter 2019).

        m = mean_b1 g,  v = mean_b2 g^2,  theta <- theta - lr (m / (sqrt v + 1e-8) + wd theta)

    Gradients are first clipped to the norm `clip` (0: never).

    >>> adamw().forwards
    1
    """
    return Backprop("adamw", lr, b1, b2, weight_decay, clip, Schedule(schedule, warmup))
