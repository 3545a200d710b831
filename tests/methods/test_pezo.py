"""PeZO-style directions against generators written out by hand.

Run: pytest tests/methods/test_pezo.py
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from restated import Restated
from torch import Tensor
from toys import batch, cross_entropy, float_block, small

from zotune import methods
from zotune.core import noise, spaces
from zotune.core.estimator import TwoSided
from zotune.core.evaluator import TorchEvaluator
from zotune.core.method import Method
from zotune.core.noise import Key
from zotune.core.registers import TAPS
from zotune.core.reuse import Reused
from zotune.core.space import Space, tensors
from zotune.core.step import Tuner
from zotune.errors import BadInput
from zotune.methods.pezo import Lfsr, Pool

SHAPES: dict[str, tuple[int, ...]] = {"a": (7, 5), "b": (), "c": (40,), "d": (3, 4, 2)}
COUNT = 35 + 1 + 40 + 24
LAWS: list[Reused] = [
    kind(bits=6, pointer=pointer, power_of_two=two, queries=2)
    for kind in (Pool, Lfsr)
    for pointer in ("restart", "continue")
    for two in (False, True)
]
LAWS.append(Lfsr(bits=5, registers=3))


def space_of(law: Reused) -> Space:
    """Four tensors that know where they lie."""
    space = tensors({name: torch.zeros(shape) for name, shape in SHAPES.items()})
    law.check(space)
    for block in space:
        block.memory.update(law.states(space)[block.name])
    return space


def whole(law: Reused, key: Key) -> Tensor:
    """All numbers of a direction in a row."""
    return torch.cat([law.draw(key, block).flatten() for block in space_of(law)])


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_rows_lanes_and_passes_are_the_same_numbers(law: Reused) -> None:
    for block in space_of(law):
        for key in (Key(1), Key(1, step=5, query=1)):
            u = law.draw(key, block)
            assert u.shape == block.shape
            assert torch.equal(u, law.draw(key, block))
            assert torch.equal(law.draw_lanes([key, key.fold(lane=1)], block)[0], u)
            if block.shape:
                cut = block.rows // 2
                rows = [law.draw(key, block, 0, cut), law.draw(key, block, cut, block.rows)]
                assert torch.equal(torch.cat(rows), u)
                g = law.combine([key, key.fold(query=7)], [2.0, -1.0], block, 1, cut)
                assert torch.equal(g, 2 * u[1:cut] - law.draw(key.fold(query=7), block, 1, cut))


def test_a_continuing_pool_reads_on_where_the_last_direction_ended() -> None:
    law, period = Pool(bits=5, pointer="continue", queries=2), 31
    p = noise.draw("uniform", Key(9), "#pool", 0, period).double()
    p = p - p.mean()
    a = math.sqrt(period) / float(p.norm())
    for direction in range(6):
        wanted = [a * float(p[(i + direction * COUNT) % period]) for i in range(COUNT)]
        found = whole(law, Key(9, step=direction // 2, query=direction % 2))
        assert found.tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_a_restarted_pool_reads_each_tensor_from_an_offset_of_its_own() -> None:
    law, period = Pool(bits=5), 31
    (one,) = tensors({"w": torch.zeros(period)})
    pool = law.draw(Key(9), one)
    offsets = set()
    for block in space_of(law):
        for t in range(40):
            u = law.draw(Key(9, step=t), block).flatten()
            matching = [k for k in range(period)
                        if torch.equal(u, pool.repeat(4)[k : k + len(u)])]  # fmt: skip
            assert len(matching) == 1
            offsets.add((block.name, t, matching[0]))
    counts = torch.bincount(torch.tensor([k for _, _, k in offsets]), minlength=period)
    assert int((counts > 0).sum()) > 25  # 160 draws of 31 places leave none out but by chance
    assert len({tuple(k for n, _, k in sorted(offsets) if n == name) for name in "abcd"}) == 4


@pytest.mark.parametrize(("registers", "bits"), [(1, 5), (3, 5), (4, 7), (32, 12)])
def test_registers_tick_on_from_step_to_step_bit_for_bit(registers: int, bits: int) -> None:
    law = Lfsr(bits, "continue", registers=registers)
    period, mask = 2**bits - 1, 2**bits - 1

    def tick(word: int, times: int = 1) -> int:
        for _ in range(times):
            parity = sum(word >> (k - 1) & 1 for k in TAPS[bits]) % 2
            word = (word << 1 | parity) & mask
        return word

    state = [tick(1, r * period // registers) for r in range(registers)]
    for step in range(3):
        words = []
        for _ in range(-(-COUNT // registers)):
            words += state
            state = [tick(word) for word in state]
        x = 2 * (torch.tensor(words[:COUNT]).double() - 2 ** (bits - 1)) / period
        u = whole(law, Key(0, step=step))
        assert float(u.double().norm()) == pytest.approx(math.sqrt(COUNT), rel=1e-6)
        assert torch.allclose(u.double(), x * math.sqrt(COUNT) / x.norm(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("law", [Pool(), Pool(pointer="continue"), Lfsr(), Lfsr(bits=16)], ids=repr)
def test_the_norm_is_that_of_a_gaussian_and_the_mean_is_zero(law: Reused) -> None:
    block = float_block("w", 300, 500)
    u = law.draw(Key(3), block).double()
    assert abs(float(u.norm()) / math.sqrt(u.numel()) - 1) < 0.01
    first = u.flatten()[: law.period]
    if isinstance(law, Pool):
        assert abs(float(first.mean())) < 1e-7
        assert torch.equal(u.flatten()[law.period :], u.flatten()[: -law.period])  # tied


def test_a_power_of_two_is_the_one_next_to_the_factor() -> None:
    block = float_block("w", 8191)
    ratio = Pool(power_of_two=True).draw(Key(3), block) / Pool().draw(Key(3), block)
    assert float(ratio.mean()) == pytest.approx(2 / math.sqrt(3), rel=0.01)  # eps x 1.155
    x = Lfsr(power_of_two=True).draw(Key(3), block)
    assert float(x.abs().max()) == pytest.approx(2, rel=1e-3)


def test_notes_tell_what_is_tied_and_how_few_numbers_are_drawn() -> None:
    space = tensors({"big": torch.zeros(1000, 1000), "small": torch.zeros(1000)})
    (said,) = Pool().notes(space)
    assert "period 8191: at least 991809 of 1001000 weights share" in said
    assert "drawn per direction: 2, 500500 times fewer" in said
    assert "drawn per direction: 1, 1001000 times fewer" in Lfsr().notes(space)[0]
    for kind in (Pool, Lfsr):
        assert "at least 992809 of" in kind(pointer="continue").notes(space)[0]
        assert "none; 8191 directions" in kind(pointer="continue").notes(space)[0]
    # 1001000 = 5 7 13 2200 and 4095 = 9 5 7 13: the pointer comes round after 9 directions.
    assert "none; 9 directions" in Pool(12, "continue").notes(space)[0]


@pytest.mark.parametrize(
    ("options", "law"),
    [({"pointer": "continue", "bits": 6}, Pool(6, "continue", False, 2)),
     ({"source": "lfsr", "bits": 8}, Lfsr(8, "restart", False, 2)),
     ({"source": "lfsr", "bits": 8, "pointer": "continue", "registers": 4},
      Lfsr(8, "continue", False, 2, 4))],
)  # fmt: skip
def test_twenty_steps_are_mezos_along_these_directions(
    options: dict[str, Any], law: Reused
) -> None:
    lr, eps, steps = 5e-3, 1e-3, 20
    paper = Restated("norms + biases")
    for name, memory in law.states(paper.space).items():
        paper.blocks[name].memory.update(memory)
    for t in range(steps):
        directions = [paper.direction(law, paper.key(t, j)) for j in range(2)]
        c = [(paper.loss(t, u, eps) - paper.loss(t, u, -eps)) / (2 * eps) for u in directions]
        for u, cj in zip(directions, c, strict=True):
            paper.move_(u, -lr / 2 * cj)
    method = methods.get("pezo", lr=lr, eps=eps, queries=2, **options)
    assert method.perturbation == law
    tuner = paper.tune(method, steps)
    assert paper.apart() < 1e-5
    assert tuner.kept_bytes == 16 * len(paper.blocks)


@pytest.mark.parametrize("law", LAWS[2::2], ids=repr)
def test_it_resumes_in_the_middle(law: Reused) -> None:
    def tuner() -> Any:
        model = small()
        space = spaces.parse("norms + head").build(model)
        method = Method("m", TwoSided(0.05, 2), law, lr=0.05)
        return Tuner(space, method, 1, evaluator=TorchEvaluator(model, space, cross_entropy))

    straight, again = tuner(), tuner()
    for t in range(3):
        straight.step(batch(4, t))
    again.load_({k: v.clone() for k, v in straight.state_tensors().items()}, 3, 3)
    for t in range(3, 6):
        straight.step(batch(4, t))
        again.step(batch(4, t))
    for a, b in zip(straight.space, again.space, strict=True):
        assert torch.equal(a.value(), b.value())


def test_what_cannot_train_is_refused() -> None:
    seven = tensors({"w": torch.zeros(21)})
    with pytest.raises(BadInput, match="would be the same"):
        Pool(bits=3, pointer="continue").check(seven)
    with pytest.raises(BadInput, match="would be the same"):
        Lfsr(bits=3, pointer="continue", registers=3).check(seven)
    Pool(bits=3).check(seven)
    refused: list[dict[str, Any]] = [
        {"source": "gauss"}, {"pointer": "stay"}, {"bits": 2}, {"bits": 21},
        {"source": "lfsr", "registers": 0}, {"source": "lfsr", "registers": 8192},
    ]  # fmt: skip
    for options in refused:
        with pytest.raises(BadInput, match=r"want|bits"):
            methods.get("pezo", **options)
