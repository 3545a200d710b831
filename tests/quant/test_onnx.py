"""ONNX graphs: run, measured, tuned, given back. Run: pytest tests/quant/test_onnx.py

golden/onnx-* come from benchmarks/interop/onnx_golden.py, made by ONNX Runtime's own quantizers.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from zotune.cli import main
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.core.probe import Probe
from zotune.core.sites import View, probing, sites_of
from zotune.core.spaces import get
from zotune.errors import BadInput, FormatError
from zotune.models import fingerprint, load
from zotune.quant import formats
from zotune.quant.formats.onnx_file import entries, load_model
from zotune.quant.formats.onnx_graph import OnnxGraph
from zotune.training import EvalConfig, TrainConfig, evaluate, replay, run, train

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = sorted(p for p in GOLDEN.glob("onnx-*") if p.is_dir())
golden = pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
SPACES = formats.formats()["onnx"].tunable
TEXT = torch.arange(20).reshape(2, 10)


def read(folder: Path) -> nn.Module:
    model = json.loads((folder / "config.json").read_text())["model_type"]
    return formats.read(folder, AutoModelForCausalLM if model == "llama" else AutoModel)


def plain(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """What ONNX Runtime alone computes, with its default settings."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64)}
    return torch.from_numpy(session.run(None, feeds)[0]).float()


@torch.no_grad()
def output(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(ids)[0]
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def changed(one: Path, other: Path) -> set[str]:
    """Names of initializers that differ, by the onnx package; nothing else of the graph does."""
    both = [onnx.load(folder / "model.onnx") for folder in (one, other)]
    a, b = ({t.name: t for t in m.graph.initializer} for m in both)
    assert [(n, t.data_type, t.dims) for n, t in a.items()] == [
        (n, t.data_type, t.dims) for n, t in b.items()
    ]
    for model in both:
        model.graph.ClearField("initializer")
    assert both[0] == both[1]
    arrays = {n: (numpy_helper.to_array(a[n]), numpy_helper.to_array(b[n])) for n in a}
    return {n for n, (x, y) in arrays.items() if x.tobytes() != y.tobytes()}


def has(folder: Path, space: str) -> bool:
    try:
        return bool(get(space).build(read(folder)).blocks)
    except BadInput:
        return False


@golden
def test_outputs_are_onnx_runtime_s_own(folder: Path) -> None:
    expected, model = load_file(folder.with_suffix(".expected")), read(folder)
    found = output(model, expected["tokens"])
    assert torch.equal(found, plain(folder, expected["tokens"]))
    # Written down on another machine, whose instructions may round otherwise.
    torch.testing.assert_close(found, expected["logits"].float(), rtol=0.05, atol=0.05)


@golden
def test_an_untouched_model_is_given_back_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    model = read(folder)
    formats.round_to_storage_(model)
    assert files(formats.write(model, tmp_path / "out")) == files(folder)
    again = formats.write(model, tmp_path / "out")
    assert files(again) == files(folder)


@pytest.mark.parametrize("space", SPACES)
@golden
def test_what_can_be_tuned_is_kept_and_nothing_else_changes(
    folder: Path, space: str, tmp_path: Path
) -> None:
    model = read(folder)
    if not has(folder, space):
        with pytest.raises(BadInput, match=r"no (quantized|norms|biases|float parameters)"):
            get(space).build(model)
        return
    blocks = get(space).build(model)
    for block in blocks:
        block.bind_(1.0, 1.0, "relative")
        block.move_(0, block.rows, torch.full(block.shape, 0.5) * block.unit, Key(0))
    formats.round_to_storage_(model)
    out = formats.write(model, tmp_path / "out")
    names = {model.graph.names[block.owners[0].attribute] for block in blocks}
    assert changed(folder, out) == names
    assert fingerprint(read(out)) == fingerprint(model)
    assert torch.equal(output(model, TEXT), plain(out, TEXT))
    same = {name for name, data in files(out).items() if data == files(folder)[name]}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= same


@pytest.mark.parametrize("space", SPACES)
def test_every_space_is_met_in_some_graph(space: str) -> None:
    assert any(has(folder, space) for folder in FOLDERS)


@golden
@pytest.mark.parametrize("space", SPACES)
def test_probes_see_what_a_file_with_their_values_would_give(folder: Path, space: str) -> None:
    if not has(folder, space):
        return
    model = read(folder)
    blocks = list(get(space).build(model))
    for block in blocks:
        block.bind_(0.1, 1.0, "relative")
    before, base = fingerprint(model), output(model, TEXT[:1])
    probes = [Probe(Key(1, query=q), step, False) for q, step in ((0, 0.1), (0, -0.1), (1, 0.0))]

    def probed(view: View, ids: torch.Tensor) -> torch.Tensor:
        with probing(sites_of(blocks), view):
            return output(model, ids)

    found = probed(View(probes, 1, Gaussian(), rows=3), TEXT[:1].repeat(3, 1))
    single = [probed(View([p], 1, Gaussian(), rows=1), TEXT[:1]) for p in probes]
    assert torch.equal(found, torch.cat(single))
    close = 0.1 * base.abs().max()  # where int8 kernels want constants, probes run in float
    assert (found[2] - base[0]).abs().max() < close
    assert (found[0] - found[1]).abs().max() > 1e-3
    assert fingerprint(model) == before
    assert torch.equal(output(model, TEXT[:1]), base)
    for block in blocks:  # the first probe's values as constants of the deployed graph
        value = block.at(Gaussian().displacement(probes[0].key, block), 0.1)
        block.move_(0, block.rows, block.value().float() - value.float(), Key(0))
    assert (output(model, TEXT[:1])[0] - found[0]).abs().max() < close


def test_no_session_is_built_while_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built: list[tuple[int, int]] = []
    own = OnnxGraph._build

    def counted(self: OnnxGraph, inputs: Any, constants: Any) -> Any:
        built.append((len(inputs), len(constants)))
        return own(self, inputs, constants)

    monkeypatch.setattr(OnnxGraph, "_build", counted)
    train(config(FOLDERS[1], tmp_path, steps=20))
    # The file; the same point both ways; 20 steps; what was tuned, as constants.
    assert built == [(0, 0), (0, 8), (8, 0), (0, 8)]


def config(folder: Path, tmp_path: Path, steps: int = 30, **more: Any) -> TrainConfig:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"It was a day like day {k}, and so on.\n\n" for k in range(40)))
    rows = tmp_path / "rows.jsonl"
    pairs = ((f"{('cats', 'dogs')[k % 2]} {k}", "ab"[k % 2]) for k in range(40))
    rows.write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in pairs))
    causal = "int" in folder.name
    task = "lm(dev_size=6)" if causal else "classification(dev_size=8)"
    return TrainConfig(
        model_name_or_path=str(folder), task=task, data=str(text if causal else rows),
        max_length=24, output_dir=str(tmp_path / "run"), max_steps=steps,
        per_device_train_batch_size=8, report_to="none", show_progress=False,
        **{"space": "scales", "method": "qzo(lr=0.01)", **more},
    )  # fmt: skip


