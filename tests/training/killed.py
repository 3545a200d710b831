"""A run that is killed again and again; `test_kill.py` starts it as a process of its own.

Prints "same" when the killed and resumed run ends with the weights and records of the whole one.
The children are forked so that 20 of them cost seconds; SIGKILL gives none of them a last word.
"""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[n]) for n in (1, 2)]

import torch  # noqa: E402
import toys  # noqa: E402
from training import lab  # noqa: E402

from zotune.training.journal import NAME, Journal  # noqa: E402
from zotune.training.loop import train  # noqa: E402

KILLS, STEPS = 20, 600


def child(out: Path, kind: str, resume: bool) -> int:
    """Train in a fork; returns its process id."""
    process = os.fork()
    if process:
        return process
    try:
        torch.set_num_threads(1)
        streamed = kind == "streamed"
        config = lab.config(
            out, "mezo" if streamed else kind, max_steps=STEPS, save_steps=37, logging_steps=10,
            journal_sync=1, memory_limit=lab.TIGHT if streamed and resume else None,
        )  # fmt: skip
        config = dataclasses.replace(config, resume_from_checkpoint=resume or None)
        model = toys.layered() if streamed else toys.small()
        train(config, model=model, task=lab.task())
        (out / "digest").write_text(repr(toys.digest(model)))
    except BaseException as error:
        print(type(error).__name__, error, flush=True)
        os._exit(1)
    os._exit(0)


def main(folder: Path, kind: str) -> None:
    torch.set_num_threads(1)
    train(
        lab.config(folder / "warm", "mezo"), model=toys.small(), task=lab.task()
    )  # compiles kernels
    began = time.monotonic()
    assert os.waitpid(child(folder / "whole", kind, False), 0)[1] == 0
    longest = 3 * (time.monotonic() - began) / KILLS
    chance, kills, places = random.Random(0), 0, []
    while True:
        process = child(folder / "killed", kind, True)
        if kills == KILLS:
            assert os.waitpid(process, 0)[1] == 0
            break
        time.sleep(chance.uniform(0.02, longest))
        os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        assert os.WIFSIGNALED(status) or status == 0, "the resumed run failed"
        kills += 1
        if (folder / "killed" / NAME).exists():
            places.append(len(Journal.read(folder / "killed", torn=True).records))
    a, b = (Journal.read(folder / name).path.parent for name in ("whole", "killed"))
    same = (a / "digest").read_text() == (b / "digest").read_text()
    records = [Journal.read(path).records for path in (a, b)]
    print("same" if same and records[0] == records[1] else "different", "killed after", places)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
