"""Flags and YAML: jsonargparse reads signatures; short names are spelled out before that."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from zotune.errors import BadInput
from zotune.training.config import full_name, normalised

Commands = Mapping[str, tuple[Any, Any, str]]
_FREE = {"help", "print_config", "version"}


class Parser(ArgumentParser):
    """Errors are ours: one line, exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[override]
        raise BadInput(" ".join(str(message).split()))


def build_parser(commands: Commands) -> Parser:
    """One subcommand per command: fields of its configuration, then its own parameters."""
    import zotune

    parser = Parser(
        prog="zotune",
        description="Train quantized checkpoints with forward passes only.",
        version=zotune.__version__,
    )
    children = parser.add_subcommands(required=False)
    for name, (function, config, summary) in commands.items():
        child = Parser(description=summary)
        child.add_argument("--config", action="config", help="YAML file; flags after it win")
        if config is not None:
            child.add_class_arguments(config, as_group=False)
        child.add_function_arguments(
            function, as_group=False, skip={"config"} if config is not None else None,
            as_positional=True,
        )  # fmt: skip
        child.add_argument(
            "--json", type=bool, default=False, help="print one JSON object and nothing else"
        )
        children.add_subcommand(name, child, help=summary)
    return parser


def options(command: tuple[Any, Any, str]) -> dict[str, Any]:
    """Option names of a command with their annotations as text."""
    function, config, _ = command
    found = {f.name: str(f.type) for f in fields(config)} if config is not None else {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name != "config" or config is None:
            found[name] = str(parameter.annotation)
    return {**found, "json": "bool", "config": "str"}


def normalise(argv: list[str], commands: Commands) -> list[str]:
    """Full option names, `true` for bare flags, YAML files as text with full names.

    Raises:
        BadInput: unknown command or option; the nearest is offered.
    """
    where = next((i for i, word in enumerate(argv) if not word.startswith("-")), None)
    if where is None:
        return argv
    name, rest = argv[where], argv[where + 1 :]
    if name not in commands:
        from zotune.core.calls import nearest

        raise BadInput(f"unknown command {name!r}{nearest(name, commands)}")
    known = options(commands[name])
    out: list[str] = []
    for index, word in enumerate(rest):
        out += _word(word, rest[index + 1 : index + 2], known)
    return [*argv[: where + 1], *_configs(_with_run(out), known)]


def _word(word: str, following: list[str], known: dict[str, Any]) -> list[str]:
    if not word.startswith("--") or word == "--":
        return [word]
    key, equals, value = word[2:].partition("=")
    if key.split(".")[0].replace("-", "_") in _FREE:
        return [word]
    key, dot, rest = key.partition(".")
    name = full_name(key.rstrip("+"), list(known))
    bare = not equals and (not following or following[0].startswith("--"))
    if bare and known[name].startswith("bool"):
        return [f"--{name}=true"]
    plus = "+" if key.endswith("+") else ""
    return [f"--{name}{plus}{dot}{rest}{equals}{value}"]


def _with_run(words: list[str]) -> list[str]:
    """--resume takes the run's own configuration as its first one: no flag needs repeating."""
    given = {w.partition("=")[0]: w.partition("=")[2] for w in words if w.startswith("--")}
    for index, word in enumerate(words[:-1]):
        if word in ("--resume_from_checkpoint", "--output_dir"):
            given[word] = words[index + 1]
    run = given.get("--resume_from_checkpoint", "false")
    if run.lower() in ("false", "null"):
        return words
    named = run.lower() != "true"
    folder = Path(run if named else given.get("--output_dir", "")).expanduser()
    if not (folder / "config.yaml").is_file():
        return [*words, f"--output_dir={folder}"] if named else words
    out = ["--config", str(folder / "config.yaml"), f"--output_dir={folder}"]
    return [*out, *words]


def _configs(words: list[str], known: dict[str, Any]) -> list[str]:
    out: list[str] = []
    index = 0
    while index < len(words):
        word = words[index]
        if word == "--config" and index + 1 < len(words):
            word, index = f"--config={words[index + 1]}", index + 1
        if word.startswith("--config="):
            word = "--config=" + json.dumps(read_yaml(word.removeprefix("--config="), list(known)))
        out.append(word)
        index += 1
    return out


def read_yaml(path: str, known: list[str]) -> dict[str, Any]:
    """A YAML file's keys with their full names.

    Raises:
        BadInput: no such file, malformed YAML, not a mapping, or an unknown key.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise BadInput(f"{path} holds a {type(values).__name__}; want keys and values")
    try:
        return normalised(values, [n for n in known if n not in ("config", "json")])
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