@golden
def test_thirty_steps_lower_the_loss_and_plain_onnx_runtime_agrees(
    folder: Path, tmp_path: Path
) -> None:
    given = config(folder, tmp_path)
    result = train(given)
    model = tmp_path / "run" / "model"
    assert result.numbers["after"]["loss"] < result.numbers["before"]["loss"]
    names = changed(folder, model)
    assert names
    assert all("scale" in name for name in names)
    whole = load(model).model
    assert torch.equal(output(getattr(whole, "encoder", whole), TEXT), plain(model, TEXT))
    shared = {"task": given.task, "data": given.data, "max_length": given.max_length}
    saved = evaluate(EvalConfig(model_name_or_path=str(model), **shared))
    assert saved["numbers"] == result.numbers["after"]
    replay(tmp_path / "run", folder, tmp_path / "again")
    kept = {n: b for n, b in files(model).items() if n != "README.md"}
    assert files(tmp_path / "again") == kept


def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = GOLDEN / "onnx-int4-level4"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    train(config(folder, tmp_path / "a", 8, space="scales + norms"))
    broken = config(folder, tmp_path / "b", 8, space="scales + norms", save_steps=2)
    own, calls = run.Run._step, []

    def stopped(self: run.Run) -> Any:
        calls.append(0)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return own(self)

    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    train(dataclasses.replace(broken, resume_from_checkpoint=True))
    models = [files(tmp_path / side / "run" / "model") for side in "ab"]
    assert all(models[0][n] == models[1][n] for n in ("model.onnx", "model.onnx_data"))


