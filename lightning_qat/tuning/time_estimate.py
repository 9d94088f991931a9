"""How long a tuning takes: an estimate before the first training, from an evaluation and a few steps on a copy."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Mapping

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_debug  # type: ignore[attr-defined]

from lightning_qat.callbacks.ladder.training_copy import TrainingCopy
from lightning_qat.callbacks.ladder.training_plan import planned_steps
from lightning_qat.callbacks.preservation.undisturbed import undisturbed
from lightning_qat.callbacks.trainer.seeding import seeded
from lightning_qat.tuning.tuning_settings import TuningSettings

_STEPS = 3
"""Steps that are timed, after one that is not: the first is slow."""


def training_seconds(trainer: pl.Trainer, module: pl.LightningModule, evaluation: float) -> float | None:
    """Estimate how long the training of a run takes, from a few steps on a copy; None if that cannot be known.

    Args:
        trainer: the user's trainer, before training.
        module: its module, which is not changed.
        evaluation: seconds of an evaluation, which ends every epoch.
    """
    accumulated = max(1, trainer.accumulate_grad_batches)
    batches = planned_steps(trainer) * accumulated
    if not batches:
        return None
    ends = [time.monotonic()]
    try:
        with undisturbed(trainer, module, trains=True), seeded(0):
            copy = TrainingCopy(trainer, module, zero_lr=False, freeze_batch_norm=False)
            copy.train(min(batches, 1 + _STEPS), lambda: ends.append(time.monotonic()))
    except Exception as error:  # an estimate is no reason to end a run
        rank_zero_debug(f"the time of a training is not estimated: {error!r}")
        return None
    durations = [end - begin for begin, end in itertools.pairwise(ends)][-_STEPS:]
    if not durations:
        return None
    epochs = max(1.0, batches / max(1.0, float(trainer.num_training_batches)))
    return batches * statistics.median(durations) + epochs * evaluation


def most_trainings(settings: TuningSettings) -> int:
    """Return how many trainings a tuning has at most."""
    single = sum(name not in settings.skip for name in ("wide QAT", "narrow QAT"))
    return single + settings.trainings * ("mixed QAT" not in settings.skip)


def estimate(settings: TuningSettings, stage: float, times: Mapping[str, float]) -> str:
    """Say how long a tuning takes at most.

    Args:
        settings: of the tuning.
        stage: seconds of the first stage, which other stages without training and search take too.
        times: seconds of an ``evaluation``, and of a ``training`` if that is known.

    Example:
        >>> estimate(TuningSettings("train.py", ()), 30.0, {"evaluation": 6.0, "training": 130.0})
        'an evaluation takes about 6 s, a training about 2 min; all stages together at most about 16 min'
        >>> estimate(TuningSettings("train.py", ()), 9.0, {"evaluation": 0.1, "training": 0.4})
        'an evaluation takes less than 1 s, a training less than 1 s; all stages together at most about 84 s'
        >>> estimate(TuningSettings("train.py", ()), 30.0, {"evaluation": 6.0})
        'an evaluation takes about 6 s; how long a training takes is not known before the first one'
    """
    said = f"an evaluation takes {_about(times.get('evaluation', 0.0))}"
    trainings = most_trainings(settings)
    if trainings and "training" not in times:
        return f"{said}; how long a training takes is not known before the first one"
    training = times.get("training", 0.0)
    others = 3 + ("wide calibrated" not in settings.skip)  # narrow calibrated, search, mixed calibrated
    whole = others * stage + settings.evaluations * times.get("evaluation", 0.0) + trainings * (training + stage)
    of_training = f", a training {_about(training)}" if trainings else ""
    return f"{said}{of_training}; all stages together at most about {_duration(whole)}"


def _about(seconds: float) -> str:
    return f"about {_duration(seconds)}" if seconds >= 1 else "less than 1 s"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
