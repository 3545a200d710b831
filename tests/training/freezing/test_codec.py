"""No number of a cache is further from the truth than the codec says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zotune.errors import BadInput, FormatError, ZotuneError
from zotune.training.freezing.codec import Lossless, Zfp, parse_codec

SHAPES = st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _drawn(shape: tuple[int, ...], seed: int, spread: float) -> Tensor:
    """Numbers whose sizes differ by orders of magnitude, as activations' do."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x * torch.exp(spread * torch.randn(shape, generator=generator))


@given(shape=SHAPES, seed=st.integers(0, 99), spread=st.floats(0, 4),
       tolerance=st.floats(1e-6, 3), dtype=st.sampled_from(DTYPES))  # fmt: skip
def test_the_error_bound_holds_for_any_features(
    shape: tuple[int, ...], seed: int, spread: float, tolerance: float, dtype: torch.dtype
) -> None:
    x = _drawn(shape, seed, spread).clamp(-6e4, 6e4).to(dtype)
    codec = Zfp(tolerance=tolerance).fitted(1.0, 0)
    found = codec.decode(codec.encode(x), shape, dtype)
    assert found.dtype == dtype
    assert found.shape == x.shape
    eps = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0  # what decoding rounds to
    slack = eps * (x.double().abs() + codec.bound)
    assert ((found.double() - x.double()).abs() <= codec.bound + slack).all()


@given(shape=SHAPES, seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
def test_lossless_features_come_back_bit_for_bit(
    shape: tuple[int, ...], seed: int, dtype: torch.dtype
) -> None:
    x = _drawn(shape, seed, 2.0).to(dtype)
    if x.numel():
        x.view(-1)[0] = float("nan")
    found = Lossless().decode(Lossless().encode(x), shape, dtype)
    assert torch.equal(torch.nan_to_num(found, 7.0), torch.nan_to_num(x, 7.0))


def test_a_range_beyond_float32s_digits_is_stored_without_loss() -> None:
    x = torch.tensor([[1e8, 1e-3, 0.5, -3.25]])
    codec = Zfp(tolerance=1e-6).fitted(1.0, 0)
    assert torch.equal(codec.decode(codec.encode(x), (1, 4), x.dtype), x)


def test_bounds_grow_from_freeze_point_to_freeze_point_and_files_shrink() -> None:
    x = _drawn((64, 48), 0, 0.5)
    fitted = [Zfp(tolerance=0.05, growth=3.0).fitted(2.0, stage) for stage in range(3)]
    assert [round(c.bound, 6) for c in fitted] == [0.1, 0.3, 0.9]
    sizes = [len(c.encode(x)) for c in fitted]
    assert sizes[0] > sizes[1] > sizes[2]


def test_features_that_are_not_finite_are_refused_by_zfp() -> None:
    with pytest.raises(ZotuneError, match="NaN or infinities"):
        Zfp().fitted(1.0, 0).encode(torch.tensor([1.0, float("inf")]))


def test_bytes_that_do_not_fit_their_shape_are_refused() -> None:
    with pytest.raises(FormatError, match="4 bytes for 2 numbers"):
        Lossless().decode(b"abcd", (2,), torch.float32)
    data = Zfp().fitted(1.0, 0).encode(torch.ones(3))
    with pytest.raises(FormatError, match="3 numbers for a shape"):
        Zfp().fitted(1.0, 0).decode(data, (4,), torch.float32)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("zfq", "did you mean zfp"),
        ("zfp(bits=3)", "no option bits"),
        ("lossless(tolerance=1)", "no option tolerance"),
        ("zfp(tolerance=0)", "want more than 0"),
        ("zfp(growth=0.5)", "want at least 1"),
        ("zfp + lossless", "unknown codec"),
    ],
)
def test_codecs_that_do_not_exist_are_refused(text: str, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        parse_codec(text)


def test_a_codec_is_rebuilt_from_its_repr() -> None:
    for text in ("lossless", "zfp(tolerance=0.25, growth=1.5)"):
        codec = parse_codec(text)
        assert eval(repr(codec)) == codec
