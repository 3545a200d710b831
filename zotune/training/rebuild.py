"""Replay: base model + journal = tuned model, without data, task or a single forward pass.

A run whose start was searched (`zotune.training.qat`) searches it again, on the examples that its
configuration names; its steps are replayed as any other's.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from zotune.core.backprop import Backprop
from zotune.core.method import Method
from zotune.core.space import SpaceSpec
from zotune.core.step import Tuner
from zotune.errors import BadInput, JournalError
from zotune.models import Loaded, PooledClassifier, fingerprint
from zotune.models.encoder import linear_of
from zotune.quant.export import Exporter
from zotune.tasks.task import Task
from zotune.training.folders import (
    from_module,
    load_model,
    need_empty,
    round_to_storage_,
    use_threads,
    write_model,
)
from zotune.training.freezing.plan import frozen_names
from zotune.training.header import check_base, check_noise, read_record, rebuild_space
from zotune.training.journal import Journal
from zotune.training.preparation import again_
from zotune.training.resume import replay_
from zotune.training.settings import EvalConfig
from zotune.training.streaming import Streaming

log = logging.getLogger("zotune")
MAX_HEAD = 1 << 30  # numbers of a head that a journal may ask for


def replay(
    run: str | Path,
    model: str | Path | nn.Module | Loaded,
    out: str | Path | None = None,
    *,
    steps: int | None = None,
    repair: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    trust_remote_code: bool = False,
    stream: bool | Literal["auto"] = False,
    memory_limit: str | None = None,
    offload_folder: str | None = None,
    task: Task | None = None,
) -> dict[str, Any]:
    """Rebuild a run's tuned model from its base and its journal alone.

    Args:
        run: the run folder, or the journal file itself.
        model: the base model the run started from; a folder, hub id or module (changed in place).
        out: where to save it; None to leave it in memory (a module).
        steps: rebuild the state after so many steps; what the run kept (its last step, or its best)
            when None.
        repair: go on with the good part of a damaged or unfinished journal.
        stream, memory_limit, offload_folder: as `TrainConfig`'s.
        threads: as many as the run had when None.
        task: of a run whose start is searched on a task that was given as an object.

    Raises:
        JournalError: damaged journal, another base, or a run by backprop.
    """
    journal = Journal.read(run, repair=repair)
    use_threads(threads if threads is not None else journal.header["config"].get("threads"))
    check_noise(journal)
    method = _method(journal)
    count = _count(journal, steps, repair)
    module = model if isinstance(model, nn.Module | Loaded) else None
    where = EvalConfig(
        "" if module is not None else str(model), trust_remote_code=trust_remote_code,
        device=device, stream=stream, memory_limit=memory_limit, offload_folder=offload_folder,
    )  # fmt: skip
    streaming = Streaming.of(where, module)
    loaded = _base(journal, model, device, trust_remote_code, streaming)
    loaded, to = again_(loaded, journal.header, task)
    with nullcontext() if streaming is None else streaming.running(loaded.model):
        check_base(journal, fingerprint(loaded.model))
        prepared = _wrapped(loaded, journal)
        tuner = _tuned(prepared, journal, method, count, streaming)
        round_to_storage_(prepared)
        folder = Path(out).expanduser() if out is not None else None
        if folder is not None:
            _save(prepared, folder, loaded, to)
        tuned = fingerprint(prepared)
    return {
        "out": str(folder) if folder is not None else None,
        "steps": count,
        "applied": tuner.applied,
        "method": journal.header["method"],
        "space": journal.header["space"],
        "base": journal.header["base"],
        "journal_bytes": journal.path.stat().st_size,
        "tuned_fingerprint": tuned,
    }


def _tuned(
    model: nn.Module, journal: Journal, method: Method, count: int, streaming: Streaming | None
) -> Tuner:
    """The model moved by the journal's first `count` steps."""
    space = rebuild_space(model, read_record(journal.header["space"], SpaceSpec), journal)
    if streaming is not None:
        streaming.own_(space, method)
    tuner = Tuner(space, method, int(journal.header["seed"]), total=int(journal.header["total"]))
    if not tuner.replayable:
        raise JournalError(
            f"{journal.path}: this run cannot be replayed from its journal: its directions or "
            "gradients come from the data's activations; use the run's own model"
        )
    if streaming is not None:
        streaming.serve_(tuner)
    freezes, levels = dict(journal.freezes), journal.header.get("levels", {})

    def before(step: int) -> None:
        if step in freezes:
            tuner.freeze_(frozen_names(levels, freezes[step]))

    replay_(tuner, journal.records[:count], before)
    return tuner


def _save(model: nn.Module, folder: Path, loaded: Loaded, to: Exporter | None) -> None:
    need_empty(folder)
    write_model(model, folder, loaded, to)


def _method(journal: Journal) -> Method:
    method = read_record(journal.header["method"], (Method, Backprop))
    if not isinstance(method, Method):
        raise JournalError(
            f"{journal.path}: a run by backprop ({method.name}) cannot be replayed: its gradients "
            "are not in the journal, only its losses; use the run's own model"
        )
    return method


def _count(journal: Journal, steps: int | None, repair: bool) -> int:
    if steps is not None:
        if not 0 <= steps <= len(journal.records):
            raise BadInput(f"steps={steps}; the journal holds {len(journal.records)}")
        return steps
    if journal.kept is not None:
        return journal.kept
    if not repair:
        raise JournalError(
            f"{journal.path} holds {len(journal.records)} of {journal.header['total']} steps "
            "and no end mark: the run has not ended, or the journal was cut off. --resume ends "
            "the run; --repair rebuilds what is there"
        )
    return len(journal.records)


def _base(
    journal: Journal,
    model: str | Path | nn.Module | Loaded,
    device: str,
    trust_remote_code: bool,
    streaming: Streaming | None,
) -> Loaded:
    if isinstance(model, nn.Module | Loaded):
        return from_module(model)
    config = journal.header["config"]
    options = {
        "kind": journal.header["kind"] if journal.header["kind"] != "module" else "auto",
        "dtype": config["dtype"],
        "compute_dtype": config["compute_dtype"],
        "trust_remote_code": trust_remote_code,
        "device": device,
        "shelf": None if streaming is None else streaming.store,
    }
    from zotune.models.load import find_folder
    from zotune.models.pipeline import model_folder
    from zotune.quant import formats

    folder = find_folder(model, trust_remote_code)
    scheme = config["scheme"] if formats.detect(model_folder(folder)) == "float" else None
    return load_model(folder, scheme=scheme, **options)


def _wrapped(loaded: Loaded, journal: Journal) -> nn.Module:
    """The head that the task put on an encoder; its numbers are in the attachments."""
    labels = journal.header["labels"]
    if labels is None:
        return loaded.model
    rows, columns = journal.header["head"]
    if rows != len(labels) or not 0 < rows * columns < MAX_HEAD:
        raise JournalError(f"{journal.path} names {len(labels)} labels but a head of {rows}")
    device = next(loaded.model.parameters()).device
    zeros = torch.zeros(rows, columns, device=device)
    return PooledClassifier(loaded.model, labels, linear_of(zeros, zeros.new_zeros(rows))).eval()
