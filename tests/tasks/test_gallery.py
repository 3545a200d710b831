"""Grids and the Fréchet distance. Run: pytest tests/tasks/test_gallery.py"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zotune.tasks.gallery import frechet, grid, pooled


@settings(deadline=None, max_examples=30)
@given(n=st.integers(3, 40), m=st.integers(3, 40), d=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_distance_is_the_formula_with_scipys_matrix_root(
    n: int, m: int, d: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    a, b = random.normal(size=(n, d)), random.normal(1.0, 2.0, size=(m, d))
    one, other = np.cov(a, rowvar=False).reshape(d, d), np.cov(b, rowvar=False).reshape(d, d)
    jitter = 1e-9 * np.eye(d)  # scipy's root of a singular matrix is inexact
    root = scipy.linalg.sqrtm((one + jitter) @ (other + jitter)).real
    wanted = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(one + other - 2 * root)
    found = frechet(torch.from_numpy(a), torch.from_numpy(b))
    assert found == pytest.approx(wanted, abs=1e-3, rel=1e-4)
    assert frechet(torch.from_numpy(a), torch.from_numpy(a)) == pytest.approx(0, abs=1e-6)


def test_features_are_mean_colours_of_fields() -> None:
    image = torch.zeros(1, 3, 16, 24, dtype=torch.uint8)
    image[0, 1, :2, :3] = 255  # the first field of green
    found = pooled(image)
    assert found.shape == (1, 192)
    assert found[0, 64] == 1
    assert found.sum() == 1


@settings(deadline=None, max_examples=20)
@given(n=st.integers(1, 10), channels=st.sampled_from([1, 3]), gap=st.integers(1, 3))
def test_every_image_stands_in_the_grid_once(n: int, channels: int, gap: int) -> None:
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, channels, 4, 5)
    pixels = torch.from_numpy(np.array(grid(images, gap)))
    pixels = pixels if channels == 1 else pixels[..., 0]
    columns = int(np.ceil(np.sqrt(n)))
    for i in range(n):
        top, left = i // columns * (4 + gap), i % columns * (5 + gap)
        assert (pixels[top : top + 4, left : left + 5] == i).all()
    assert int((pixels < 255).sum()) == n * 20
