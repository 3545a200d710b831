"""Image classification: pictures, preprocessing, losses. Run: pytest tests/tasks/test_vision.py"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from zotune import tasks
from zotune.errors import BadInput, DataError, FormatError
from zotune.models import Loaded
from zotune.tasks import ImageClassification
from zotune.tasks.pictures import Arrays, Encoded, decoded
from zotune.tasks.preprocessing import FILE, Preprocessing

Write = Callable[..., Path]


def loaded(model: nn.Module, kind: str = "module", folder: Path = Path("none")) -> Loaded:
    return Loaded(model.eval(), None, kind, folder, None, "float")


def network(channels: int = 1, labels: int = 10) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = [nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(*body, nn.Linear(4, labels)).requires_grad_(False)


def png(pixels: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def picture(value: int, side: int = 6, channels: int = 3) -> Any:
    return np.full((side, side, channels) if channels > 1 else (side, side), value)


@pytest.fixture(scope="module")
def digits() -> ImageClassification:
    task = tasks.get("digits")
    assert isinstance(task, ImageClassification)
    return task


@pytest.fixture
def folder(write: Write, tmp_path: Path) -> Path:
    """Two classes of twelve pictures each, all different."""
    for k in range(12):
        write(f"pets/cat/{k}.png", png(picture(10 + k)))
        write(f"pets/dog/sub/{k}.PNG", png(picture(200 + k)))
    write("pets/cat/notes.txt", "no picture")
    return tmp_path / "pets"


# ---- named sets ----------------------------------------------------------------------


def test_digits_need_no_network_and_no_split_shares_a_picture(digits: ImageClassification) -> None:
    names = [{str(row["image"]) for row in digits.split(s)} for s in ("train", "dev", "test")]
    assert [len(n) for n in names] == [1295, 143, 359]
    assert not names[0] & names[1] | names[0] & names[2] | names[1] & names[2]
    batch = digits.batch(digits.split("test")[:5])
    assert batch["pixels"].shape == (5, 1, 8, 8)
    assert batch["pixels"].dtype == torch.uint8
    assert batch["pixels"].max() == 255


def test_the_dev_split_is_made_from_train_never_from_test(digits: ImageClassification) -> None:
    other = tasks.get("digits", dev_size=50, seed=3)
    for split in ("train", "dev"):
        assert not {str(r["image"]) for r in other.split(split)} & {
            str(r["image"]) for r in digits.split("test")
        }


@pytest.mark.parametrize(("name", "shape"), [("mnist", (1, 28, 28)), ("cifar10", (3, 32, 32))])
def test_real_sets_come_from_the_data_folder(
    name: str, shape: tuple[int, ...], real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not list(real_data.glob(f"{name}*/*.npz")):
        pytest.skip(f"no {name} in {real_data}")
    monkeypatch.setenv("ZOTUNE_DATA", str(real_data))
    task = tasks.get(name, train_size=20, dev_size=10, test_size=10)
    assert task.batch(task.split("test"))["pixels"].shape == (10, *shape)
    assert len(task.labels) == 10  # type: ignore[attr-defined]


def test_a_data_file_with_pickled_objects_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mnist").mkdir()
    bad = np.array([{"code": "runs"}], dtype=object)
    np.savez(tmp_path / "mnist/mnist.npz", train_x=bad, train_y=bad, test_x=bad, test_y=bad)
    monkeypatch.setenv("ZOTUNE_DATA", str(tmp_path))
    with pytest.raises(DataError, match="cannot be read"):
        tasks.get("mnist")


def test_a_data_file_without_its_arrays_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mnist").mkdir()
    np.savez(tmp_path / "mnist/mnist.npz", train_x=np.zeros(3))
    monkeypatch.setenv("ZOTUNE_DATA", str(tmp_path))
    with pytest.raises(DataError, match="lacks the arrays test_x, test_y, train_y"):
        tasks.get("mnist")


# ---- the user's own pictures ---------------------------------------------------------


def test_a_subfolder_is_a_class(folder: Path) -> None:
    task = tasks.get("images", data=str(folder))
    assert isinstance(task, ImageClassification)
    assert task.labels == ["cat", "dog"]
    assert task.splits == ("train", "dev")
    assert sum(len(task.split(s)) for s in task.splits) == 24
    for row in task.split("train"):
        bright = int(task.encode(row).pixels.max()) >= 200
        assert bright == bool(row["label"])


def test_split_folders_are_kept_apart(write: Write, tmp_path: Path) -> None:
    for split, count in (("train", 11), ("val", 3), ("test", 2)):
        for kind in ("a", "b"):
            for k in range(count):
                write(f"set/{split}/{kind}/{k}.png", png(picture(k)))
    task = tasks.get("images", data=str(tmp_path / "set"))
    assert [len(task.split(s)) for s in ("train", "dev", "test")] == [22, 6, 4]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_rows_name_pictures_beside_their_file(write: Write, folder: Path, ending: str) -> None:
    rows = [{"path": f"cat/{k}.png", "label": "yes" if k % 2 else "no"} for k in range(12)]
    text = "\n".join(json.dumps(row) for row in rows)
    if ending == "csv":
        text = "path,label\n" + "\n".join(f"{r['path']},{r['label']}" for r in rows)
    task = tasks.get("images", data=str(write(f"pets/rows.{ending}", text)))
    assert task.labels == ["no", "yes"]  # type: ignore[attr-defined]
    assert task.batch(task.split("train"))["pixels"].shape[1:] == (3, 6, 6)


def test_unreadable_pictures_are_named_left_out_and_counted(
    folder: Path, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    write("pets/cat/torn.png", png(np.random.default_rng(0).integers(0, 255, (6, 6, 3)))[:80])
    write("pets/cat/empty.jpg", b"")
    write("pets/dog/words.jpg", "no picture")
    with caplog.at_level(logging.WARNING, "zotune"):
        task = tasks.get("images", data=str(folder))
    assert task.skipped == 3  # type: ignore[attr-defined]
    assert sum(len(task.split(s)) for s in task.splits) == 24
    for name in ("torn.png", "empty.jpg", "words.jpg", "3 pictures cannot be read"):
        assert name in caplog.text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {f"{kind}/{k}.png": b"bad" for kind in ("cat", "dog") for k in (1, 2)},
            "none of the 3 pictures",
        ),
        ({"cat/notes.txt": b"no"}, "holds no pictures in a subfolder per class"),
        ({"train.csv": b"file,label\na.png,x\nb.png,y\nc.png,y"}, "no field 'path'"),
    ],
)
def test_folders_without_pictures_are_refused(
    files: dict[str, bytes], message: str, write: Write, tmp_path: Path
) -> None:
    for name, content in files.items():
        write(f"set/{name}", content)
    with pytest.raises(DataError, match=message):
        tasks.get("images", data=str(tmp_path / "set"))


def test_splits_do_not_depend_on_where_the_folder_lies(write: Write, tmp_path: Path) -> None:
    held = []
    for place in ("here", "there/deeper"):
        for k in range(12):
            write(f"{place}/{'cat' if k % 2 else 'dog'}/{k}.png", png(picture(k)))
        task = tasks.get("images", data=str(tmp_path / place), dev_size=4)
        held.append(sorted(Path(row["image"]).stem for row in task.split("dev")))
    assert held[0] == held[1]


def test_a_picture_that_would_fill_the_memory_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match=r"big.png is not a readable image"):
        decoded(png(picture(1)), "big.png")


def test_encoded_bytes_are_cut_at_their_places() -> None:
    files = [png(picture(k, channels=1)) for k in (3, 7)]
    starts = np.cumsum([0, *map(len, files)])
    held = Encoded({"test": (np.frombuffer(b"".join(files), np.uint8), starts)})
    assert [int(held[f"test/{i}"].max()) for i in range(2)] == [3, 7]


# ---- preprocessing -------------------------------------------------------------------


def test_pixels_are_normalised_per_channel() -> None:
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    x = Preprocessing(mean=(0.5, 0.5, 0.1), std=(0.5, 0.25, 1.0)).apply(pixels)
    torch.testing.assert_close(x.flatten(), torch.tensor([-1.0, 2.0, 0.1]))


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"image_mean": [0.5], "image_std": [0.2]}, Preprocessing(None, None, (0.5,), (0.2,))),
        ({"do_normalize": False, "size": {"height": 4, "width": 5}}, Preprocessing((4, 5))),
        (
            {"size": {"shortest_edge": 8}, "do_center_crop": True, "crop_size": 6},
            Preprocessing((6, 6), 8),
        ),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, Preprocessing((224, 224), 256)),
        ({"size": 7, "do_resize": True}, Preprocessing((7, 7))),
        ({"size": 7, "do_resize": False}, Preprocessing()),
    ],
)  # fmt: skip
def test_a_checkpoint_says_how_pictures_are_prepared(
    record: dict[str, Any], wanted: Preprocessing, write: Write, tmp_path: Path
) -> None:
    write(FILE, json.dumps(record))
    assert Preprocessing.of_folder(tmp_path) == wanted
    assert eval(repr(wanted)) == wanted


@pytest.mark.parametrize("record", [{"image_mean": [0.5]}, {"rescale_factor": 1.0}, {"size": {}}])
def test_a_preprocessor_that_makes_no_sense_is_refused(
    record: dict[str, Any], write: Write, tmp_path: Path
) -> None:
    write(FILE, json.dumps(record))
    with pytest.raises(FormatError, match="cannot be understood"):
        Preprocessing.of_folder(tmp_path)


def test_the_centre_is_cut_out_of_the_resized_picture() -> None:
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 255
    fitted = Preprocessing(size=(4, 4), resized=4).fit(wide)
    assert fitted.shape == (3, 4, 4)
    assert fitted[:, :, 1:3].min() > 200
    assert Preprocessing(size=(4, 8)).fit(wide).shape == (3, 4, 8)


def test_grey_and_colour_become_each_other() -> None:
    grey, colour = picture(9, channels=1)[..., None].astype(np.uint8), picture(9).astype(np.uint8)
    assert torch.equal(Preprocessing(channels=3).fit(grey), Preprocessing().fit(colour))
    assert torch.equal(Preprocessing(channels=1).fit(colour), Preprocessing().fit(grey))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 2}, "channels=2; want 1"), ({"std": 0.0}, "want a std > 0"),
        ({"objective": "beauty"}, "objective='beauty'"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        tasks.get("digits", **options)


# ---- models --------------------------------------------------------------------------


def test_a_wrong_number_of_channels_is_refused(digits: ImageClassification) -> None:
    with pytest.raises(BadInput, match="takes 3 channels, the pictures of 'digits' have 1; give"):
        digits.prepare(loaded(network(channels=3)))
    coloured = tasks.get("digits", channels=3)
    model = coloured.prepare(loaded(network(channels=3)))
    assert coloured.losses(model, coloured.batch(coloured.split("dev")[:2]))[0].shape == (2,)


def test_mean_and_std_for_other_channels_are_refused() -> None:
    with pytest.raises(DataError, match="pictures have 1 channels, mean and std are for 3"):
        tasks.get("digits", mean=[0.5] * 3).prepare(loaded(network()))


def test_a_model_of_texts_is_refused(digits: ImageClassification) -> None:
    with pytest.raises(BadInput, match="model of kind 'causal' does not take"):
        digits.prepare(loaded(network(), "causal"))


def test_too_few_logits_are_refused(digits: ImageClassification) -> None:
    model = digits.prepare(loaded(network(labels=3)))
    with pytest.raises(BadInput, match=r"gives \(2, 3\) for 2 pictures"):
        digits.losses(model, digits.batch(digits.split("dev")[:2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_cross_entropy_in_float32(
    digits: ImageClassification, dtype: torch.dtype
) -> None:
    model = digits.prepare(loaded(network().to(dtype)))
    batch = digits.batch(digits.split("dev")[:7])
    loss, weight = digits.losses(model, batch)
    logits = model((batch["pixels"].float() / 255).to(dtype)).float()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, F.cross_entropy(logits, batch["label"], reduction="none"), rtol=2e-2, atol=2e-2
    )
    assert torch.equal(weight, torch.ones(7))


def test_a_stacked_batch_gives_each_copy_its_losses(digits: ImageClassification) -> None:
    model = digits.prepare(loaded(network()))
    batch = digits.batch(digits.split("dev")[:4])
    once, _ = digits.losses(model, batch)
    thrice, _ = digits.losses(model, batch.repeat(3))
    torch.testing.assert_close(thrice, once.repeat(3))


def test_an_evaluation_does_not_depend_on_its_batches(digits: ImageClassification) -> None:
    model, rows = digits.prepare(loaded(network())), digits.split("dev")[:30]
    found = [digits.evaluate(model, rows, size) for size in (1, 7, 30)]
    assert found[0].keys() == {"loss", "accuracy", "macro_f1"}
    for numbers in found[1:]:
        assert numbers == pytest.approx(found[0], abs=1e-5)


def test_pictures_of_different_sizes_want_a_size() -> None:
    held = Arrays({"a": np.zeros((1, 4, 4), np.uint8), "b": np.zeros((1, 5, 5), np.uint8)})
    rows = [{"image": "a/0", "label": 0}, {"image": "b/0", "label": 1}]
    task = ImageClassification({"train": rows}, held, ["x", "y"])
    with pytest.raises(DataError, match=r"differ in shape: .* give size="):
        task.batch(rows)
    task = ImageClassification({"train": rows}, held, ["x", "y"], size=3)
    assert task.batch(rows)["pixels"].shape == (2, 1, 3, 3)
