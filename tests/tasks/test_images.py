"""Folders of images. Run: pytest tests/tasks/test_images.py"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zotune.errors import DataError
from zotune.tasks.images import image_tables, read_image


def save(path: Path, mode: str = "RGB", size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)
    return path


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_pixel_becomes_grey_or_rgb(tmp_path: Path, mode: str, channels: int) -> None:
    found = read_image(save(tmp_path / "a.png", mode), (8, 8), channels)
    assert found.shape == (channels, 8, 8)
    assert found.dtype.is_floating_point is False


def test_an_image_is_scaled_to_cover_and_its_middle_is_kept(tmp_path: Path) -> None:
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 200
    pixels[:, :8, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    found = read_image(tmp_path / "wide.png", (8, 8), 3)
    assert (found == 200).all()
    assert read_image(tmp_path / "wide.png", (4, 12), 3).shape == (3, 4, 12)


def test_transparent_parts_are_white_and_exif_turns(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png", (4, 4), 3) == 255).all()
    pixels = np.zeros((4, 4), np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[274] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    found = read_image(tmp_path / "turned.png", (4, 4), 1)[0]
    assert found[3].min() == 255
    assert found[:3].max() == 0


def test_what_is_no_whole_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(DataError, match=r"text\.png is not a readable image"):
        read_image(tmp_path / "text.png", (4, 4), 3)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:900])
    with pytest.raises(DataError, match=r"cut\.jpg is not a readable image .*truncated"):
        read_image(tmp_path / "cut.jpg", (4, 4), 3)


def test_an_image_that_would_fill_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match="decompression bomb"):
        read_image(save(tmp_path / "huge.png", size=(9, 9)), (4, 4), 3)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_captions_come_from_metadata_or_from_text_beside(tmp_path: Path, name: str) -> None:
    for image in ("a.png", "in/b.png", "c.png"):
        save(tmp_path / image)
    rows = {
        "metadata.jsonl": '{"file_name": "a.png", "text": "one"}\n'
        '{"file_name": "in/b.png", "caption": "two"}\n',
        "metadata.csv": "file_name,text\na.png,one\nin/b.png,two\n",
    }
    (tmp_path / name).write_text(rows[name])
    (tmp_path / "c.txt").write_text("three \n")
    (table,) = image_tables(tmp_path).values()
    found = {row["image"]: row["text"] for row in table}
    assert found == {"a.png": "one", "in/b.png": "two", "c.png": "three"}


def test_an_image_without_a_caption_has_none(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    assert image_tables(tmp_path)["train"][0]["text"] is None


def test_subfolders_are_splits(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        save(tmp_path / split / "a.png")
    tables = image_tables(tmp_path)
    assert list(tables) == ["train", "dev", "test"]
    assert tables["dev"][0]["image"] == "validation/a.png"


def test_metadata_that_names_other_files_is_refused_with_its_line(tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png")
    for line in ('{"file_name": "b.png", "text": "x"}', '{"file_name": "../a.png", "text": "x"}',
                 '{"file_name": "a.png"}'):  # fmt: skip
        (tmp_path / "in" / "metadata.jsonl").write_text(line)
        with pytest.raises(DataError, match=r"metadata\.jsonl, line 1: want file_name"):
            image_tables(tmp_path / "in")


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images"):
        image_tables(tmp_path)
    with pytest.raises(DataError, match="no such folder of images"):
        image_tables(tmp_path / "absent")
