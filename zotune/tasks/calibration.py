"""Text to look at: token windows of one length, spread over a text, without padding."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from zotune.errors import BadInput, DataError
from zotune.tasks.data import read_text
from zotune.tasks.encoding import TextEncoder, length_limit
from zotune.tasks.labels import pick_split
from zotune.tasks.sources import Data, load

if TYPE_CHECKING:
    from zotune.models import Loaded

log = logging.getLogger("zotune")
# Rows that go through the model at once.
ROWS: Final = 8
SHIPPED: Final = "tickets/train.jsonl"


def calibration(
    loaded: Loaded, data: Data = "", samples: int = 128, length: int = 512, field: str = "text"
) -> list[Tensor]:
    """Batches of token ids (rows, length), all of one shape.

    Documents (rows; a .txt file is one) are joined and cut into windows of `length` tokens, of
    which `samples` are taken at equal distances. Less text than a window is one shorter window.

    Args:
        data: a file (.txt, .jsonl, ...), a folder, a `datasets` name, rows {field: text}; empty for
            the shipped tickets, which are for trying out only.
        samples: windows.
        length: tokens of a window, at most what the model takes.

    Raises:
        DataError: no text, or unreadable.
        BadInput: numbers out of range, or no tokenizer.
    """
    if samples < 1:
        raise BadInput(f"samples={samples}; want 1 or more windows")
    own = length_limit(loaded, None)
    encoder = TextEncoder(loaded.tokenizer, length_limit(loaded, min(length, own)))
    stream = _stream(encoder, _texts(data, field))
    room = min(encoder.limit - len(encoder.head), len(stream))
    windows = [stream[k : k + room] for k in range(0, len(stream) - room + 1, room)]
    count = min(samples, len(windows))
    if count < samples:
        log.info("the text gives %d windows of %d tokens for calibration", count, room)
    chosen = [encoder.head + windows[k * len(windows) // count] for k in range(count)]
    rows = max(k for k in range(1, ROWS + 1) if count % k == 0)
    return [torch.tensor(chosen[k : k + rows]) for k in range(0, count, rows)]


def _texts(data: Data, field: str) -> list[str]:
    """The texts of the train split, or of the only one."""
    if isinstance(data, str) and not data:
        log.warning(
            "calibration looks at the shipped tickets; give --data with text like the model's own"
        )
        data = str(files("zotune.tasks") / SHIPPED)
    path = Path(data).expanduser() if isinstance(data, str | Path) else None
    if path is not None and path.suffix == ".txt" and path.is_file():
        return _full([read_text(path)], data)
    tables = load(data)
    rows = tables["train"] if "train" in tables else pick_split(tables, next(iter(tables)))
    missing = [row for row in rows if not isinstance(row.get(field), str)]
    if missing:
        raise DataError(
            f"a row of {data} has no text in {field!r}; it has {sorted(missing[0])}: "
            "name the column with --text-field"
        )
    return _full([str(row[field]) for row in rows], data)


def _full(texts: Sequence[str], data: Data) -> list[str]:
    found = [text.strip() for text in texts if text.strip()]
    if not found:
        raise DataError(f"{data} holds no text to calibrate on; give another file")
    return found


def _stream(encoder: TextEncoder, texts: Sequence[str]) -> list[int]:
    """One sequence of tokens, EOS between documents."""
    between = [] if encoder.eos is None else [encoder.eos]
    ids = [i for text in texts for i in (*encoder.raw(text), *between)]
    if not ids:
        raise DataError("the tokenizer makes no tokens of the text; give another file")
    return ids
