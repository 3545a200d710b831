"""Secret noise: its law, number by number. Run: pytest tests/core/test_secret.py"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from zotune.core import secret

LAWS: dict[secret.Law, Callable[[int, int], float]] = {
    "gaussian": lambda x, s: math.exp(-(x**2) / (2 * s**2)),
    "laplace": lambda x, s: math.exp(-abs(x) / s),
}


@pytest.mark.parametrize("scale", [1, 3, 8])
@pytest.mark.parametrize("law", LAWS)
def test_every_whole_number_is_as_likely_as_the_law_says(
    law: secret.Law, scale: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frequencies of 20,000 draws within 4.5 standard errors."""
    monkeypatch.setattr(secret, "entropy", random.Random(scale).randbytes)
    draws, weight = 20_000, LAWS[law]
    seen = Counter(secret.noise(law, scale) for _ in range(draws))
    whole = sum(weight(x, scale) for x in range(-50 * scale, 50 * scale + 1))
    for x in range(-8 * scale, 8 * scale + 1):
        chance = weight(x, scale) / whole
        error = math.sqrt(chance * (1 - chance) / draws)
        assert abs(seen[x] / draws - chance) < 4.5 * error + 3 / draws, x


@pytest.mark.parametrize("limit", [1, 2, 5, 256, 257])
def test_whole_numbers_below_a_limit_are_uniform(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secret, "entropy", random.Random(limit).randbytes)
    draws = 100 * limit
    seen = Counter(secret._below(limit) for _ in range(draws))
    assert set(seen) == set(range(limit))
    assert max(abs(n - 100) for n in seen.values()) < 6 * math.sqrt(100)


def test_no_seed_repeats_what_is_secret() -> None:
    def drawn() -> list[int]:
        random.seed(0)
        with torch.random.fork_rng():
            torch.random.manual_seed(0)
            return [secret.noise("gaussian", 1 << 48) for _ in range(4)]

    before = random.getstate()
    assert drawn() != drawn()
    random.setstate(before)
    assert len({secret.entropy(16) for _ in range(50)}) == 50
