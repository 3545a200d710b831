"""The linear layers of a model."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from zotune.quant.linear import QuantLinear, is_conv1d


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of every linear layer but the output embedding, in the model's order.

    Counts nn.Linear, transformers' Conv1D and QuantLinear. A classifier's head is a linear layer
    like any other.

    >>> [name for name, _ in linears(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))]
    ['0']
    """
    heads = {id(head) for head in output_embeddings(model)}
    for name, module in model.named_modules():
        linear = isinstance(module, (nn.Linear, QuantLinear)) or is_conv1d(module)
        if linear and id(module) not in heads:
            yield name, module


def output_embeddings(model: nn.Module) -> list[nn.Module]:
    """The modules that turn hidden states into token logits, `lm_head` as a rule."""
    found = [m for n, m in model.named_modules() if n == "lm_head" or n.endswith(".lm_head")]
    for module in model.modules():
        get = getattr(module, "get_output_embeddings", None)
        head = get() if callable(get) else None
        if isinstance(head, nn.Module):
            found.append(head)
    return found
