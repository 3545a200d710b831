"""Triton's noise against plain torch: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zotune.core import noise, noise_reference
from zotune.core.noise import Key, philox_key
from zotune.errors import BadInput

pytest.importorskip("triton", reason="triton is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
law_of = st.sampled_from(("gaussian", "uniform", "rademacher"))


@pytest.fixture(autouse=True)
def _triton_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "has_triton", lambda device: True)


def truth(law: str, key: Key, start: int, stop: int) -> torch.Tensor:
    return noise_reference.row(law, start, stop, key.stream, philox_key(key.seed, "w"), DEVICE)


def assert_same(law: str, fast: torch.Tensor, slow: torch.Tensor) -> None:
    """Bit for bit; a GPU's Gaussians to 1e-6 of a few standard deviations."""
    if law == "gaussian":
        torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(fast, slow)


@settings(max_examples=25)
@given(law=law_of, start=st.integers(0, 5000), n=st.integers(0, 5000),
       lane=st.sampled_from((0, 65_535)), step=st.integers(0, 2**32 - 1),
       query=st.integers(0, 2**32 - 1), seed=st.integers(0, 2**63 - 1))  # fmt: skip
def test_numbers_are_those_of_plain_torch(
    law: noise.Law, start: int, n: int, lane: int, step: int, query: int, seed: int
) -> None:
    key = Key(seed, step, query, lane)
    fast = noise.draw(law, key, "w", start, start + n, DEVICE)
    assert_same(law, fast, truth(law, key, start, start + n))


@pytest.mark.parametrize("law", ["gaussian", "uniform", "rademacher"])
@pytest.mark.parametrize("start", [2**32 - 3, 2**34 - 77, 2**40])
def test_numbers_far_out_in_a_block_are_those_of_plain_torch(law: noise.Law, start: int) -> None:
    key = Key(3, 5, 7, 11)
    fast = noise.draw(law, key, "w", start, start + 300, DEVICE)
    assert_same(law, fast, truth(law, key, start, start + 300))


@settings(max_examples=15)
@given(law=law_of, starts=st.lists(st.integers(0, 3000), min_size=1, max_size=4),
       n=st.integers(1, 3000))  # fmt: skip
def test_rows_of_several_keys_are_the_same_numbers_as_one_at_a_time(
    law: noise.Law, starts: list[int], n: int
) -> None:
    keys = [Key(9, step=4, query=1, lane=b) for b in range(len(starts))]
    rows = noise.draw_rows(law, keys, "w", starts, n, DEVICE)
    for row, key, start in zip(rows, keys, starts, strict=True):
        assert torch.equal(row, noise.draw(law, key, "w", start, start + n, DEVICE))


@pytest.mark.parametrize("law", ["gaussian", "uniform", "rademacher"])
def test_sums_of_directions_are_added_to_what_is_there(law: noise.Law) -> None:
    keys, weights = [Key(1, query=q) for q in range(3)], [0.5, -2.0, 3.0]
    start, n = 70, 3000
    g = noise.combine_(torch.ones(n, device=DEVICE), law, keys, weights, "w", start)
    rows = [truth(law, key, start, start + n).double() for key in keys]
    whole = 1 + sum(c * row for c, row in zip(weights, rows, strict=True))
    torch.testing.assert_close(g.double(), whole, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("most", [1, 7, 127])
def test_whole_numbers_are_the_uniforms_laid_on_the_grid(most: int) -> None:
    key = Key(5, step=1)
    fast = noise.draw_whole(most, key, "w", 30, 1000, DEVICE)
    slow = noise_reference.whole(truth("uniform", key, 30, 1000), most)
    assert fast.dtype == torch.int8
    assert torch.equal(fast.float(), slow)


def test_a_lane_that_does_not_fit_the_counter_is_refused() -> None:
    with pytest.raises(BadInput, match="65,536 examples"):
        noise.draw("uniform", Key(0, lane=1 << 16), "w", 0, 4, DEVICE)