@pytest.mark.parametrize(
    ("name", "space"), [("onnx-int4-asym", "Scales"), ("onnx-qdq", "Head"), ("float", "Norms")]
)
def test_auto_tunes_what_a_graph_shows(name: str, space: str, tmp_path: Path) -> None:
    folder = GOLDEN / name
    if name == "float":
        folder = made(tmp_path / "int-none", [], {})
    result = train(config(folder, tmp_path, 4, method="auto", space=None))
    assert result.space.startswith(space)


def test_the_command_line_takes_the_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def zotune(*words: object) -> dict[str, Any]:
        capfd.readouterr()
        assert main([*map(str, words), "--json"]) == 0
        found: dict[str, Any] = json.loads(capfd.readouterr().out)
        return found

    config(FOLDERS[1], tmp_path)
    task = ("--task", "lm(dev_size=6)", "--data", tmp_path / "text.txt", "--max_length", 24)
    # As on the hub: the graph in a folder of its own, config and tokenizer above.
    home = Path(shutil.copytree(GOLDEN / "onnx-int4-level4", tmp_path / "home"))
    (home / "onnx").mkdir()
    (home / "other.onnx").write_bytes(b"")
    for name in ("model.onnx", "model.onnx_data"):
        (home / name).rename(home / "onnx" / name)
    given, out = home / "onnx" / "model.onnx", tmp_path / "run"
    result = zotune(
        "train", "--model", given, "--out", out, "--steps", 2, *task,
        "--method", "qzo", "--space", "scales", "--report-to", "none",
    )  # fmt: skip
    kept = {p.name for p in (out / "model").iterdir()}
    wanted = "README.md config.json model.onnx model.onnx_data tokenizer.json tokenizer_config.json"
    assert kept == set(wanted.split())
    assert zotune("eval", "--model", out, *task)["numbers"] == result["numbers"]["after"]
    zotune("replay", out, "--model", given, "--out", tmp_path / "again")
    assert not changed(tmp_path / "again", out / "model")


# Graphs made by hand, of 16 words, 8 numbers each.


def made(
    folder: Path,
    nodes: list[Any],
    tensors: dict[str, np.ndarray],
    inputs: tuple[Any, ...] = (),
    ends: Sequence[Any] = (),
) -> Path:
    """A folder whose graph looks words up, runs `nodes` from "x" to "y", and multiplies."""
    draw = np.random.default_rng(0)
    own = {
        "table": draw.standard_normal((96, 8)).astype(np.float32),
        "gain": np.ones(8, np.float32) + 0.1,
        "head": draw.standard_normal((8, 96)).astype(np.float32),
    }
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "t"])
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["x"]),
            *(nodes or [helper.make_node("Identity", ["x"], ["y"])]),
            helper.make_node("LayerNormalization", ["y", "gain"], ["z"]),
            helper.make_node("MatMul", ["z", "head"], ["logits_of_words" if ends else "logits"]),
            *ends,
        ],
        "made", [ids, *inputs],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, n) for n, v in {**own, **tensors}.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    folder.mkdir()
    for path in (GOLDEN / "onnx-int4-asym").iterdir():
        if path.suffix == ".json":
            shutil.copyfile(path, folder / path.name)
    onnx.save(model, folder / "model.onnx")
    return folder


def vector(value: float = 0.5, size: int = 8) -> np.ndarray:
    return np.full(size, value, np.float32)


def node(kind: str, inputs: str, output: str = "y", **options: Any) -> Any:
    return helper.make_node(kind, inputs.split(), output.split(), **options)


ROOT = [node("Mul", "x x", "s"), node("ReduceMean", "s axis", "m"), node("Add", "m tiny", "e"),
        node("Sqrt", "e", "r")]  # fmt: skip
