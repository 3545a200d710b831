"""Noise: known answers, order, chunks, moments. Run: pytest tests/core/test_noise.py"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zotune.core import noise, noise_cpu, noise_reference
from zotune.core.noise import Key, combine_, draw, draw_rows, draw_whole, philox_key

LAWS = ("gaussian", "uniform", "rademacher")
law_of = st.sampled_from(LAWS)

# counter, key, answer: the vectors that Random123 ships (kat_vectors, philox4x32 10).
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> list[int]:
    return [int(w, 16) for w in text.split()]


def reference(law: str, key: Key, name: str, start: int, stop: int) -> torch.Tensor:
    seed_key = philox_key(key.seed, name)
    return noise_reference.row(law, start, stop, key.stream, seed_key, torch.device("cpu"))


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_published_answers(counter: str, key: str, answer: str) -> None:
    compiled = noise_cpu.philox(
        np.array(words(counter), np.uint32), np.array(words(key), np.uint32)
    )
    assert compiled.tolist() == words(answer)
    c = tuple(torch.tensor([w]) for w in words(counter))
    plain = noise_reference.philox(c, (words(key)[0], words(key)[1]))
    assert [int(w) for w in plain] == words(answer)


@given(law=law_of, start=st.integers(0, 5000), length=st.integers(0, 5000),
       lane=st.sampled_from((0, 1, 65_535, 70_000)), step=st.integers(0, 2**32 - 1),
       query=st.integers(0, 2**32 - 1), seed=st.integers(0, 2**63 - 1))  # fmt: skip
def test_compiled_noise_equals_plain_torch_bit_for_bit(
    law: noise.Law, start: int, length: int, lane: int, step: int, query: int, seed: int
) -> None:
    key = Key(seed, step, query, lane)
    fast = draw(law, key, "w", start, start + length)
    slow = reference(law, key, "w", start, start + length)
    assert torch.equal(fast.view(torch.int32), slow.view(torch.int32))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("start", [2**32 - 3, 2**34 - 77, 2**36 + 1, 2**40])
def test_compiled_noise_equals_plain_torch_far_out_in_a_block(law: noise.Law, start: int) -> None:
    key = Key(3, 5, 7, 11)
    fast = draw(law, key, "w", start, start + 300)
    assert torch.equal(fast, reference(law, key, "w", start, start + 300))
    for away in (2**32, 2**34, 2**39):  # where an index, or a counter, of 32 bits would wrap
        assert not torch.equal(fast, draw(law, key, "w", start + away, start + away + 300))


@given(most=st.sampled_from((1, 2, 3, 15, 63, 127)), start=st.integers(0, 300),
       n=st.integers(0, 300), lane=st.sampled_from((0, 70_000)))  # fmt: skip
def test_whole_numbers_are_the_uniforms_laid_on_the_grid(
    most: int, start: int, n: int, lane: int
) -> None:
    key = Key(5, step=1, query=2, lane=lane)
    fast = draw_whole(most, key, "w", start, start + n)
    truth = noise_reference.whole(reference("uniform", key, "w", start, start + n), most)
    assert fast.dtype == torch.int8
    assert torch.equal(fast.float(), truth)
    assert n == 0 or -most <= int(fast.min()) <= int(fast.max()) <= most


@given(law=law_of, n=st.integers(1, 9000), cuts=st.lists(st.integers(0, 9000), max_size=6))
def test_chunks_concatenate_to_the_whole(law: noise.Law, n: int, cuts: list[int]) -> None:
    edges = [0, *sorted(c for c in cuts if c <= n), n]
    key = Key(1, step=2)
    parts = [draw(law, key, "w", a, b) for a, b in pairwise(edges)]
    assert torch.equal(torch.cat(parts), draw(law, key, "w", 0, n))


@given(law=law_of, starts=st.lists(st.integers(0, 5000), min_size=1, max_size=6),
       n=st.integers(0, 3000))  # fmt: skip
def test_rows_of_several_keys_are_the_same_numbers_as_one_at_a_time(
    law: noise.Law, starts: list[int], n: int
) -> None:
    keys = [Key(9, step=4, query=1, lane=b) for b in range(len(starts))]
    rows = draw_rows(law, keys, "w", starts, n)
    for row, key, start in zip(rows, keys, starts, strict=True):
        assert torch.equal(row, draw(law, key, "w", start, start + n))


def test_order_and_foreign_draws_change_nothing_and_the_global_generators_stay_untouched() -> None:
    names = ["a", "b", "c"]
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    forward = {n: draw("gaussian", Key(0), n, 0, 500) for n in names}
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
    for name in reversed(names):
        with torch.random.fork_rng():
            torch.randn(17)
            assert torch.equal(draw("gaussian", Key(0), name, 0, 500), forward[name])


@pytest.mark.parametrize("law", LAWS)
def test_equal_shapes_under_unequal_keys_draw_unrelated_numbers(law: noise.Law) -> None:
    n = 20_000
    here = Key(5, step=3, query=1, lane=2)
    base = draw(law, here, "layer.0.weight", 0, n)
    assert torch.equal(base, draw(law, here, "layer.0.weight", 0, n))
    others = {
        "name": draw(law, here, "layer.1.weight", 0, n),
        "seed": draw(law, Key(6, 3, 1, 2), "layer.0.weight", 0, n),
        "step": draw(law, here.at(4), "layer.0.weight", 0, n),
        "query": draw(law, here.fold(query=0), "layer.0.weight", 0, n),
        "lane": draw(law, here.fold(lane=3), "layer.0.weight", 0, n),
        "swapped": draw(law, Key(5, step=1, query=3, lane=2), "layer.0.weight", 0, n),
        "later": draw(law, here, "layer.0.weight", n, 2 * n),
    }
    for what, other in others.items():
        cosine = float(base @ other / (base.norm() * other.norm()))
        assert abs(cosine) < 5 / math.sqrt(n), f"{what}: cosine {cosine}"


@pytest.mark.parametrize(
    ("law", "variance", "kurtosis"),
    [("gaussian", 1, 3), ("uniform", 1 / 3, 1.8), ("rademacher", 1, 1)],
)
def test_moments_are_those_of_the_law(law: noise.Law, variance: float, kurtosis: float) -> None:
    n = 1 << 20
    u = draw(law, Key(0), "moments", 0, n).double()
    # Five standard errors of the mean, variance and fourth moment of n independent draws.
    assert abs(float(u.mean())) < 5 * math.sqrt(variance / n)
    square = u.square()
    assert abs(float(square.mean()) - variance) < 5 * float(square.std()) / math.sqrt(n) + 1e-12
    fourth = u.pow(4) / variance**2
    assert abs(float(fourth.mean()) - kurtosis) < 5 * float(fourth.std()) / math.sqrt(n) + 1e-12
    # Neighbours are unrelated at every small distance, tiles and planes included.
    for lag in (1, 2, 16, 32, 48, 64, 128, 2048):
        lagged = float((u[:-lag] * u[lag:]).mean()) / variance
        assert abs(lagged) < 5 / math.sqrt(n), lag


@pytest.mark.parametrize("law", ["gaussian", "uniform"])
def test_the_whole_distribution_fits_by_kolmogorov_and_smirnov(law: noise.Law) -> None:
    n = 1 << 18
    u = draw(law, Key(1), "ks", 0, n).double().sort().values
    cdf = 0.5 * (1 + torch.erf(u / math.sqrt(2))) if law == "gaussian" else (u + 1) / 2
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    distance = max(float((steps - cdf).max()), float((cdf - steps).max()) + 1 / n)
    assert distance < 1.95 / math.sqrt(n)  # exceeded by chance once in a thousand seeds


def test_the_gaussian_has_the_tails_of_24_bit_uniforms_and_no_infinity() -> None:
    word = torch.tensor([[0, 255, 256, 2**32 - 1] * 16], dtype=torch.int64)
    u = noise_reference.gaussian(word)
    assert u.isfinite().all()
    assert float(u.abs().max()) <= math.sqrt(2 * 24 * math.log(2)) + 1e-5


def test_gaussians_equal_box_muller_in_double_to_1e_6() -> None:
    word = torch.arange(64 * 64, dtype=torch.int64).view(64, 64) * 0x9E3779B9 % 2**32
    planes = word.view(64, 4, 16)
    a, b = planes[:, 0::2].double(), planes[:, 1::2].double()
    radius = (-2 * ((a / 256).floor() + 1).mul(2.0**-24).log()).sqrt()
    angle = b * (2 * math.pi / 2**32)
    truth = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2).reshape(64, 64)
    error = (noise_reference.gaussian(word).double() - truth).abs().max()
    assert float(error) < 1e-6  # float32 of numbers up to 5.8 has spacing 4.8e-7


@given(law=law_of, n=st.integers(1, 6000), start=st.integers(0, 3000),
       coefficients=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=5))  # fmt: skip
def test_combine_is_the_weighted_sum_of_the_draws_in_order(
    law: noise.Law, n: int, start: int, coefficients: list[float]
) -> None:
    keys = [Key(2, step=1, query=j) for j in range(len(coefficients))]
    total = torch.full((n,), 0.5)
    summed = total.clone()
    for key, c in zip(keys, coefficients, strict=True):
        summed += c * draw(law, key, "w", start, start + n)  # float32, rounded after each operation
    combine_(total, law, keys, coefficients, "w", start)
    assert torch.equal(total, summed)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("start", [0, 1, 63, 64, 65, 2047, 2048, 2**32 - 65])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 129, 2047, 2049, 4200])
def test_whole_tiles_and_their_ends_equal_plain_torch_for_many_keys(
    law: noise.Law, start: int, n: int
) -> None:
    """Ranges that begin or end at, before and after a plane of 64 or a tile of 2048 numbers."""
    keys = [Key(6, step=2, query=j, lane=j % 5) for j in range(33)]
    coefficients = [0.1 * (-1) ** j * j for j in range(33)]
    truth = [reference(law, key, "w", start, start + n) for key in keys]
    assert torch.equal(draw_rows(law, keys, "w", [start] * 33, n), torch.stack(truth))
    total, summed = torch.full((n,), 0.5), torch.full((n,), 0.5)
    for c, u in zip(coefficients, truth, strict=True):
        summed += c * u
    assert torch.equal(combine_(total, law, keys, coefficients, "w", start), summed)


@given(law=law_of, n=st.integers(2, 5000), cut=st.integers(1, 4999))
def test_combine_in_chunks_is_combine_of_the_whole_bit_for_bit(
    law: noise.Law, n: int, cut: int
) -> None:
    cut = min(cut, n)
    keys, c = [Key(2, query=j) for j in range(3)], [0.3, -1.7, 2.5]
    whole = combine_(torch.zeros(n), law, keys, c, "w")
    parts = torch.zeros(n)
    combine_(parts[:cut], law, keys, c, "w")
    combine_(parts[cut:], law, keys, c, "w", cut)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("law", LAWS)
def test_the_number_of_threads_changes_no_bit(law: noise.Law) -> None:
    n = 400_001
    keys, c = [Key(4, query=j) for j in range(2)], [0.3, -1.7]

    def everything() -> list[torch.Tensor]:
        return [
            draw(law, Key(4), "w", 3, n),
            draw_rows(law, [Key(4, lane=b) for b in range(5)], "w", [0] * 5, 70_001),
            combine_(torch.zeros(n), law, keys, c, "w", 1),
            draw_whole(3, Key(4), "w", 3, n),
        ]

    one = everything()
    torch.set_num_threads(2)
    try:
        two = everything()
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@settings(max_examples=10)
@given(law=law_of, n=st.integers(0, 3000))
def test_other_devices_take_the_plain_torch_path_and_agree(law: noise.Law, n: int) -> None:
    """The path of every device but the CPU, run on the CPU through the reference functions."""
    device, key = torch.device("cpu"), Key(8, 1, 2, 3)
    row = noise_reference.row(law, 5, 5 + n, key.stream, philox_key(8, "w"), device)
    assert torch.equal(row, draw(law, key, "w", 5, 5 + n))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("law", LAWS)
def test_a_gpu_draws_the_numbers_of_the_cpu(law: noise.Law) -> None:
    here = draw(law, Key(3), "w", 7, 50_000)
    there = draw(law, Key(3), "w", 7, 50_000, "cuda").cpu()
    if law == "gaussian":
        assert torch.allclose(here, there, rtol=0, atol=1e-6)
    else:
        assert torch.equal(here, there)


def test_an_empty_draw_is_empty() -> None:
    assert draw("gaussian", Key(0), "w", 5, 5).shape == (0,)
    assert draw_whole(1, Key(0), "w", 5, 5).shape == (0,)
    assert draw_rows("uniform", [Key(0), Key(1)], "w", [0, 9], 0).shape == (2, 0)
    assert combine_(torch.zeros(0), "gaussian", [Key(0)], [1.0], "w").shape == (0,)
