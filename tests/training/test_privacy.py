"""Private runs: accounts, sampling, what they leave, what they refuse.

Run: pytest tests/training/test_privacy.py
"""

from __future__ import annotations

import json
import logging
import math
import random
import sys
from pathlib import Path
from statistics import NormalDist
from typing import Any

import dp_accounting
import pytest
import torch
import toys
from training import lab
from training.test_loop import Killed, killed_after
from transformers import TrainerCallback

from zotune import methods
from zotune.core import secret, spaces
from zotune.core.estimator import TwoSided
from zotune.core.evaluator import TorchEvaluator
from zotune.core.noise import Key
from zotune.core.perturbation import Gaussian
from zotune.core.sites import StackingError
from zotune.errors import BadInput, JournalError
from zotune.training import Objective, TrainConfig, replay, train
from zotune.training.batches import PoissonBatches, poisson
from zotune.training.journal import Journal
from zotune.training.privacy import LARGE, calibrated, epsilon_of, planned

METHOD = "dp-zo(noise=1.0, clip=1.0, delta=1e-3, units='relative', eps=0.01, lr=0.05)"


def config(out: Path, method: str = METHOD, **options: Any) -> TrainConfig:
    given = {"method": method, "space": "weights", "learning_rate": None, **options}
    return lab.config(out, **given)


# ---- accounts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noise", "rate", "steps"), [(1.0, 0.02, 200), (2.0, 0.5, 30), (4.0, 1.0, 5)]
)
def test_gaussian_steps_are_accounted_as_the_library_does(
    noise: float, rate: float, steps: int
) -> None:
    account = dp_accounting.pld.PLDAccountant()
    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    account.compose(event, steps)
    assert epsilon_of("gaussian", noise, 1e-5, rate, steps) == account.get_epsilon(1e-5)


def test_without_sampling_it_is_the_gaussian_mechanism_in_closed_form() -> None:
    """delta = F(1/2s - es) - exp(e) F(-1/2s - es), s = noise / sqrt(steps) (Balle & Wang 2018)."""
    for noise, steps in ((3.0, 1), (5.0, 9)):
        epsilon = epsilon_of("gaussian", noise, 1e-5, 1.0, steps)
        s, law = noise / steps**0.5, NormalDist()
        delta = law.cdf(0.5 / s - epsilon * s) - math.exp(epsilon) * law.cdf(-0.5 / s - epsilon * s)
        assert delta == pytest.approx(1e-5, rel=0.01)


def test_pure_laplace_steps_add_up_in_closed_form_and_delta_only_helps() -> None:
    rate, steps = 0.05, 200
    for noise in (0.5, 2.0, 10.0):
        pure = steps * math.log(1 + rate * (math.exp(1 / noise) - 1))
        assert epsilon_of("laplace", noise, 0.0, rate, steps) == pytest.approx(pure, rel=1e-12)
        assert epsilon_of("laplace", noise, 1e-5, rate, steps) < pure
        if pure < LARGE:
            account = dp_accounting.pld.PLDAccountant()
            event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.LaplaceDpEvent(noise))
            account.compose(event, steps)
            assert epsilon_of("laplace", noise, 1e-5, rate, steps) == account.get_epsilon(1e-5)


def test_beyond_any_use_the_bound_is_cheap_and_still_an_upper_one() -> None:
    assert epsilon_of("gaussian", 0.01, 1e-5, 0.1, 1000) > 1e5
    assert epsilon_of("laplace", 1e-3, 1e-5, 0.1, 10) > 1e3
    assert epsilon_of("gaussian", 0.0, 1e-5, 0.1, 10) == math.inf
    assert epsilon_of("gaussian", 1.0, 1e-5, 0.1, 0) == 0
    account = dp_accounting.pld.PLDAccountant()
    event = dp_accounting.GaussianDpEvent(0.8)
    account.compose(dp_accounting.PoissonSampledDpEvent(0.2, event), 150)
    bound = epsilon_of("gaussian", 0.8, 1e-5, 0.2, 150)
    assert LARGE < account.get_epsilon(1e-5) <= bound < 1.3 * account.get_epsilon(1e-5)


@pytest.mark.parametrize(
    ("law", "delta"), [("gaussian", 1e-4), ("laplace", 0.0), ("laplace", 1e-4)]
)
def test_a_calibrated_noise_is_just_enough(law: secret.Law, delta: float) -> None:
    noise = calibrated(law, 2.0, delta, 0.1, 50)
    assert (
        epsilon_of(law, noise, delta, 0.1, 50)
        <= 2.0
        < epsilon_of(law, 0.99 * noise, delta, 0.1, 50)
    )


# ---- sampling ------------------------------------------------------------------------------


