"""Short calls in text, such as "adapter(rank=4) + head": parsed as literals, never evaluated."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterable
from typing import Any

from zotune.errors import BadInput


def split_calls(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names with keyword literals, joined by +; a dash in a name reads as an underscore.

    >>> split_calls("qzo(eps=0.01) + head")
    [('qzo', {'eps': 0.01}), ('head', {})]
    """
    try:
        tree: ast.expr = ast.parse(_dashes_to_underscores(text.strip()), mode="eval").body
    except SyntaxError as error:
        raise BadInput(f"cannot read {text!r}: want name(option=value) + name") from error
    terms: list[ast.expr] = []
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        terms.append(tree.right)
        tree = tree.left
    terms.append(tree)
    return [_call(term, text) for term in reversed(terms)]


def _dashes_to_underscores(text: str) -> str:
    """zo-adam is a name here, not a subtraction; quoted strings and 1e-3 stay as they are."""
    pieces = re.split(r"('[^']*'|\"[^\"]*\")", text)
    pieces[::2] = [re.sub(r"(?<=\w)-(?=[a-zA-Z])", "_", piece) for piece in pieces[::2]]
    return "".join(pieces)


def _call(term: ast.expr, text: str) -> tuple[str, dict[str, Any]]:
    name = term.func if isinstance(term, ast.Call) else term
    keywords = term.keywords if isinstance(term, ast.Call) else []
    positional = term.args if isinstance(term, ast.Call) else []
    if positional or any(k.arg is None for k in keywords):
        raise BadInput(f"cannot read {text!r}: options are written name=value")
    try:
        return _name(name), {str(k.arg): ast.literal_eval(k.value) for k in keywords}
    except ValueError as error:
        raise BadInput(f"cannot read {text!r}: want name(option=value) + name") from error


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    raise ValueError(node)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest ones, and all.

    >>> nearest("scale", ["scales", "head"])
    '; did you mean scales? There are: head, scales'
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else "."
    return f"{hint} There are: {', '.join(known)}"
