"""Where the rows of the named tasks are found.

Rows come from ZOTUNE_DATA/text where those files are, else from the hub. Where a benchmark's test
labels are not public its official validation rows are our "test", and "dev" is held out of train.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zotune.errors import DataError
from zotune.tasks import readers
from zotune.tasks.data import Row, Table, hold_out, read_table
from zotune.tasks.sources import Data, Sizes, Tables, data_root, load, load_hub

log = logging.getLogger("zotune")


@dataclass(frozen=True)
class Local:
    """Files of one data set under <root>/text: split to path, and the function that reads one."""

    files: Mapping[str, str]
    read: Callable[[Path], Table] = read_table

    def find(self, root: Path) -> Path | None:
        """<root>/text or <root> itself, whichever holds all the files."""
        for base in (root / "text", root):
            if all((base / path).is_file() for path in self.files.values()):
                return base
        return None

    def tables(self, base: Path) -> Tables:
        """Every split, read."""
        return {split: self.read(base / path) for split, path in self.files.items()}


@dataclass(frozen=True)
class Hub:
    """A data set on the hub; `splits` maps ours to its names."""

    name: str
    config: str | None = None
    splits: Mapping[str, str] = field(
        default_factory=lambda: {"train": "train", "dev": "validation", "test": "test"}
    )


@dataclass(frozen=True)
class Source:
    """Where a named task's rows come from, and how a row of any layout becomes ours."""

    row: Callable[[Row], Row]
    local: Local | None = None
    hub: Hub | None = None
    group: Callable[[Row], Any] | None = None
    test_share: float = 0.0
    """Share of the rows held out as test where a source has no test file."""
    first_test: int = 0
    """Rows at the beginning of the file that are the test split."""

    def tables(
        self,
        name: str,
        data: Data | None,
        encoding: str,
        sizes: Sizes,
        columns: str | Sequence[str] = (),
    ) -> Tables:
        """The splits of `data`, of the local files, or of the hub, in that order.

        Raises:
            DataError: none of them can be read.
        """
        raw = self._raw(name, data, encoding, columns)
        tables = {split: rows.map(self.row) for split, rows in raw.items()}
        tables = {split: _labelled_only(rows) for split, rows in tables.items()}
        return sizes.apply({k: v for k, v in tables.items() if len(v)}, self.group)

    def _raw(
        self, name: str, data: Data | None, encoding: str, columns: str | Sequence[str]
    ) -> Tables:
        if data is None:
            root = data_root()
            base = self.local.find(root) if root and self.local else None
            if base is None:
                return self._from_hub(name)
            return self._own_files(name, base)
        if isinstance(data, str | Path) and self.local:
            base = self.local.find(Path(data).expanduser())
            if base is not None:
                return self._own_files(name, base)
        return load(data, encoding, columns)

    def _own_files(self, name: str, base: Path) -> Tables:
        assert self.local is not None
        tables = self.local.tables(base)
        train = tables["train"]
        if self.first_test:
            rows = range(len(train))
            tables["test"] = train.take(rows[: self.first_test])
            tables["train"] = train.take(rows[self.first_test :])
        elif "test" not in tables and self.test_share:
            count = round(self.test_share * len(train))
            tables["train"], tables["test"] = hold_out(train, count, "test", self.group)
        if Path(self.local.files["train"]).stem in ("test", "valid"):
            log.warning("%s: the local files have no train split; using %s", name, train.source)
        return tables

    def _from_hub(self, name: str) -> Tables:
        if self.hub is None:
            raise DataError(
                f"task {name!r} needs a local folder: data=<folder>, or set ZOTUNE_DATA"
            )
        return load_hub(self.hub.name, self.hub.config, self.hub.splits)


def _labelled_only(rows: Table) -> Table:
    """Rows whose label is known; the hub marks hidden and missing labels with -1, SNLI with '-'."""
    keep = [i for i, row in enumerate(rows) if str(row.get("label", "")) not in ("-1", "-")]
    if len(keep) < len(rows):
        log.warning("%s: %d rows without a label are left out", rows.source, len(rows) - len(keep))
    return rows.take(keep)


SST = {"train": "stsa.fine.train", "dev": "stsa.fine.dev", "test": "stsa.fine.test"}