def test_poisson_batches_have_their_rate_and_examples_do_not_know_of_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """4,000 batches of 3 of 12: every frequency, size and pair within 4.5 standard errors."""
    monkeypatch.setattr(secret, "entropy", random.Random(1).randbytes)
    count, size, draws = 12, 3, 4000
    p = size / count
    drawn = torch.zeros(draws, count, dtype=torch.float64)
    for row in drawn:
        row[poisson(size, count)] = 1
    error = math.sqrt(p * (1 - p) / draws)
    assert float((drawn.mean(0) - p).abs().max()) < 4.5 * error
    sizes = drawn.sum(1)
    assert float(sizes.var()) == pytest.approx(count * p * (1 - p), rel=4.5 * math.sqrt(2 / draws))
    assert float((sizes == 0).double().mean()) == pytest.approx((1 - p) ** count, abs=0.01)
    among = torch.corrcoef(drawn.T) - torch.eye(count, dtype=torch.float64)
    assert float(among.abs().max()) < 4.5 / math.sqrt(draws)
    after = torch.corrcoef(torch.stack([drawn[:-1].flatten(), drawn[1:].flatten()]))[0, 1]
    assert abs(float(after)) < 4.5 / math.sqrt(draws * count)


def test_a_batch_comes_once_and_may_be_empty() -> None:
    batches = PoissonBatches(lab.task(), lab.rows(40), 1)
    looks = [batches[0] for _ in range(60)]
    sizes = {len(pieces) for pieces in looks}
    assert 0 in sizes
    assert len(sizes) > 2
    assert all(piece.size == 1 for pieces in looks for piece in pieces)
    several = PoissonBatches(lab.task(), lab.rows(40), 40, together=16)
    assert [piece.size for piece in several[0]] == [16, 16, 8]
    with pytest.raises(BadInput, match="lower batch_size"):
        PoissonBatches(lab.task(), lab.rows(3), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_examples_loss_is_bitwise_the_same_in_whatever_company(dtype: torch.dtype) -> None:
    model = toys.bert().to(dtype)
    evaluator = TorchEvaluator(model, spaces.get("weights").build(model), toys.cross_entropy)
    rows = [toys.batch(1, seed, length=3 + seed) for seed in range(5)]
    probes = TwoSided(1e-2).ask(Key(0))
    whole = evaluator.losses(probes, rows, Gaussian()).per_example
    for chosen in ([3], [1, 3], [0, 2, 4]):
        found = evaluator.losses(probes, [rows[i] for i in chosen], Gaussian()).per_example
        assert torch.equal(found, whole[:, chosen])


# ---- whole runs ----------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Everything that was drawn in secret."""
    real, seen = secret.entropy, list[bytes]()

    def entropy(count: int) -> bytes:
        seen.append(real(count))
        return seen[-1]

    monkeypatch.setattr(secret, "entropy", entropy)
    return seen


def test_a_private_run_leaves_its_promise_and_no_loss_no_digest_no_secret(
    tmp_path: Path, drawn: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("zotune").propagate = True
    out, model = tmp_path / "run", toys.small()
    with caplog.at_level(logging.INFO, "zotune"):
        result = train(config(out, max_steps=45, eval_steps=20), model=model, task=lab.task())
    wanted = epsilon_of("gaussian", 1.0, 1e-3, 4 / 40, 45)
    assert result.privacy is not None
    assert (result.privacy.epsilon, result.privacy.delta) == (wanted, 1e-3)
    saved = json.loads((out / "result.json").read_text())["privacy"]
    assert (saved["epsilon"], saved["delta"], saved["steps"]) == (wanted, 1e-3, 45)
    assert saved["neighbours"] == "adding or removing one example"
    assert str(result.privacy) in (out / "README.md").read_text()
    said = [r.getMessage() for r in caplog.records]
    assert said[-1] == f"privacy: {result.privacy}"
    assert f"planned privacy: {result.privacy}" in said
    assert not any(
        "loss" in text for text in said if not text.startswith(("before:", "step 20:", "step 40:"))
    )
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert not any("loss" in row for row in rows)
    assert not any("signal" in row for row in rows)
    journal = Journal.read(out)
    assert {r.loss for r in journal.records} == {0.0}
    assert journal.header["data"] is None
    assert result.applied == 45
    files = b"".join(p.read_bytes() for p in out.rglob("*") if p.is_file())
    long = [piece for piece in drawn if len(piece) >= 6]
    assert len(long) > 45
    assert not any(piece[i : i + 8] in files for piece in long for i in range(0, len(piece), 8))
    rebuilt = toys.small()
    assert replay(out, rebuilt)["steps"] == 45
    assert lab.states(rebuilt) == lab.states(model)


def test_one_seed_gives_other_noise_along_the_same_directions(tmp_path: Path) -> None:
    found = []
    for name in "ab":
        train(config(tmp_path / name), model=toys.small(), task=lab.task())
        found.append([r.coefficients for r in Journal.read(tmp_path / name).records])
    assert not set(found[0]) & set(found[1])


def test_no_training_example_is_looked_at_before_the_first_step_or_measured(tmp_path: Path) -> None:
    """But for `adapter`, which looks at dev rows, and is refused where there are none."""
    seen: list[tuple[bool, bool]] = []  # (a step is running, a training row)
    stepping = {"now": False}

    def losses(model: Any, batch: Any) -> Any:
        seen.append((stepping["now"], bool((batch["mine"] == 1).any())))
        return toys.cross_entropy(model, batch)

    class Stepping(TrainerCallback):
        def on_step_begin(self, *args: Any, **values: Any) -> None:
            stepping["now"] = True

        def on_step_end(self, *args: Any, **values: Any) -> None:
            stepping["now"] = False

    train_rows = [{**r, "mine": torch.tensor(1)} for r in lab.rows()]
    other = [{**r, "mine": torch.tensor(0)} for r in lab.rows(12)]
    task = Objective(losses, train_rows, other)
    train(config(tmp_path / "a", eval_steps=5), model=toys.small(), task=task, callbacks=[Stepping])
    assert (True, True) in seen
    assert {mine for now, mine in seen if not now} == {False}
    adapter = config(tmp_path / "b", space="adapter(rank=2)")
    with pytest.raises(BadInput, match="may not show it those it trains on"):
        train(adapter, model=toys.small(), task=task)
    task._splits["dev"] = other
    seen.clear()
    train(adapter, model=toys.small(), task=task, callbacks=[Stepping])
    assert {mine for now, mine in seen if not now} == {False}


def test_resume_repeats_what_is_journalled_and_draws_the_rest_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        killed_after(patch, 7)
        with pytest.raises(Killed):
            train(config(tmp_path / "run"), model=toys.small(), task=lab.task())
    journalled = Journal.read(tmp_path / "run", torn=True).records
    again = config(tmp_path / "run", resume_from_checkpoint=True)
    with pytest.raises(JournalError, match="other training examples"):
        train(
            again,
            model=toys.small(),
            task=Objective(toys.cross_entropy, lab.rows(39), lab.rows(12)),
        )
    ends = []
    data = (tmp_path / "run/journal.zoj").read_bytes()
    for _ in range(2):
        (tmp_path / "run/journal.zoj").write_bytes(data)
        (tmp_path / "run/snapshots/last.safetensors").unlink(missing_ok=True)
        model, rebuilt = toys.small(), toys.small()
        result = train(again, model=model, task=lab.task())
        assert result.privacy is not None
        assert result.privacy.steps == 12
        records = Journal.read(tmp_path / "run").records
        assert records[:7] == journalled
        replay(tmp_path / "run", rebuilt)
        assert lab.states(model) == lab.states(rebuilt)
        ends.append({r.coefficients for r in records[7:]})
    assert not ends[0] & ends[1]


def test_an_epsilon_becomes_noise_that_the_journal_keeps(tmp_path: Path) -> None:
    method = METHOD.replace("noise=1.0", "epsilon=3.0")
    result = train(config(tmp_path / "run", method), model=toys.small(), task=lab.task())
    assert result.privacy is not None
    assert 2.9 < result.privacy.epsilon <= 3.0
    assert f"noise={result.privacy.noise!r}" in Journal.read(tmp_path / "run").header["method"]
    assert "batch=4, epsilon=3.0, delta=0.001" in result.method


# ---- refusals ------------------------------------------------------------------------------


def refused(tmp_path: Path, error: type[Exception], message: str, task: Any = None,
            model: Any = None, **options: Any) -> None:  # fmt: skip
    """And nothing was run or written."""
    with pytest.raises(error, match=message):
        train(config(tmp_path / "run", **options), model=model or toys.small(), task=task)
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_private_is_refused_before_the_first_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(model: Any, batch: Any) -> Any:
        raise AssertionError("a forward")

    task = Objective(never, lab.rows(), lab.rows(12))

    def no(message: str, **options: Any) -> None:
        refused(tmp_path, BadInput, message, **{"task": task, **options})

    no("epsilon > 0", method="dp-zo(epsilon=-1.0)")
    no("whole examples leak", method="dp-zo(delta=0.025)")
    no("no option 'directions'", directions="example")
    no("give --batch-size only", method="dp-zo(batch_size=5)")
    no("lower batch_size", per_device_train_batch_size=41)
    no("rows that it does not train on", task=Objective(never, lab.rows()))
    no("leave it at 0", check_gradient=5)
    whole = lab.task()
    whole.per_example = False
    no("one loss per batch", task=whole)
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    no(r"pip install 'zotune\[privacy\]'")
    assert train(
        config(tmp_path / "pure", "dp-zo(mechanism='laplace', clip=1.0)"), model=toys.small(),
        task=lab.task(),
    ).privacy  # fmt: skip


class Mixing(toys.Small):
    """Every row sees the mean of its batch."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        out = super().forward(input_ids)
        return out - 3 * out.mean(0, keepdim=True)


def test_a_model_that_mixes_the_rows_and_exact_gradients_are_refused(tmp_path: Path) -> None:
    together = {"task": lab.task(), "micro_batch": 4}
    refused(tmp_path, StackingError, "mixes the rows", model=toys.fill_(Mixing()), **together)
    refused(tmp_path, BadInput, "no privacy noise", task=lab.task(), space="head(exact=True)")


def test_methods_that_are_not_private_are_planned_as_they_are() -> None:
    for name in ("mezo", "adamw"):
        assert planned(methods.get(name), 10, 10) == methods.get(name)
