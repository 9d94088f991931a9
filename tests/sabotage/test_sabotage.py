"""Every planted fault gets the right verdict, and its cause is named (C3 to C6)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sabotage.pipelines import HEALTHY, HEALTHY_SEEDS, Sabotage
from tests.sabotage.suite import PLANTED, checked

KNOWN_AS_WRONG = {"weight decay 100 times (AdamW)"}
"""No harm is done within the batches of the check, so there is nothing to convict; the table says so."""


def judge(sabotage: Sabotage, directory: Path, seed: int = 0) -> None:
    outcome = checked(sabotage, directory, seed)
    assert outcome.names_the_cause, outcome.note
    if sabotage.name in KNOWN_AS_WRONG:
        assert outcome.verdict == "healthy"
        return
    assert outcome.is_right, outcome.note


@pytest.mark.parametrize("sabotage", [s for s in PLANTED if s.quick], ids=lambda s: s.name)
def test_planted_fault_is_found_and_named(sabotage: Sabotage, tmp_path: Path) -> None:
    judge(sabotage, tmp_path)


@pytest.mark.parametrize("seed", range(2))
def test_healthy_pipeline_is_found_healthy(seed: int, tmp_path: Path) -> None:
    judge(HEALTHY, tmp_path, seed)


@pytest.mark.full
@pytest.mark.parametrize("sabotage", [s for s in PLANTED if not s.quick], ids=lambda s: s.name)
def test_planted_fault_is_found_and_named_in_full(sabotage: Sabotage, tmp_path: Path) -> None:
    judge(sabotage, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(2, HEALTHY_SEEDS))
def test_healthy_pipeline_is_found_healthy_in_full(seed: int, tmp_path: Path) -> None:
    judge(HEALTHY, tmp_path, seed)
