"""Running the sabotages: through PipelineCheck, and through whole trainings that ConvergenceMonitor watches."""

from __future__ import annotations

import functools
import io
import tempfile
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from lightning_qat.analysis.ladder.pipeline_result import PipelineResult
from lightning_qat.callbacks.pipeline_check import PipelineCheck
from tests.sabotage.closures import CLOSURES
from tests.sabotage.pipelines import (
    HEALTHY,
    HEALTHY_SEEDS,
    PREVENTING,
    SABOTAGES,
    Sabotage,
    StopBeforeTraining,
    float_run,
    qat_run,
)

PLANTED = (*SABOTAGES, *PREVENTING, *CLOSURES)
"""Everything that is planted."""


@dataclass(frozen=True)
class Outcome:
    """What the check said about one planted fault.

    Args:
        sabotage: what was planted.
        verdict: the verdict.
        rung: the rung that broke.
        note: the verdict in words.
    """

    sabotage: Sabotage
    verdict: str
    rung: int | None
    note: str

    @property
    def is_right(self) -> bool:
        return self.verdict == self.sabotage.verdict

    @property
    def names_the_cause(self) -> bool:
        return any(words in self.note for words in self.sabotage.cause)


@functools.cache
def float_reference(seed: int) -> tuple[Path, dict[str, Tensor]]:
    """Fingerprint and weights of the healthy float run, once per seed and process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float_run(Path(tempfile.mkdtemp(prefix="sabotage")), seed)


def checked(sabotage: Sabotage, directory: Path, seed: int = 0) -> Outcome:
    """Plant one fault and run the check before training."""
    reference, weights = float_reference(seed)
    check = PipelineCheck(reference=str(reference), batches=sabotage.batches)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        qat_run(sabotage, weights, directory, check, StopBeforeTraining())
    assert isinstance(check.result, PipelineResult)
    return Outcome(sabotage, check.result.verdict, check.result.rung, check.result.note)


def every_outcome(directory: Path) -> list[Outcome]:
    """All faults, and the healthy pipeline with several seeds."""
    return [
        *(checked(sabotage, directory) for sabotage in PLANTED),
        *(checked(replace(HEALTHY, name=f"healthy, seed {s}"), directory, s) for s in range(HEALTHY_SEEDS)),
    ]
