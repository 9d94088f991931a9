"""Series of real runs, judged as they came in: sick ones are found early, healthy ones are left alone (C1)."""

from __future__ import annotations

import pytest

from tests.analysis.convergence.recorded import RecordedRun, recorded_runs

RUNS = recorded_runs()


def test_there_are_enough_runs_of_both_kinds() -> None:
    assert len(RUNS) >= 20
    assert sum(run.is_sick for run in RUNS) >= 8
    assert sum(not run.is_sick for run in RUNS) >= 8


@pytest.mark.parametrize("run", [run for run in RUNS if not run.is_sick], ids=lambda run: run.name)
def test_healthy_run_is_never_flagged(run: RecordedRun) -> None:
    assert run.detection() is None


@pytest.mark.parametrize("run", [run for run in RUNS if run.is_sick], ids=lambda run: run.name)
def test_sick_run_is_flagged(run: RecordedRun) -> None:
    found = run.detection()
    assert found is not None
    assert found[0] <= 3 * run.steps_per_epoch
