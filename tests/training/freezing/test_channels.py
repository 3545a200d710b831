"""Which channels commute with a transform, and maps made from what is cached."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zotune.errors import BadInput
from zotune.tasks.batch import Batch
from zotune.training.augmentation import Augmentation, Flip, Shift, parse_augment
from zotune.training.freezing.channels import Channels, commuting


def images(count: int = 6) -> Batch:
    pixels = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return Batch({"image": pixels, "label": torch.zeros(count)}, count)


def two_channels(batch: Batch) -> Tensor:
    """A symmetric filter, which commutes with a flip, and an edge filter, which does not."""
    kernel = torch.tensor([[[[1.0, 2.0, 1.0]]], [[[1.0, 0.0, -1.0]]]])
    return nn.functional.conv2d(batch["image"], kernel, padding=(0, 1))


def test_symmetric_filters_commute_with_a_flip_and_edges_do_not() -> None:
    channels = Channels.measured(Augmentation((Flip(),)), images(), two_channels, 0.9)
    assert channels.copied == ((1,),)
    assert channels.passes == 2


def test_made_maps_are_the_moved_images_features() -> None:
    augmentation = Augmentation((Flip(),))
    channels = Channels.measured(augmentation, images(), two_channels, 0.9)
    truth = two_channels(augmentation.of(images(), [1] * 6))
    for record, wanted, base in zip(
        channels.records(images(), two_channels), truth, two_channels(images()), strict=True
    ):
        assert torch.allclose(channels.made(record, 1), wanted, atol=1e-6)
        assert torch.equal(channels.made(record, 0), base)


def test_the_threshold_goes_from_naive_to_copies_of_everything() -> None:
    augmentation = parse_augment("flip + shift(pixels=2)")
    naive = Channels.measured(augmentation, images(), two_channels, -1.0)
    whole = Channels.measured(augmentation, images(), two_channels, 1.1)
    assert (naive.passes, whole.passes) == (1, 6)
    assert all(copied == (0, 1) for copied in whole.copied)
    assert eval(repr(whole)) == whole


def test_similarity_is_the_mean_cosine_by_channel() -> None:
    a, b = (torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    wanted = nn.functional.cosine_similarity(a.double().flatten(2), b.double().flatten(2), dim=-1)
    assert torch.allclose(commuting(a, b), wanted.mean(0))
    assert commuting(0 * a, 0 * a).tolist() == [1, 1]
    assert commuting(a, 0 * a).tolist() == [0, 0]


@pytest.mark.parametrize("cells", [-9, -3, -1, 0, 2, 8])
def test_shifts_repeat_the_border_and_scale_with_the_map(cells: int) -> None:
    maps = torch.arange(8.0).expand(1, 1, 8, 8)
    moved = Shift(cells, 0)(maps, 8)
    assert moved[0, 0, 0].tolist() == [min(max(i - cells, 0), 7) for i in range(8)]
    assert torch.equal(Shift(4 * cells, 0)(maps, 32), moved)
    assert torch.equal(Shift(0, cells)(maps.mT, 8), moved.mT)


def test_shifts_between_cells_are_linear() -> None:
    maps = torch.tensor([0.0, 4.0, 8.0]).view(1, 1, 1, 3)
    assert Shift(1, 0)(maps, 6).flatten().tolist() == [0, 2, 6]


def test_every_transform_is_drawn_and_drawn_again_alike() -> None:
    augmentation = parse_augment("flip + shift(pixels=4)")
    drawn = [augmentation.drawn(3, place) for place in range(300)]
    assert set(drawn) == set(range(6))
    assert drawn == [augmentation.drawn(3, place) for place in range(300)]


WRONG = ["flop", "shift(pixels=0)", "shift(by=2)", "flip(x=1)", "shift(pixels=1.5)"]


@pytest.mark.parametrize("text", WRONG)
def test_transforms_that_do_not_exist_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"cannot read augment|want a whole number"):
        parse_augment(text)


def test_states_without_channels_are_refused() -> None:
    flat = lambda batch: batch["image"].flatten(1)  # noqa: E731
    with pytest.raises(BadInput, match="wants feature maps"):
        Channels.measured(Augmentation((Flip(),)), images(), flat, 0.9)
