"""The kernels' threads. Run: pytest tests/quant/test_threads.py"""

from __future__ import annotations

import os
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zotune.quant.kernels import threads as team
from zotune.quant.kernels.threads import parallel_ranges


@pytest.fixture(params=["openmp", "pool"], autouse=True)
def runtime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every property holds on torch's threads, where it has any, and on the pool."""
    if request.param == "pool":
        monkeypatch.setattr(team, "_openmp", lambda: None)
    elif team._openmp() is None:
        pytest.skip("this torch does not run on GNU OpenMP")


@pytest.fixture
def four_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(0, 50), grain=st.integers(0, 60), threads=st.integers(1, 5))
def test_ranges_cover_everything_once(n: int, grain: int, threads: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        seen: list[int] = []
        lock = threading.Lock()

        def visit(start: int, stop: int) -> None:
            assert start < stop
            with lock:
                seen.extend(range(start, stop))

        parallel_ranges(visit, n, grain)
        assert sorted(seen) == list(range(n))


@pytest.mark.usefixtures("four_threads")
def test_work_is_shared_between_threads() -> None:
    barrier = threading.Barrier(4, timeout=30)
    arrived: list[int] = []
    parallel_ranges(lambda start, stop: arrived.append(barrier.wait()), 4, 1)
    assert sorted(arrived) == [0, 1, 2, 3]


@pytest.mark.usefixtures("four_threads")
def test_small_work_stays_on_the_caller() -> None:
    threads: list[int] = []
    parallel_ranges(lambda start, stop: threads.append(threading.get_ident()), 7, 4)
    assert threads == [threading.get_ident()]


@pytest.mark.usefixtures("four_threads")
def test_nested_calls_do_not_wait_for_each_other() -> None:
    done: list[tuple[int, int]] = []
    parallel_ranges(lambda a, b: parallel_ranges(lambda c, d: done.append((c, d)), 100, 1), 4, 1)
    assert done == [(0, 100)] * 4


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("failing", [0, 3])
def test_an_error_is_raised_after_every_range_has_ended(failing: int) -> None:
    ended: list[int] = []

    def work(start: int, stop: int) -> None:
        if start == failing:
            raise RuntimeError("broken range")
        ended.append(start)

    with pytest.raises(RuntimeError, match="broken range"):
        parallel_ranges(work, 4, 1)
    assert sorted(ended) == [k for k in range(4) if k != failing]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("four_threads")
def test_a_forked_child_gets_threads_of_its_own() -> None:
    parallel_ranges(lambda start, stop: None, 4, 1)
    child = os.fork()
    if child == 0:
        barrier = threading.Barrier(4, timeout=20)
        code = 1
        try:
            parallel_ranges(lambda start, stop: barrier.wait(), 4, 1)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