CONSTANTS = {"axis": np.array([-1]), "tiny": np.array(1e-6, np.float32)}
CODES = np.arange(-32, 32, dtype=np.int8).reshape(8, 8)
ASKED: dict[str, tuple[list[Any], dict[str, np.ndarray], dict[str, str]]] = {
    "root mean square, divided": (
        [*ROOT, node("Div", "x r", "d"), node("Mul", "d g")], {"g": vector()}, {"g": "norm"},
    ),
    "root mean square, reciprocal, with an offset": (
        [*ROOT, node("Reciprocal", "r", "i"), node("Mul", "x i", "d"), node("Mul", "g d", "h"),
         node("Add", "h o")],
        {"g": vector(), "o": vector()}, {"g": "norm", "o": "norm"},
    ),
    "a product without a norm": ([node("Mul", "x g")], {"g": vector()}, {}),
    "a bias": ([node("Add", "x o")], {"o": vector()}, {"o": "bias"}),
    "a constant": ([node("Add", "x o")], {"o": np.array(1, np.float32)}, {}),
    "numbers that are not finite": ([node("Add", "x o")], {"o": vector(-np.inf)}, {}),
    "a mask": ([node("Add", "x o")], {"o": np.ones((2, 1, 8), np.float32)}, {}),
    "a matrix lying the other way": (
        [node("Transpose", "w", "t"), node("MatMul", "x t")], {"w": np.eye(8, dtype=np.float32)},
        {"w": "weight"},
    ),
    "two uses, one unknown": (
        [node("Add", "x o", "a"), node("Sub", "a o")], {"o": vector()}, {},
    ),
    "a tensor without a way out": (
        [node("Add", "x o", "aside"), node("Identity", "x")], {"o": vector()}, {},
    ),
    "stored integers": (
        [node("DequantizeLinear", "q s", "w", axis=1), node("MatMul", "x w")],
        {"q": CODES, "s": vector(0.01)}, {"s": "scale"},
    ),
    "activations": (
        [node("QuantizeLinear", "x s p", "q"), node("DequantizeLinear", "q s p")],
        {"s": np.array(0.05, np.float32), "p": np.array(128, np.uint8)}, {},
    ),
    "beside a bias of int32": (
        [node("DequantizeLinear", "q s", "w", axis=1), node("DequantizeLinear", "p t", "b", axis=0),
         node("Squeeze", "x k", "v"), node("Gemm", "v w b", "u"), node("Unsqueeze", "u k")],
        {"q": CODES, "s": vector(0.01), "p": np.arange(8, dtype=np.int32), "t": vector(0.01),
         "k": np.array([0])}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ASKED)
def test_a_tensor_is_known_by_what_reads_it(case: str, tmp_path: Path) -> None:
    nodes, tensors, wanted = ASKED[case]
    folder = made(tmp_path / "m", nodes, {**tensors, **(CONSTANTS if nodes[:4] == ROOT else {})})
    graph = OnnxGraph(folder / "model.onnx", "logits")
    assert graph.roles == {"table": "weight", "gain": "norm", "head": "weight", **wanted}
    roles = {"scales": ["scale"], "norms": ["norm"], "biases": ["bias"],
             "weights": ["weight", "norm", "bias"]}  # fmt: skip
    for space, kinds in roles.items():
        names = {f".{n}" for n, role in graph.roles.items() if role in kinds}
        blocks = get(space).build(graph).blocks if names else ()
        found = {f".{b.name.removeprefix('.')}": b for b in blocks}
        assert set(found) == names
        assert {n for n, b in found.items() if b.decay} <= {".table", ".head", ".w"}


def test_a_classifier_with_a_head_of_its_own_is_tuned(tmp_path: Path) -> None:
    ends = [node("Gather", "logits_of_words two", "some", axis=2),
            node("ReduceMean", "some one", "logits", keepdims=0)]  # fmt: skip
    folder = made(tmp_path / "m", [], {"two": np.array([0, 1]), "one": np.array([1])}, ends=ends)
    kind = {"architectures": ["BertForSequenceClassification"], "model_type": "bert"}
    (folder / "config.json").write_text(json.dumps({**kind, "id2label": {"0": "a", "1": "b"}}))
    result = train(config(folder, tmp_path, space="weights", method="auto"))
    assert result.numbers["after"]["loss"] < result.numbers["before"]["loss"]


def test_inputs_of_a_cache_are_empty_and_others_are_named(tmp_path: Path) -> None:
    past = helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, ["b", "p", 8])
    join = [node("Concat", "past_key_values.0.key x", axis=1)]
    model = read(made(tmp_path / "a", join, {}, (past,)))
    without = read(made(tmp_path / "b", [], {}))
    assert torch.equal(output(model, TEXT), output(without, TEXT))
    for name, sizes in (("pixels", ["b", "t", 8]), ("past_of_two", ["b", 2, 8])):
        info = helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)
        with pytest.raises(FormatError, match=rf"inputs that are not known here: \[{name}\]"):
            read(made(tmp_path / name, [node("Concat", f"x {name}", axis=1)], {}, (info,)))


