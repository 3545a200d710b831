"""The table of adapting a ResNet. Run: pytest tests/benchmarks/test_vision.py"""

from __future__ import annotations

from benchmarks.vision import CONTENDERS, TARGET, Outcome, options, rows_of, steps_of


def test_forward_only_rows_have_the_target_and_backprop_has_none() -> None:
    given = options([])
    found = [Outcome(80.0, 82.0), Outcome(80.0, 85.0)]
    for contender in CONTENDERS:
        row, spread = rows_of(contender, None, found, given)
        assert row.value == 83.5
        assert "standard deviation over 2 seeds" in spread.name
        forward_only = contender.method != "adamw"
        assert row.target == (80.0 + TARGET if forward_only else None)
        assert row.met is (True if forward_only else None)


def test_backprop_is_in_the_same_table_at_a_third_of_the_steps() -> None:
    given = options(["--budget", "300", "--batch", "100"])
    assert {steps_of(c, given) for c in CONTENDERS if c.method == "adamw"} == {100}


def test_what_is_looked_at_first_is_paid_for() -> None:
    given = options(["--budget", "300", "--batch", "100"])
    assert steps_of(CONTENDERS[0], given) == 300 - 40 - 8
