"""What no file may do, and what importing may not start. Run: pytest tests/test_hygiene.py"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import zotune
from zotune import methods
from zotune.core.estimator import Estimator
from zotune.core.perturbation import Perturbation
from zotune.core.rule import Rule
from zotune.core.shaping import Shaping
from zotune.core.space import SpaceSpec

ROOT = Path(__file__).parents[1] / "zotune"
MODULES = sorted(ROOT.rglob("*.py"))
HEAVY = [
    "transformers", "numba", "datasets", "matplotlib", "peft", "rich", "jsonargparse", "accelerate",
    "huggingface_hub", "tensorboard", "onnxruntime", "dp_accounting", "diffusers", "PIL",
]  # fmt: skip

PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}
UNSAFE = {("weights_only", False), ("trust_remote_code", True), ("allow_pickle", True)}

QUIET = """
import sys
connections = []
def note(event, args):
    if event == "socket.connect":
        connections.append(args)
sys.addaudithook(note)
{imports}
import torch
heavy = sorted(set({heavy}) & set(sys.modules))
assert not heavy, f"imported {{heavy}}"
assert not torch.cuda.is_initialized(), "CUDA was started"
assert not connections, f"connected to {{connections}}"
"""


@pytest.mark.parametrize("imports", [
    "import zotune",
    "import zotune.core.step, zotune.core.evaluator, zotune.core.nouns, zotune.models.adapter",
    "import zotune.methods; zotune.methods.entries()",
], ids=["face", "core", "methods"])  # fmt: skip
def test_importing_is_light_starts_no_gpu_and_opens_no_connection(imports: str) -> None:
    """In a process of its own, where no earlier import can hide a later one."""
    code = QUIET.format(imports=imports, heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def calls(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, last name) of every call."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            name = (
                function.attr
                if isinstance(function, ast.Attribute)
                else getattr(function, "id", "")
            )
            found.append((node.lineno, name))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_global_generator_no_pickle_and_no_code_from_strings(path: Path) -> None:
    source = path.read_text()
    tree = ast.parse(source)
    wrong = [
        f"line {line}: {name}()"
        for line, name in calls(tree)
        if name in {"manual_seed", "manual_seed_all", "seed", "set_rng_state", "eval", "exec"}
        and not (name == "eval" and f".{name}(" in source.splitlines()[line - 1])  # model.eval()
    ]
    for node in ast.walk(tree):
        modules = (
            [a.name for a in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        )  # fmt: skip
        for module in modules:
            if module.split(".")[0] in {
                "pickle",
                "cPickle",
                "dill",
                "cloudpickle",
                "joblib",
                "shelve",
            }:
                wrong.append(f"line {node.lineno}: imports {module}")  # type: ignore[attr-defined]
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            value = (node.arg, node.value.value)
            if value in {
                ("weights_only", False),
                ("trust_remote_code", True),
                ("allow_pickle", True),
            }:
                wrong.append(f"line {node.value.lineno}: {node.arg}={node.value.value}")
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            wrong.append(f"line {node.lineno}: bare except")
    loads = [line for line, name in calls(tree) if name == "load"]
    for line in loads:
        text = source.splitlines()[line - 1]
        if "torch.load(" in text and "weights_only=True" not in text:
            wrong.append(f"line {line}: torch.load without weights_only=True")
    assert not wrong, f"{path.relative_to(ROOT)}: {'; '.join(wrong)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_path_of_anybodys_machine_stands_in_the_source(path: Path) -> None:
    source = path.read_text()
    for text in ("/home/", "/tmp/", "/root/"):
        assert text not in source, f"{path.relative_to(ROOT)} mentions {text}"


def modules() -> list[str]:
    names = [m.name for m in pkgutil.walk_packages(zotune.__path__, "zotune.")]
    return ["zotune", *(n for n in names if not n.endswith("__main__"))]


@pytest.mark.parametrize("name", modules())
def test_every_module_imports_and_every_exported_name_resolves(name: str) -> None:
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", [])
    assert len(exported) == len(set(exported))
    missing = [n for n in exported if not hasattr(module, n)]
    assert not missing, f"{name}.__all__ lists {missing}"


def test_every_record_is_known_where_a_repr_is_read_back() -> None:
    for module in modules():
        importlib.import_module(module)
    known = methods.records()

    def kinds(kind: type) -> set[type]:
        below = {c for child in kind.__subclasses__() for c in kinds(child)}
        own = set() if inspect.isabstract(kind) or kind.__name__.startswith("_") else {kind}
        return below | own

    for family in (Perturbation, Estimator, Rule, Shaping, SpaceSpec):
        for kind in kinds(family):
            if kind.__module__ in modules():  # not one that another test made and removed
                assert known.get(kind.__name__) is kind


def test_method_names_are_unique() -> None:
    marked = []
    for path in (ROOT / "methods").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                isinstance(d, ast.Call) and getattr(d.func, "id", "") == "method"
                for d in node.decorator_list
            ):
                marked.append(node.name.replace("_", "-"))
    assert len(marked) == len(set(marked))
    assert set(marked) == set(methods.entries())


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.relative_to(ROOT).parts[0] in ("core", "methods")],
    ids=lambda p: str(p.relative_to(ROOT)),
)  # fmt: skip
def test_modules_and_what_they_offer_say_what_they_are(path: Path) -> None:
    tree = ast.parse(path.read_text())
    if not tree.body:
        return
    assert ast.get_docstring(tree), "the module has no docstring"
    silent = [
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not silent, f"no docstring: {silent}"
