"""Turning hidden states by orthogonal matrices that neighbours absorb, so that outliers spread.

A vector whose few large channels set its grid is rounded better after a rotation R (QuaRot,
Ashkboos et al. 2024, arXiv 2404.00456; SpinQuant, Liu et al. 2024, 2405.16406). Two places take one
exactly and leave nothing to compute when the model runs:

    the residual stream   what writes it gives x R (embeddings, outputs of attention and MLP); a
                          norm that reads it loses its gain g to what is behind: W' = W diag(g) R
    a head's values       W_v' = R^T W_v, and the output layer's columns of that head W_o' = W_o R

RMSNorm lets every R pass. LayerNorm lets those pass that keep the vector of ones, since its mean
and variance then stay what they are; its bias b becomes R^T (b / g). A head tied to the embedding
is untied, because the last norm's gain goes into it alone. Down projections, whose input no
rotation passes, stay as they are: nothing of this is done while the model runs.

    found = stream(model)                where the residual flows, or why it cannot be turned
    rotate_stream_(model, found, turn)   in place
    rotate_values_(model, seed)          in place; names of the layers that read turned values
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zotune.quant.calibrate.families import Row, flow, rows
from zotune.quant.calibrate.folding import config_of, prefixes
from zotune.quant.linear import matrix
from zotune.quant.model import float_layers


@dataclass(frozen=True)
class Stream:
    """The residual stream of a model by names. norms: each with the layers that read it; the last
    one is read by the head. centred: whether they subtract the mean."""

    tables: tuple[str, ...]
    writers: tuple[str, ...]
    norms: tuple[tuple[str, tuple[str, ...]], ...]
    head: str
    centred: bool

    @property
    def readers(self) -> tuple[str, ...]:
        return tuple(name for _, targets in self.norms for name in targets)


def rotation(size: int, seed: int = 0, keeps_ones: bool = False) -> Tensor:
    """A random orthogonal matrix (size, size), float64: signs times a Hadamard matrix of the
    largest power of two in `size`, beside a dense one of what is left (Kronecker product).

    keeps_ones: whether the vector of ones stays where it is.

    >>> turn = rotation(12, seed=3)
    >>> bool(torch.allclose(turn @ turn.T, torch.eye(12, dtype=torch.float64)))
    True
    >>> bool(torch.allclose(rotation(5, keeps_ones=True).sum(0), torch.ones(5).double()))
    True
    """
    if keeps_ones:
        # A mirror takes the first axis to the ones; what is orthogonal to them turns freely.
        mirror, turn = torch.eye(size).double(), torch.eye(size).double()
        if size > 1:
            axis = mirror[0] - size**-0.5
            mirror -= 2 * torch.outer(axis, axis) / axis.square().sum()
            turn[1:, 1:] = rotation(size - 1, seed)
        return mirror @ turn @ mirror
    words = np.random.Generator(np.random.Philox(key=np.array([seed, size], np.uint64)))
    power = size & -size
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < power:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), hadamard)
    signs = torch.from_numpy(words.integers(0, 2, size)).double() * 2 - 1
    dense = torch.from_numpy(words.standard_normal((size // power, size // power)))
    rest = torch.linalg.qr(dense).Q.contiguous() if size > power else torch.ones_like(dense)
    return signs.unsqueeze(1) * torch.kron(hadamard / power**0.5, rest)


def stream(model: nn.Module) -> Stream | str:
    """Where the residual stream of a model flows; or why it cannot be turned."""
    config, modules = config_of(model), dict(model.named_modules())
    table = flow(config)
    if isinstance(table, str):
        return table
    blocks = list(prefixes(modules, table.writers))
    writers = tuple(block + name for block in blocks for name in table.writers)
    norms = [
        (prefix + row.source, tuple(prefix + target for target in row.targets))
        for row in rows(config)
        if isinstance(row, Row) and not row.heads
        for prefix in prefixes(modules, row.targets)
        if modules[prefix + row.source].get_parameter("weight").dim() == 1
    ]
    last = [n for n in modules if n == table.last or n.endswith(f".{table.last}")]
    head = next((n for n, m in modules.items() if m is _head(model)), None)
    if len(last) != 1 or head is None:
        return "the output layer behind the last norm is not known"
    norms.append((last[0], (head,)))
    tables = tuple(n for n, m in modules.items() if isinstance(m, nn.Embedding))
    found = Stream(tables, writers, tuple(norms), head, _centred(modules, norms))
    return _obstacle(model, found, table.tables) or found


def _head(model: nn.Module) -> Any:
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return output if output is not None else getattr(model, "score", model)


def _centred(modules: dict[str, nn.Module], norms: list[tuple[str, tuple[str, ...]]]) -> bool:
    return any(isinstance(modules[name], nn.LayerNorm) for name, _ in norms)


def _obstacle(model: nn.Module, found: Stream, tables: tuple[str, ...]) -> str | None:
    """Why a stream cannot be turned: something touches it in an unknown way."""
    linears = {name for name, _ in float_layers(model)}
    known = {*found.writers, *found.readers}
    for name in (*linears, *found.tables):
        if not bool(model.get_submodule(name).get_parameter("weight").isfinite().all()):
            return f"{name!r} has weights that are not finite, which a rotation would spread"
    if linears != known:
        return f"{min(linears ^ known)!r} is no float layer of a known place"
    if not found.tables or {n.rsplit(".")[-1] for n in found.tables} != set(tables):
        return f"its embeddings are {found.tables}, not {tables}"
    for name, _ in found.norms:
        norm: Any = model.get_submodule(name)
        if isinstance(norm, nn.LayerNorm) != found.centred or "Norm" not in type(norm).__name__:
            return f"{name!r} is another norm than those before"
        bias = getattr(norm, "bias", None)
        if bias is not None and bool(bias[norm.weight == 0].any()):
            return f"{name!r} has a bias where its gain is 0"
    return None


@torch.no_grad()
def rotate_stream_(model: nn.Module, found: Stream, turn: Tensor) -> None:
    """Give the residual stream's vectors as x R from now on; the model computes the same function.

    Args:
        turn: R, orthogonal, float64; one that keeps the ones where norms are centred.
    """
    _untie_(model, found.head)
    for name, readers in found.norms:
        norm: Any = model.get_submodule(name)
        gain = norm.weight.detach().double()
        for reader in readers:
            columns = matrix(model.get_submodule(reader))  # type: ignore[arg-type]
            columns.copy_((columns.double() * gain) @ turn)
        if getattr(norm, "bias", None) is not None:
            share = torch.where(gain == 0, 0.0, norm.bias.double() / gain)
            norm.bias.copy_(share @ turn)
        norm.weight.fill_(1.0)
    for name in found.tables:
        table = model.get_submodule(name).get_parameter("weight")
        table.copy_(table.double() @ turn)
    for name in found.writers:
        layer: Any = model.get_submodule(name)
        matrix(layer).copy_(turn.t() @ matrix(layer).double())
        if layer.bias is not None:
            layer.bias.copy_(layer.bias.double() @ turn)


def _untie_(model: nn.Module, head: str) -> None:
    """Give the output layer a weight of its own."""
    layer: Any = model.get_submodule(head)
    if not any(p is layer.weight for n, p in model.named_parameters() if not n.startswith(head)):
        return
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "tie_word_embeddings"):
            module.config.tie_word_embeddings = False  # type: ignore[union-attr]


@torch.no_grad()
def rotate_values_(model: nn.Module, seed: int = 0) -> list[str]:
    """Turn every head's values, all by one matrix; the model computes the same function.

    Returns:
        names of the layers that read turned values.
    """
    config, modules = config_of(model), dict(model.named_modules())
    floats, done = dict(float_layers(model)), []
    for row in rows(config):
        if not isinstance(row, Row) or not row.heads:
            continue
        for prefix in prefixes(modules, row.targets):
            value, out = prefix + row.source, prefix + row.targets[0]
            if value in floats and out in floats:
                _turn_heads_(floats[value], floats[out], row, config, seed)
                done.append(out)
    return done


def _turn_heads_(value: Any, out: Any, row: Row, config: Any, seed: int) -> None:
    (k, n), outputs = row.part, matrix(value).shape[0]
    own = slice(k * outputs // n, (k + 1) * outputs // n)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = (own.stop - own.start) // heads
    turn = rotation(width, seed)
    weight = matrix(value)[own]
    weight.copy_((turn.t() @ weight.double().view(heads, width, -1)).flatten(0, 1))
    if value.bias is not None:
        bias = value.bias.detach()[own]
        bias.copy_((bias.double().view(heads, width) @ turn).flatten())
    columns = matrix(out)
    columns.copy_((columns.double().reshape(len(columns), -1, width) @ turn).flatten(1))