def test_a_kernel_that_wants_constants_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = read(GOLDEN / "onnx-int4-level4")
    blocks = list(get("scales").build(model))
    own = onnxruntime.InferenceSession

    class Broken:
        """Ignores what it is given, as ONNX Runtime's int8 kernel ignores scales of an input."""

        def __init__(self, model: Any, options: Any, **more: Any) -> None:
            self.inner, self.broken = own(model, options, **more), isinstance(model, bytes)

        def run(self, outputs: Any, feeds: Any) -> Any:
            found = self.inner.run(outputs, feeds)
            return [0 * f for f in found] if self.broken and len(feeds) > 2 else found

    monkeypatch.setattr(onnxruntime, "InferenceSession", Broken)
    view = View([Probe(Key(1), 0.0, False)], 1, Gaussian(), rows=1)
    with probing(sites_of(blocks), view), pytest.raises(FormatError, match="wants them constant"):
        output(model, TEXT[:1])


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5),
    half=st.booleans(), raw=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_places_are_those_of_the_values(
    shapes: list[list[int]], half: bool, raw: bool, seed: int, tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.mktemp("places") / "model.onnx"
    draw = np.random.default_rng(seed)
    dtype = np.float16 if half else np.float32
    arrays = {f"t{k}": draw.standard_normal(s).astype(dtype) for k, s in enumerate(shapes)}
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    tensors = [
        numpy_helper.from_array(np.asarray(a), n)
        if raw
        else helper.make_tensor(n, kind, np.shape(a), np.ravel(a).tolist())
        for n, a in arrays.items()
    ]
    info = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node("Identity", "t0", "y")], "g", [], [info], tensors)
    onnx.save(helper.make_model(graph), path)
    found = entries(path, load_model(path))
    wanted = {n for n, a in arrays.items() if np.size(a) and (raw or not half)}
    assert set(found) == wanted
    for name in wanted:
        np.testing.assert_array_equal(found[name].read().numpy(), arrays[name])
        found[name].overwrite(path.parent, found[name].read() + 1)
    again = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    for name, array in arrays.items():
        expected = array + dtype(1) if name in wanted else array
        np.testing.assert_array_equal(again[name], expected)


# Damage, each kind with its message.


def damaged(folder: Path, tmp_path: Path) -> tuple[Path, Any]:
    copy = Path(shutil.copytree(folder, tmp_path / "damaged"))
    return copy, onnx.load(copy / "model.onnx", load_external_data=False)


def first_external(model: Any) -> Any:
    return next(t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("location", "../model.onnx_data", "wanted a plain file name"),
        ("location", "/etc/passwd", "wanted a plain file name"),
        ("location", "a\\b", "wanted a plain file name"),
        ("location", "..", "wanted a plain file name"),
        ("location", "", "wanted a plain file name"),
        ("location", "gone.bin", "gone.bin is missing"),
        ("offset", "-4", "fetch both again"),
        ("offset", "99999999999", "fetch both again"),
        ("offset", "many", "fetch both again"),
        ("length", "3", "fetch both again"),
        ("length", "99999999999999999999", "fetch both again"),
    ],
)
def test_tricks_with_external_data_are_refused(
    key: str, value: str, message: str, tmp_path: Path
) -> None:
    folder, model = damaged(GOLDEN / "onnx-int4-level4", tmp_path)
    said = {e.key: e for e in first_external(model).external_data}
    said[key].value = value
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(FormatError, match=message):
        read(folder)


def test_two_tensors_in_one_place_are_refused(tmp_path: Path) -> None:
    folder, model = damaged(GOLDEN / "onnx-int4-level4", tmp_path)
    first, other = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL][
        :2
    ]
    place = {e.key: e.value for e in first.external_data}["offset"]
    next(e for e in other.external_data if e.key == "offset").value = place
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(FormatError, match=r"share bytes of model\.onnx_data"):
        read(folder)


