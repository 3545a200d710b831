"""The command line: train, eval, quantize, attack, replay, bench, list, doctor.

Signatures become flags and YAML keys through jsonargparse; nothing heavy is imported before a
command runs.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import Any

from zotune.errors import ZotuneError

Command = Callable[..., dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for errors of the user's, 1 for ours."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _quiet()
    try:
        return _run(argv)
    except ZotuneError as error:
        return _failed(str(error), 2)
    except OSError as error:
        return _failed(f"{error.filename or 'the system'}: {error.strerror or error}", 2)
    except KeyboardInterrupt:
        return _failed("interrupted", 130)
    except Exception as error:
        return _failed(f"{type(error).__name__}: {error} (ZOTUNE_DEBUG=1 shows where)", 1)


def _run(argv: list[str]) -> int:
    from zotune.cli.commands import COMMANDS
    from zotune.cli.flags import build_parser, normalise
    from zotune.cli.output import show

    parser = build_parser(COMMANDS)
    parsed = parser.parse_args(normalise(argv, COMMANDS))
    name = parsed.subcommand
    if name is None:
        parser.print_help()
        return 0
    values = {k: v for k, v in vars(parsed[name]).items() if k not in ("config", "json")}
    as_json = bool(parsed[name].json)
    command, config, _ = COMMANDS[name]
    with redirect_stdout(sys.stderr):  # libraries may print; standard output is ours
        found = command(**_arguments(config, values))
    if as_json:
        from zotune.training.report import plain

        print(json.dumps(plain(found), default=str))
    else:
        show(name, found)
    return 0


def _arguments(config: Any, values: dict[str, Any]) -> dict[str, Any]:
    """A dataclass's fields become one argument, `config`; the rest stay as they are."""
    if config is None:
        return values
    fields = {k: values.pop(k) for k in list(values) if k in config.__dataclass_fields__}
    return {"config": config(**fields), **values}


def _failed(text: str, code: int) -> int:
    if os.environ.get("ZOTUNE_DEBUG") == "1":
        traceback.print_exc()
    print("error: " + " ".join(text.split("\n")), file=sys.stderr)
    return code


class _Stderr(logging.StreamHandler[Any]):
    """Writes to whatever standard error is now: a progress bar puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _quiet() -> None:
    """Our log on standard error, plain; other libraries say only what is wrong."""
    # Torch's OpenMP threads spin between products and starve whoever shares the cores: waiting
    # asleep made a step ten times faster on a busy two-core machine. Read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    log = logging.getLogger("zotune")
    for old in list(log.handlers):
        log.removeHandler(old)
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
