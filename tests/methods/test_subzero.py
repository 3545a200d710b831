"""SubZero: the paper's update, ||u||^2 = m n, and bases that are made once.

Run: pytest tests/methods/test_subzero.py
"""

from __future__ import annotations

import pytest
import torch
from restated import Restated
from torch import Tensor
from toys import float_block

from zotune import methods
from zotune.core import noise, orthogonal
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.errors import BadInput
from zotune.methods.subzero import RandomSubspace

STEPS, RANK, T0 = 20, 4, 6


def haar(key: Key, name: str, size: int, rank: int) -> Tensor:
    """Gram-Schmidt of a Gaussian matrix's columns: QR with R's diagonal positive."""
    drawn = noise.draw("gaussian", key, name, 0, size * rank).double().view(size, rank)
    columns: list[Tensor] = []
    for column in drawn.unbind(1):
        for _ in range(2):
            column = column - sum((c * (c @ column) for c in columns), torch.zeros(size).double())
        columns.append(column / column.norm())
    return torch.stack(columns, 1)


@pytest.mark.parametrize("queries", [1, 2])
def test_twenty_steps_are_the_formula_in_float64(queries: int) -> None:
    lr, eps = 0.02, 1e-3
    paper = Restated("weights")
    r = {n: min(RANK, *b.shape) for n, b in paper.blocks.items() if len(b.shape) == 2}
    assert set(r.values()) == {RANK, 3}
    for t in range(STEPS):
        now = Key(paper.seed, step=t // T0)
        keys = [paper.key(t, j) for j in range(queries)]
        step = {n: torch.zeros(b.shape).double() for n, b in paper.blocks.items()}
        for key in keys:
            u = paper.direction(Gaussian(), key)
            for n, k in r.items():
                m, w = paper.blocks[n].shape
                Z = noise.draw("gaussian", key, f"{n}#z", 0, k * k).double().view(k, k)
                U, V = haar(now, f"{n}#left", m, k), haar(now, f"{n}#right", w, k)
                u[n] = U @ Z @ V.mT * (m * w / k**2) ** 0.5
            c = (paper.loss(t, u, eps) - paper.loss(t, u, -eps)) / (2 * eps)
            step = {n: step[n] + c / queries * u[n] for n in u}
        paper.move_(step, -lr)
    method = methods.get("subzero", lr=lr, eps=eps, rank=RANK, refresh=T0, queries=queries)
    tuner = paper.tune(method, STEPS)
    assert paper.apart() < 1e-5
    kept = sum(4 * k * sum(paper.blocks[n].shape) + 32 for n, k in r.items())
    assert tuner.kept_bytes == kept


@pytest.mark.parametrize("shape", [(12, 20), (20, 3), (2, 30)])
def test_the_squared_length_is_the_number_of_weights_in_the_mean(shape: tuple[int, int]) -> None:
    law, block = RandomSubspace(rank=4, refresh=1), float_block("w", *shape)
    found = torch.stack([law.draw(Key(1, step=t), block).double() for t in range(1500)])
    squared = found.square().sum((1, 2))
    wanted = shape[0] * shape[1]
    assert abs(float(squared.mean()) - wanted) < 4 * float(squared.std()) / len(squared) ** 0.5
    # And E[u u^T] = I: the bases prefer no row, no column and no pair of elements.
    u = found.flatten(1)[:, :60]
    product = u.unsqueeze(2) * u.unsqueeze(1)
    error = product.std(0) / len(u) ** 0.5
    assert bool(((product.mean(0) - torch.eye(u.shape[1])).abs() < 5 * error).all())


def test_a_basis_is_made_once_an_epoch_and_is_a_function_of_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    law, block, bare = RandomSubspace(4, 5), float_block("w", 9, 7), float_block("w", 9, 7)
    block.memory.update(law.state(block))
    made: list[Key] = []
    own = orthogonal.orthonormal

    def counted(key: Key, *args: object) -> Tensor:
        made.append(key)
        return own(key, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(orthogonal, "orthonormal", counted)
    keys = [Key(1, step=t, query=j) for t in (0, 1, 4, 5, 9, 2, 2) for j in range(3)]
    drawn = [law.draw(key, block) for key in keys]
    assert [key.step for key in made] == [0, 0, 1, 1, 0, 0]  # two bases an epoch
    for key, u in zip(keys, drawn, strict=True):
        assert torch.equal(u, law.draw(key, bare))
    assert not torch.equal(law.draw(Key(2), block), law.draw(Key(1), block))
    assert torch.equal(law.draw(Key(2), block), law.draw(Key(2), bare))


@pytest.mark.parametrize("options", [{"rank": 0}, {"refresh": 0}])
def test_what_it_cannot_do_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(BadInput, match="want"):
        methods.get("subzero", **options)