def _super(name: str) -> Local:
    folder = f"superglue/{name}"
    return Local({"train": f"{folder}/train.jsonl", "test": f"{folder}/val.jsonl"})


def _fewglue(name: str, read: Callable[[Path], Table] = read_table) -> Local:
    files = {"train": "train", "dev": "dev32", "test": "val"}
    paths = {split: f"fewglue_32dev/{name}/{file}.jsonl" for split, file in files.items()}
    return Local(paths, read)


def _super_hub(config: str) -> Hub:
    return Hub("aps/super_glue", config, {"train": "train", "test": "validation"})


SOURCES: dict[str, Source] = {
    "sst2": Source(
        readers.text_row,
        Local(
            {
                "train": "glue-sst2/train_full.tsv",
                "dev": "glue-sst2/dev.tsv",
                "test": "glue-sst2/test-labeled.tsv",
            }
        ),
        Hub("stanfordnlp/sst2", None, {"train": "train", "test": "validation"}),
    ),
    "sst5": Source(
        readers.text_row,
        Local({split: f"sent-conv/{file}" for split, file in SST.items()}, readers.label_first),
        Hub("SetFit/sst5"),
    ),
    "mr": Source(
        readers.text_row,
        Local({"train": "sent-conv/rt-polarity.all"}, readers.label_first),
        Hub("cornell-movie-review-data/rotten_tomatoes"),
        test_share=0.1,
    ),
    "trec": Source(
        readers.trec_row,
        Local({"train": "trec-raw/train.txt", "test": "trec-raw/test.txt"}, readers.trec_lines),
        Hub("CogComp/trec", None, {"train": "train", "test": "test"}),
    ),
    "ag_news": Source(
        readers.news_row,
        Local({"train": "agnews/test.csv"}),
        Hub("fancyzhx/ag_news", None, {"train": "train", "test": "test"}),
        test_share=0.2,
    ),
    "rte": Source(readers.nli_row, _super("RTE"), _super_hub("rte")),
    "cb": Source(readers.nli_row, _super("CB"), _super_hub("cb")),
    "boolq": Source(readers.boolq_row, _fewglue("BoolQ"), _super_hub("boolq")),
    "wic": Source(readers.wic_row, _fewglue("WiC"), _super_hub("wic")),
    "wsc": Source(readers.wsc_row, _fewglue("WSC"), _super_hub("wsc.fixed")),
    "multirc": Source(
        readers.multirc_row,
        _fewglue("MultiRC", readers.multirc_file),
        _super_hub("multirc"),
        group=lambda row: row["paragraph"],
    ),
    "snli": Source(
        readers.nli_row,
        Local(
            {
                "train": "nli-10k-subsets/SNLI/train.json",
                "dev": "snli/dev.jsonl",
                "test": "snli/test.txt",
            },
            readers.nli_file,
        ),
        Hub("stanfordnlp/snli"),
    ),
    "mnli": Source(
        readers.nli_row,
        Local(
            {"train": "nli-10k-subsets/MNLI/train.json", "test": "nli-10k-subsets/MNLI/dev.json"},
            readers.nli_file,
        ),
        Hub("nyu-mll/glue", "mnli", {"train": "train", "test": "validation_matched"}),
    ),
    "copa": Source(readers.copa_row, _super("COPA"), _super_hub("copa")),
    "squad": Source(
        readers.squad_row,
        Local({"train": "xquad-en/xquad.en.json"}, readers.squad_file),
        Hub("rajpurkar/squad", None, {"train": "train", "test": "validation"}),
        group=lambda row: row["article"],
        test_share=0.2,
    ),
    "wikitext2": Source(
        readers.article_row,
        Local(
            {"train": "wikitext-2/valid.txt", "test": "wikitext-2/test.txt"},
            readers.wikitext_articles,
        ),
        Hub("Salesforce/wikitext", "wikitext-2-raw-v1"),
    ),
    "ptb": Source(
        readers.story_row,
        Local({"train": "ptb/ptb.valid.txt", "test": "ptb/ptb.test.txt"}),
    ),
    "tinystories": Source(
        readers.story_row,
        Local({"train": "tinystories1000/TinyStories-1000.txt"}),
        first_test=200,
    ),
}
