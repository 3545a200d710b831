"""P-RGE: many directions of a frozen-A adapter's B, from both sides, in one batched forward."""

from zotune.core.estimator import estimator
from zotune.core.method import Decay, Method, Schedule, Units
from zotune.core.perturbation import Gaussian
from zotune.methods import method


@method(
    paper="MobiZO: Enabling Efficient LLM Fine-Tuning at the Edge via Inference Engines (P-RGE)",
    year=2024,
    arxiv="2409.15520",
    spaces=("adapter", "lora"),
    memory="none",
)
def p_rge(
    lr: float = 1e-2,
    eps: float = 1e-2,
    queries: int = 1,
    schedule: Decay = "constant",
    warmup: int = 0,
    directions: str = "example",
    units: Units = "relative",
) -> Method:
    """Directions and signs side by side along the batch, over one frozen A (Gao et al. 2024).

        y_p = W x_p + (A x_p) (B + s_p eps u_p)^T for all probes p = (direction, sign) at once
        B <- B - lr mean_p c_p u_p,  c_p = (l_p+ - l_p-) / (2 eps)

    The paper's space is lora(freeze_a=True), random A; "adapter" has A on the leading directions
    of a layer's inputs. W and A serve all probes in one product. `directions`: "example" splits
    the batch among the directions, one example each (the release's `split` at its finest);
    "batch" repeats the whole batch for each of `queries` directions, as in its scripts, which
    keep examples times directions at 16.

    Defaults: ours, in the adapters' units; the scripts' are p_rge(lr=5e-5, eps=1e-2, queries=4,
    directions="batch", units="absolute") with batches of 4 on
    lora(rank=16, alpha=32, targets=None, freeze_a=True). Changed: both signs share one copy of B,
    which is stored once and never written by a probe.

    >>> p_rge(queries=4, directions="batch").forwards
    8
    """
    return Method(
        "p-rge",
        estimator(directions, eps, queries),
        Gaussian(),
        lr=lr,
        schedule=Schedule(schedule, warmup),
        units=units,
    )
