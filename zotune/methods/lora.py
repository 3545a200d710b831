"""LoRA with exact gradients: the backprop baseline at adapter memory."""

from zotune.core.backprop import Backprop
from zotune.core.method import Decay, Schedule
from zotune.methods import method


@method(
    paper="LoRA: Low-Rank Adaptation of Large Language Models",
    year=2021,
    arxiv="2106.09685",
    spaces=("lora", "adapter"),
    memory="activations + 16 bytes per adapter element",
)
def lora(
    lr: float = 2e-4, weight_decay: float = 0.0, schedule: Decay = "linear", warmup: int = 0
) -> Backprop:
    """AdamW on LoRA adapters over a frozen base (Hu et al. 2021); over int4 it is QLoRA's idea.

    >>> lora().name
    'lora'
    """
    return Backprop("lora", lr, weight_decay=weight_decay, schedule=Schedule(schedule, warmup))
