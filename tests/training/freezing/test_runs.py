"""Runs with frozen layers: the same with and without a cache, resumed, replayed, killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from training.freezing import frozen

from zotune import methods
from zotune.errors import BadInput, ZotuneError
from zotune.training import privacy, report, snapshots
from zotune.training.freezing import freezing as freezings
from zotune.training.freezing import store as stores
from zotune.training.freezing.codec import Zfp
from zotune.training.freezing.store import CacheFull
from zotune.training.journal import Journal
from zotune.training.loop import train
from zotune.training.rebuild import replay

KINDS: dict[str, dict[str, Any]] = {
    "mezo": {},
    "scales": {"method": "qzo", "space": "scales", "scheme": "int8-channel"},
    "codes": {"method": "zoqo", "space": "codes", "scheme": "int8-channel-a8"},
    "adapter": {"method": "mezo(directions='example', units='relative')",
                "space": "adapter(rank=1)+head"},
    "moments": {"method": "zo-adam(lr=0.01)"},
    "window": {"method": "zo-adam(lr=0.01, moments='rebuilt', history=5)"},
    "observed": {"method": "agzo", "space": "weights(pattern='dense|query')", "model": "even"},
    "adamw": {"method": "adamw", "learning_rate": 0.01},
    "lora": {"method": "lora", "space": "lora(rank=2)"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "CHUNK", 5)
    monkeypatch.setattr(report, "plot", lambda *_: None)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """What a run of a kind ends with that has no cache and is never interrupted."""

    @cache
    def run(kind: str) -> Any:
        return end(tmp_path_factory.mktemp(kind) / "run", **KINDS[kind])

    return run


def end(out: Path, model: str = "bert", *, count: int = 24, **options: Any) -> Any:
    """The weights and losses that a run ends with."""
    module = frozen.model(model)
    train(frozen.config(out, **options), model=module, task=frozen.task(model, count))
    records = Journal.read(out).records
    return toys.digest(module), [(r.coefficients, r.loss) for r in records]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "window"])
def test_a_run_on_cached_features_is_the_same_run(
    tmp_path: Path, kind: str, plain: Callable[[str], Any]
) -> None:
    assert end(tmp_path / "run", cache_dir=str(tmp_path / "cache"), **KINDS[kind]) == plain(kind)
    assert stores.folder_bytes(tmp_path / "cache") > 0


@pytest.mark.parametrize(
    ("kind", "method", "space"),
    [
        ("cnn", "mezo(units='relative')", "weights"),
        ("resnet", "adamw", "weights"),
        ("resnet", "mezo(units='relative')", "norms(basis='shift') + weights(pattern='linear')"),
    ],
)
def test_feature_maps_are_cached_as_well(
    tmp_path: Path, kind: str, method: str, space: str
) -> None:
    given = {"freeze": "0.5@4,0.75@10", "method": method, "max_steps": 20, "space": space}
    without = end(tmp_path / "plain", kind, count=12, **given)
    cached = end(tmp_path / "cached", kind, count=12, cache_dir=str(tmp_path / "cache"), **given)
    assert cached == without
    assert len(list((tmp_path / "cache").iterdir())) == 1  # the first freeze point's are gone


def test_frozen_blocks_stay_and_the_others_move(tmp_path: Path) -> None:
    early, late = frozen.model(), frozen.model()
    for model, steps in ((early, 7), (late, 16)):
        given = frozen.config(tmp_path / str(steps), max_steps=steps)
        train(given, model=model, task=frozen.task())
    a, b = early.state_dict(), late.state_dict()
    below = ("bert.embeddings.", "bert.encoder.layer.0.", "bert.encoder.layer.1.")
    moved = {name for name in a if not torch.equal(a[name], b[name])}
    assert "bert.encoder.layer.2.output.dense.weight" in moved
    # Step 6 is the first with frozen layers, so that both runs leave these as step 5 did.
    assert not [name for name in moved if name.startswith(below)]


@pytest.mark.parametrize(
    ("kind", "stop"), [("mezo", 4), ("moments", 6), ("observed", 11), ("adamw", 6), ("adamw", 11)]
)
def test_a_run_stopped_anywhere_resumes_bit_for_bit(
    tmp_path: Path, kind: str, stop: int, plain: Callable[[str], Any]
) -> None:
    given = {"cache_dir": str(tmp_path / "cache"), **KINDS[kind]}
    _interrupted(tmp_path / "run", stop, **given)
    assert end(tmp_path / "run", resume_from_checkpoint=True, **given) == plain(kind)


def test_a_run_on_compressed_features_resumes_bit_for_bit(tmp_path: Path) -> None:
    given = {"cache_dir": str(tmp_path / "cache"), "cache_codec": "zfp(tolerance=0.1)"}
    whole = end(tmp_path / "whole", **given)
    _interrupted(tmp_path / "run", 11, **given)
    assert end(tmp_path / "run", resume_from_checkpoint=True, **given) == whole


def _interrupted(
    out: Path, stop: int, model: str = "bert", count: int = 24, **options: Any
) -> None:
    """A run that ends in the middle of a step, behind `stop` others."""

    def losses(module: Any, batch: Any) -> Any:
        begun = (out / "journal.zoj").exists()
        if begun and len(Journal.read(out, torn=True).records) >= stop:
            raise KeyboardInterrupt
        return frozen.text_loss(module, batch)

    task = frozen.task(model, count)
    task._losses = losses
    with pytest.raises(KeyboardInterrupt):
        train(frozen.config(out, **options), model=frozen.model(model), task=task)


@pytest.mark.parametrize(
    "freeze",
    ["cka(threshold=0.2, every=3)", "svcca(threshold=0.2, every=3)", "rate(threshold=9, every=3)"],
)
def test_layers_that_stop_changing_are_frozen_and_the_decision_is_in_the_journal(
    tmp_path: Path, freeze: str
) -> None:
    given = {"freeze": freeze, "cache_dir": str(tmp_path / "cache"), "max_steps": 14}
    whole = end(tmp_path / "whole", **given)
    assert Journal.read(tmp_path / "whole").freezes == ((3, 2),)
    _interrupted(tmp_path / "run", 8, **given)
    assert end(tmp_path / "run", resume_from_checkpoint=True, **given) == whole
    rebuilt = frozen.model()
    replay(tmp_path / "whole", rebuilt)
    assert toys.digest(rebuilt) == whole[0]


def test_layers_that_go_on_changing_are_not_frozen(tmp_path: Path) -> None:
    end(tmp_path / "run", freeze="rate(threshold=1e-9, every=3)")
    assert Journal.read(tmp_path / "run").freezes == ()


def test_looks_that_an_interruption_falls_between_compare_with_the_right_past(
    tmp_path: Path,
) -> None:
    """A threshold that the second look just misses: another reference would decide otherwise."""
    given = {"freeze": "cka(threshold=0.9999, every=4)", "learning_rate": 0.005, "max_steps": 18,
             "lr_scheduler_type": "linear"}  # fmt: skip
    whole = end(tmp_path / "whole", count=4, **given)
    for stop in (5, 11):
        out = tmp_path / str(stop)
        _interrupted(out, stop, count=4, **given)
        assert end(out, count=4, resume_from_checkpoint=True, **given) == whole
        assert Journal.read(out).freezes == Journal.read(tmp_path / "whole").freezes


@pytest.mark.parametrize("kind", ["window", "codes"])
def test_replay_needs_neither_data_nor_cache(tmp_path: Path, kind: str) -> None:
    whole = end(tmp_path / "run", cache_dir=str(tmp_path / "cache"), **KINDS[kind])
    model = frozen.model()
    if "scheme" in KINDS[kind]:
        from zotune.quant import quantize_model_

        quantize_model_(model, KINDS[kind]["scheme"])
    replay(tmp_path / "run", model)
    assert toys.digest(model) == whole[0]


def test_the_saved_model_is_whole_and_has_its_frozen_part_bit_for_bit(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = frozen.model()
    given = frozen.config(tmp_path / "run", cache_dir=str(tmp_path / "cache"))
    train(given, model=model, task=frozen.task())
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], t) for name, t in model.state_dict().items())
    assert len(saved) == len(model.state_dict())


def test_the_frozen_part_leaves_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    freed, blocks = list[bool](), dict[str, Any]()
    park = freezings.Freezing._park

    def watched(self: Any, folder: Path) -> None:
        model = self.model.bert
        before = model.encoder.layer[0].output.dense.weight.data_ptr()
        park(self, folder)
        weight = model.encoder.layer[0].output.dense.weight
        freed.append(weight.data_ptr() != before)
        lies = weight.data_ptr()
        blocks.update({b.name: b.master.data_ptr() for b in self.tuner.space})
        freed.append(blocks["bert.encoder.layer.0.output.dense.weight"] == lies)
        freed.append(any(str(folder) in line and int(line.split("-")[0], 16) <= lies
                         < int(line.split("-")[1].split()[0], 16)
                         for line in Path("/proc/self/maps").read_text().splitlines()))  # fmt: skip

    monkeypatch.setattr(freezings.Freezing, "_park", watched)
    end(tmp_path / "run", cache_dir=str(tmp_path / "cache"))
    assert freed == [True, True, True]


def test_a_cache_is_used_again_and_not_computed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"cache_dir": str(tmp_path / "cache"), "space": "head", "freeze": "0.67@0"}
    first = end(tmp_path / "first", **given)
    monkeypatch.setattr(stores.Store, "put", None)
    assert end(tmp_path / "second", **given) == first


def test_a_damaged_chunk_is_computed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"cache_dir": str(tmp_path / "cache"), "space": "head", "freeze": "0.67@0"}
    first = end(tmp_path / "first", **given)
    path = sorted((tmp_path / "cache").rglob("chunk-*"))[1]
    data = path.read_bytes()
    for damage, left in (("cut", data[:-9]), ("gone", None), ("flip", _flipped(data))):
        path.unlink() if left is None else path.write_bytes(left)
        assert end(tmp_path / damage, **given) == first
        assert path.read_bytes() == data  # bit for bit what it was
        assert (damage == "flip") == ("computing it again" in caplog.text)


def _flipped(data: bytes) -> bytes:
    """One bit of the features themselves, which only their checksum can notice."""
    place = data.index(b"}}") + 300
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize("kind", ["mezo", "adamw"])
def test_a_full_cache_stops_the_run_cleanly_and_more_room_lets_it_go_on(
    tmp_path: Path, kind: str, plain: Callable[[str], Any]
) -> None:
    cache = str(tmp_path / "cache")
    with pytest.raises(CacheFull, match="cache_limit=4,000"):
        end(tmp_path / "run", cache_dir=cache, cache_limit="4kB", **KINDS[kind])
    assert 0 < stores.folder_bytes(Path(cache)) <= 4000
    given = {"cache_dir": cache, "cache_limit": "1MB", "resume_from_checkpoint": True}
    assert end(tmp_path / "run", **given, **KINDS[kind]) == plain(kind)


def test_a_full_disk_stops_the_run_cleanly_and_resuming_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: Callable[[str], Any]
) -> None:
    write, count = stores.write_atomic, {"n": 0}

    def full(path: Path, data: bytes) -> None:
        count["n"] += 1
        if count["n"] == 3:
            raise snapshots.cannot_write(path, OSError(28, "No space left on device"))
        write(path, data)

    monkeypatch.setattr(stores, "write_atomic", full)
    given = {"cache_dir": str(tmp_path / "cache")}
    with pytest.raises(ZotuneError, match="No space left on device"):
        end(tmp_path / "run", **given)
    assert end(tmp_path / "run", resume_from_checkpoint=True, **given) == plain("mezo")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("place", [1, 4])
def test_kill_9_in_the_middle_of_writing_loses_nothing(
    tmp_path: Path, place: int, plain: Callable[[str], Any]
) -> None:
    given = {"cache_dir": str(tmp_path / "cache")}
    process = os.fork()
    if not process:
        _die_while_writing(lambda: end(tmp_path / "run", **given), place)
    assert os.WIFSIGNALED(os.waitpid(process, 0)[1])
    files = [p.name for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert any(name.endswith(".new") for name in files)
    assert end(tmp_path / "run", resume_from_checkpoint=True, **given) == plain("mezo")


def _die_while_writing(run: Callable[[], Any], place: int) -> None:
    """Run, and be killed while the `place`-th file of the cache is half on the disk."""
    seen = {"n": 0}

    def write(path: Path, data: bytes) -> None:
        seen["n"] += 1
        if seen["n"] < place:
            snapshots.write_atomic(path, data)
            return
        path.with_name(f".{path.name}.new").write_bytes(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    stores.write_atomic = write  # type: ignore[assignment]
    try:
        run()
    finally:
        os._exit(1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"freeze": None, "cache_dir": "x"}, "nothing is frozen"),
        ({"cache_codec": "lossless"}, "features are not cached: add cache_dir"),
        ({"freeze": "0.67@16"}, "the run ends after 16"),
        ({"freeze": "0.1@3"}, r"depths \[0\] of 3 layers"),
        ({"freeze": "0.5@3,0.6@4"}, r"depths \[2, 2\]"),
        ({"freeze": "0.67@0"}, "lie below the freeze point of step 0"),
        ({"freeze": "0.67@12", "cache_dir": "x"}, "no example comes twice"),
        ({"freeze": "1@6", "space": "weights(pattern='layer')"}, "nothing is left to tune"),
        ({"space": "head(layers='all', basis='classes')"}, "reads every layer"),
        ({"cache_dir": "x", "cache_codec": "zip"}, "did you mean zfp|unknown codec"),
        ({"cache_dir": "x", "cache_limit": "much"}, "no number of bytes"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(
    tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    if "cache_dir" in options:
        options = {**options, "cache_dir": str(tmp_path / "x")}
    with pytest.raises(BadInput, match=told):
        end(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("options", [{}, {"freeze": None, "augment": "flip"}])
def test_private_runs_neither_freeze_nor_augment(tmp_path: Path, options: dict[str, Any]) -> None:
    given = frozen.config(tmp_path / "run", **options)
    with pytest.raises(BadInput, match="neither freeze nor augment"):
        privacy.check(methods.parse("dp-zo"), frozen.task(), given)


def test_each_freeze_point_has_a_larger_bound_than_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, bounds = Zfp.fitted, list[float]()

    def fitted(self: Zfp, rms: float, stage: int) -> Zfp:
        bounds.append(fit(self, rms, stage).bound / rms)
        return fit(self, rms, stage)

    monkeypatch.setattr(Zfp, "fitted", fitted)
    given = {"freeze": "0.5@4,0.75@10", "max_steps": 20, "cache_dir": str(tmp_path / "cache")}
    end(tmp_path / "run", "cnn", count=12, cache_codec="zfp(tolerance=0.1, growth=3.0)", **given)
    assert bounds == pytest.approx([0.1, 0.3])


def test_tied_weights_across_the_freeze_point_are_refused_but_may_stay_frozen(
    tmp_path: Path,
) -> None:
    def losses(model: Any, batch: Any) -> Any:
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return torch.nn.functional.cross_entropy(
            out.logits[:, 0, :3], batch["label"], reduction="none"
        )

    from zotune.training.objective import Objective

    task = Objective(losses, frozen.texts(12))
    given = {"freeze": "0.5@2", "cache_dir": str(tmp_path / "cache"), "max_steps": 8}
    with pytest.raises(BadInput, match=r"embed_tokens\.weight' is used below the freeze point"):
        train(frozen.config(tmp_path / "a", **given), model=toys.llama(tied=True), task=task)
    ends = []
    for place in (None, str(tmp_path / "cache")):
        model = toys.llama(tied=True)
        given = {**given, "cache_dir": place, "space": "norms"}
        train(frozen.config(tmp_path / f"b{place is None}", **given), model=model, task=task)
        ends.append(toys.digest(model))
    assert ends[0] == ends[1]


def test_a_skip_connection_over_the_freeze_point_is_refused(tmp_path: Path) -> None:
    class Skipping(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.layers[0](x)
            out: torch.Tensor = self.layers[2](self.layers[1](first)) + first
            return out

    from zotune.training.objective import Objective

    rows = [{"x": torch.randn(4, generator=torch.Generator().manual_seed(i))} for i in range(8)]
    task = Objective(lambda model, batch: model(batch["x"]).square().mean(-1), rows)
    given = frozen.config(tmp_path / "a", freeze="0.67@2", cache_dir=str(tmp_path / "c"))
    with pytest.raises(BadInput, match=r"more than the output of 'layers.1' crosses"):
        train(given, model=toys.fill_(Skipping()), task=task)


def test_a_cache_of_another_run_is_refused(tmp_path: Path) -> None:
    given = {"cache_dir": str(tmp_path / "cache"), "space": "head", "freeze": "0.67@0"}
    end(tmp_path / "first", **given)
    model, rows = frozen.model(), frozen.texts()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.bias[0] += 1  # type: ignore[union-attr,index,operator]
    rows[7]["input_ids"] = rows[7]["input_ids"].roll(1)
    data = frozen.task()
    data._splits["train"] = rows
    cases: list[tuple[str, dict[str, Any]]] = [
        ("model", {"model": model}), ("data", {"task": data}),
        ("codec", {"cache_codec": "zfp"}), ("max_length", {"max_length": 5}),
        ("depth", {"freeze": "0.33@0"}),
    ]  # fmt: skip
    for number, (told, changes) in enumerate(cases):
        if told == "depth":
            (tmp_path / "cache" / "depth-02").rename(tmp_path / "cache" / "depth-01")
        objects = {"model": frozen.model(), "task": frozen.task()}
        objects |= {k: changes.pop(k) for k in objects if k in changes}
        with pytest.raises(BadInput, match=f"features of another run:.*{told} "):
            train(frozen.config(tmp_path / str(number), **{**given, **changes}), **objects)


def test_augmented_runs_use_the_cache_as_they_use_images_where_channels_commute(
    tmp_path: Path,
) -> None:
    """Copies of every channel (threshold above 1) are the images' own features."""
    given = {"freeze": "0.5@4", "max_steps": 20, "augment": "flip + shift(pixels=2)"}
    cached = {**given, "cache_dir": str(tmp_path / "cache"), "cache_similarity": 1.1}
    assert end(tmp_path / "a", "resnet", count=12, **cached) == end(
        tmp_path / "b", "resnet", count=12, **given
    )
    naive = {**cached, "cache_dir": str(tmp_path / "naive"), "cache_similarity": -1.0}
    assert end(tmp_path / "c", "resnet", count=12, **naive) != end(
        tmp_path / "d", "resnet", count=12, **{**given, "augment": None}
    )


def test_augmentation_wants_images(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="one tensor"):
        end(tmp_path / "run", augment="flip")
