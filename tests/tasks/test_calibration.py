"""Windows of text for calibration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tasks.tiny import llama, make_tokenizer

from zotune.errors import BadInput, DataError
from zotune.models import Loaded
from zotune.tasks.calibration import calibration

TEXT = "the film was great fun and I liked it a lot\n" * 40


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return llama(make_tokenizer())


@pytest.mark.parametrize(("samples", "rows"), [(1, 1), (6, 6), (7, 7), (9, 3), (11, 1), (16, 8)])
def test_batches_have_one_shape_and_hold_so_many_windows(
    loaded: Loaded, samples: int, rows: int
) -> None:
    found = calibration(loaded, [{"text": TEXT}], samples, 8)
    assert {tuple(batch.shape) for batch in found} == {(rows, 8)}
    assert sum(map(len, found)) == samples


def test_windows_are_pieces_of_the_text_spread_over_it(loaded: Loaded) -> None:
    ids = loaded.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    found = torch.cat(calibration(loaded, [{"text": TEXT}], 4, 9))
    text = " ".join(map(str, ids))
    starts = []
    for row in found.tolist():
        own = row[1:] if row[0] == loaded.tokenizer.bos_token_id else row
        assert " ".join(map(str, own)) in text
        starts.append(tuple(own))
    assert torch.equal(found, torch.cat(calibration(loaded, [{"text": TEXT}], 4, 9)))


def test_files_of_lines_and_rows_and_the_shipped_text_are_read(
    loaded: Loaded, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, rows = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text(TEXT)
    rows.write_text("".join(json.dumps({"words": line}) + "\n" for line in TEXT.splitlines()))
    assert sum(map(len, calibration(loaded, str(plain), 8, 8))) == 8
    assert sum(map(len, calibration(loaded, rows, 8, 8, field="words"))) == 8
    with caplog.at_level("WARNING"):
        assert calibration(loaded, samples=2, length=8)
    assert "give --data" in caplog.text


def test_a_short_text_is_one_short_window(loaded: Loaded) -> None:
    (batch,) = calibration(loaded, [{"text": "the film was great"}], 8, 16)
    assert batch.shape[0] == 1
    assert 3 < batch.shape[1] < 16


def test_no_text_and_wrong_columns_are_said(loaded: Loaded, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text"):
        calibration(loaded, [{"text": "  "}])
    empty = tmp_path / "a.txt"
    empty.write_text("\n\n")
    with pytest.raises(DataError, match=r"no text|empty"):
        calibration(loaded, str(empty))
    with pytest.raises(DataError, match="text-field"):
        calibration(loaded, [{"words": "a"}])
    with pytest.raises(BadInput, match="samples=0"):
        calibration(loaded, [{"text": TEXT}], samples=0)
    with pytest.raises(BadInput, match="max_length=1"):
        calibration(loaded, [{"text": TEXT}], length=1)