def test_tricks_inside_attributes_are_refused_too(tmp_path: Path) -> None:
    constant = node("Constant", "", "c", value=numpy_helper.from_array(vector(), "c"))
    tensor = constant.attribute[0].t
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    folder = made(tmp_path / "m", [constant, node("Add", "x c")], {})
    with pytest.raises(FormatError, match="wanted a plain file name"):
        read(folder)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([node("Magic", "x", domain="my.ops")], r"other libraries: \['my.ops.Magic'\]"),
        ([node("QLinearAdd", "x x", domain="com.microsoft")], "quantized by .*QLinearAdd"),
        ([node("Nonsense", "x")], "ONNX Runtime cannot load"),
        ([node("Add", "x b", "a"), node("Add", "a y", "b"), node("Add", "a b")], "wait for each"),
    ],
)
def test_operators_that_are_not_read_are_named(
    nodes: list[Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=message):
        read(made(tmp_path / "m", nodes, {}))


def test_absurd_shapes_allocate_nothing(tmp_path: Path) -> None:
    folder, model = damaged(GOLDEN / "onnx-int4-asym", tmp_path)
    tensor = next(t for t in model.graph.initializer if t.name.endswith("scales"))
    for dims in ([1 << 40, 1 << 40], [1 << 62]):
        tensor.dims[:] = dims
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(FormatError, match="other bytes than its shape"):
            read(folder)


@pytest.mark.parametrize("name", ["onnx-int4-level4", "onnx-qdq"])
def test_cut_off_and_tampered_files_are_refused_or_run(name: str, tmp_path: Path) -> None:
    folder, _ = damaged(GOLDEN / name, tmp_path)
    path, whole = folder / "model.onnx", (GOLDEN / name / "model.onnx").read_bytes()
    draw = random.Random(0)
    refused = 0
    for trial in range(60):
        data = bytearray(whole)
        if trial % 3 == 0:
            data = data[: draw.randrange(len(data))]
        else:
            for _ in range(draw.choice([1, 2, 5, 20])):
                data[draw.randrange(min(len(data), 1 << 13 << trial % 4))] = draw.randrange(256)
        path.write_bytes(data)
        try:
            output(read(folder), TEXT)
        except BadInput:
            refused += 1
    assert refused >= 20


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnx", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(FormatError, match=r"pip install 'zotune\[onnx\]'"):
                read(GOLDEN / "onnx-qdq")


def test_what_a_graph_cannot_do_is_said(tmp_path: Path) -> None:
    folder = GOLDEN / "onnx-int4-asym"
    model = read(folder)
    for options in ({"use_cache": True}, {"output_hidden_states": True}):
        with pytest.raises(BadInput, match="without a cache"):
            model(TEXT, **options)
    with pytest.raises(BadInput, match="runs on the CPU here"):
        model.half()
    with pytest.raises(FormatError, match="leave dtype"):
        formats.read(folder, AutoModelForCausalLM, dtype=torch.bfloat16)
    with pytest.raises(FormatError, match="give another kind"):
        formats.read(folder, AutoModel)
    with pytest.raises(FormatError, match="give another kind"):
        formats.read(GOLDEN / "onnx-qdq", AutoModelForSequenceClassification)
    with pytest.raises(BadInput, match=r"cannot run .* on this batch"):
        output(model, torch.full((1, 4), 1000))
    with pytest.raises(BadInput, match="was not read from an ONNX file"):
        formats.formats()["onnx"].write(nn.Linear(2, 2), tmp_path)
    for space in ("lora", "adapter"):
        with pytest.raises(BadInput, match="adapters go on linear layers"):
            get(space).build(model, lambda *a, **k: None)
    with pytest.raises(BadInput, match="no quantized codes"):
        get("codes").build(model)
    with pytest.raises(BadInput, match="gives no gradients"):
        train(config(folder, tmp_path, 1, method="adamw"))


def test_two_files_are_one_too_many(tmp_path: Path) -> None:
    folder, _ = damaged(GOLDEN / "onnx-qdq", tmp_path)
    shutil.copyfile(folder / "model.onnx", folder / "model_quantized.onnx")
    with pytest.raises(FormatError, match=r"2 ONNX files .*give one of them"):
        read(folder)
    assert load(folder / "model.onnx").format == "onnx"


def test_names_that_would_clash_are_refused(tmp_path: Path) -> None:
    nodes = [node("Add", "x forward")]
    with pytest.raises(FormatError, match="'forward'; rename it"):
        read(made(tmp_path / "m", nodes, {"forward": vector()}))
