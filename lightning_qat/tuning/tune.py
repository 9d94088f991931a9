"""From a float checkpoint and a target to the smallest share of wide types that meets it: ``tune(...)``."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lightning_qat.analysis.mixed_precision.precision_errors import PrecisionErrors
from lightning_qat.atomic_files import write_atomically
from lightning_qat.quantization.region.effective_dtypes import bits
from lightning_qat.reporting.files import write_result
from lightning_qat.reporting.reports import markdown_report
from lightning_qat.tuning.manifest import ManifestFile, StageOutcome
from lightning_qat.tuning.stage_request import StageKind
from lightning_qat.tuning.stage_runner import StageRunner
from lightning_qat.tuning.stage_work import ERRORS, distinct_mixes
from lightning_qat.tuning.target_check import TargetCheck
from lightning_qat.tuning.time_estimate import estimate
from lightning_qat.tuning.tuning_result import TuningResult, tuning_result
from lightning_qat.tuning.tuning_settings import TuningSettings, default_directory


def tune(
    script: str | os.PathLike[str] | None,
    arguments: Sequence[str] = (),
    *,
    target: str | float | dict[str, str | float] = "1%",
    metrics: Sequence[str] = (),
    dtypes: tuple[str, str] = ("int8", "int16"),
    always: Sequence[str] = (),
    ckpt_path: str | None = None,
    skip: Sequence[str] = (),
    explore: bool = False,
    output: str | None = None,
    repeat: Sequence[str] = (),
    folder: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = print,
) -> TuningResult:
    """Find the configuration with the fewest wide points that meets a target, by running the user's own training.

    The stages are those of a person: evaluate float and check the model; calibrate and train at the wide type, which
    flushes out mistakes; calibrate and train at the narrow type; then raise the points that matter. Their order comes
    from one measurement (:func:`lightning_qat.measure_errors`), their number from at most eight evaluations, and at
    most three trainings confirm it. Each stage is a run of the script with its own types, in a process of its own, and
    writes its configuration (ready for ``fit``), checkpoint and reports into its own folder.

    It can be killed at any moment: started again with the same arguments, it goes on in the stage it was in.

    Args:
        script: the script that trains; None for a configuration that names its classes.
        arguments: those of the script; for LightningCLI, those that follow ``fit``.
        target: how much worse than float the metrics may be (``"1%"``), or the value to reach; or one per metric.
        metrics: the metrics that count; all scores if not given.
        dtypes: the narrow and the wide type.
        always: points that are raised in any case.
        ckpt_path: checkpoint for ``trainer.fit``; without QuantizationAwareTraining in the project, float weights.
        skip: stages to leave out: ``wide calibrated``, ``wide QAT``, ``narrow QAT``, ``mixed QAT``.
        explore: go on after the target is met, to fill the table.
        output: which output of the quantized part the errors are measured at.
        repeat: names of stages to run once more, although they are done.
        folder: where everything goes; ``tuning_<script>`` if not given.
        say: called with each line of progress.

    Returns:
        The result table, the recommended stage, and the sentence for the report.

    Raises:
        ConfigurationError: a target or metric makes no sense, a stage has failed, or the folder holds another tuning.

    Example::

        result = lightning_qat.tune("train.py", ["--config", "int8.yaml"], target="1%", metrics=["val_acc"])
        print(result.note)  # and: python train.py fit --config tuning_train/recommended.yaml
    """
    settings = TuningSettings(
        None if script is None else os.fspath(script),
        tuple(arguments),
        dtypes[0],
        dtypes[1],
        target,
        tuple(metrics),
        tuple(always),
        ckpt_path,
        tuple(skip),
        explore,
        output=output,
    )
    place = Path(folder) if folder is not None else default_directory(settings.script)
    return Tuning(settings, place, say, repeat).run()


class StoppedError(Exception):
    """Ends a tuning before the target is met; the message says why."""


class Tuning:
    """One tuning: the decisions between its stages.

    Args:
        settings: what it is asked for.
        folder: where everything goes.
        say: called with each line of progress.
        repeat: stages to run once more.

    Raises:
        ConfigurationError: the folder holds another tuning, or a stage to repeat has not run.
    """

    def __init__(
        self, settings: TuningSettings, folder: Path, say: Callable[[str], None], repeat: Sequence[str] = ()
    ) -> None:
        self.settings = settings
        self.folder = folder = folder.resolve()  # the script may change the directory
        self.manifest = ManifestFile(folder, settings)
        self.stages = StageRunner(folder, self.manifest, settings, say)
        for name in repeat:
            self.stages.forget(name)
        self.say = say
        self._has_trained = False
        self.met: list[str] = []
        """Stages that meet the target, the narrowest types last."""

    def run(self) -> TuningResult:
        """Run what is left to do, and write the result."""
        stopped = ""
        first = self.stages.run("float", "float", self.settings.wide)
        self.float_metrics = dict(first.metrics["float"])
        self.say(estimate(self.settings, first.seconds, first.times))
        self.check = TargetCheck(self.settings, self.float_metrics)
        try:
            self._wide()
            if not self._narrow():
                self._mixed()
        except StoppedError as reason:
            stopped = str(reason)
        recommended = self._recommended()
        result = tuning_result(self.manifest.manifest, self.settings, self.folder, recommended, stopped)
        write_result(result, self.folder, "result", formats=("csv", "txt", "json"))
        write_atomically(self.folder / "result.md", markdown_report(result.full_blocks()) + "\n")
        target = self.folder / "recommended.yaml"
        if recommended:
            write_atomically(target, (self.stages.stage_folder(recommended) / "config.yaml").read_bytes())
        else:
            target.unlink(missing_ok=True)
        return result

    def _wide(self) -> None:
        wide = self.settings.wide
        if "wide calibrated" not in self.settings.skip:
            outcome = self._stage("wide calibrated", "calibrated", wide)
            self._meets("wide calibrated", outcome.metrics["calibrated"])
            fallen = self.check.collapsed(outcome.metrics["calibrated"])
            if fallen:
                raise StoppedError(
                    f"all points at {wide} lose more than 10 % of {', '.join(fallen)} by calibration alone. "
                    f"{_cause(wide)} {' '.join(outcome.remarks) or 'See the model check.'}"
                )
        if "wide QAT" not in self.settings.skip:
            self._trained("wide QAT", wide, (), must_hold=True)

    def _narrow(self) -> bool:
        """Whether the narrow type alone is enough."""
        narrow = self.settings.narrow
        always = self.settings.always
        outcome = self._stage("narrow calibrated", "calibrated", narrow, always)
        metrics = outcome.metrics["calibrated"]
        if self._meets("narrow calibrated", metrics) and not self.settings.explore:
            return True
        if "narrow QAT" in self.settings.skip or self.check.collapsed(metrics):
            return False  # a collapsed model is not trained
        return self._trained("narrow QAT", narrow, always) and not self.settings.explore

    def _mixed(self) -> None:
        """Calibrate the mix that the search found; then let training do with fewer points, or with more."""
        found = self._stage("search", "search", self.settings.narrow)
        outcome = self._stage("mixed calibrated", "calibrated", self.settings.narrow, found.raised)
        passes = self._meets("mixed calibrated", outcome.metrics["calibrated"])
        if "mixed QAT" in self.settings.skip:
            return
        errors = PrecisionErrors.load(self.folder / "search" / ERRORS)
        mixes = distinct_mixes(errors, self.settings.always)
        chosen = found.sizes["chosen"]
        number, tried = chosen // 2 if passes else chosen, dict[int, bool]()
        while number and number not in tried and len(tried) < self.settings.trainings:
            raised = mixes[number].raised
            tried[number] = self._trained(f"mixed QAT {len(raised)}", self.settings.narrow, raised)
            turned = len(set(tried.values())) > 1
            if turned or (passes and not tried[number]):
                break
            number = number // 2 if tried[number] else min(len(mixes) - 1, 2 * number)

    def _trained(self, name: str, dtype: str, raised: tuple[str, ...], must_hold: bool = False) -> bool:
        outcome = self._stage(name, "train", dtype, raised)
        metrics = outcome.metrics["QAT"]
        if not self._has_trained and outcome.seconds:  # a stage that ended before a restart does not know its time
            self._has_trained = True
            self.say(f"that stage took {outcome.seconds:.0f} s; so may each training to come")
        if self._meets(name, metrics):
            return True
        if self.check.collapsed(metrics):
            ladder = self._stage(f"{name} ladder", "ladder", dtype, raised)
            why = " ".join(ladder.remarks)
            if must_hold or why.startswith(("pipeline misaligned", "hyperparameters")):
                raise StoppedError(f"{name} collapses. {why}")
        return False

    def _stage(self, name: str, kind: StageKind, dtype: str, raised: tuple[str, ...] = ()) -> StageOutcome:
        after = ("float", "search") if name.startswith("mixed") else ("float",)
        return self.stages.run(name, kind, dtype, raised=raised, after=after, float_metrics=self.float_metrics)

    def _meets(self, name: str, metrics: Mapping[str, float]) -> bool:
        passes = self.check.passes(metrics)
        values = ", ".join(f"{metric} {metrics.get(metric, math.nan):.4g}" for metric in self.check.targets)
        self.say(f"{name}: {values}: {'meets' if passes else 'misses'} the target")
        if passes:
            self.met.append(name)
        return passes

    def _recommended(self) -> str:
        """The stage with the fewest wide points; of those, the first: calibration before training."""
        points = {name: self._wide_points(name) for name in self.met}
        return min(self.met, key=lambda name: points[name], default="")

    def _wide_points(self, name: str) -> int:
        outcome = self.manifest.outcome(name)
        assert outcome is not None
        return outcome.points if name.startswith("wide") else len(outcome.raised)


def _cause(wide: str) -> str:
    """Say why points at the wide type alone may lose that much."""
    if bits(wide) > bits("int8"):
        return "That is no question of types."
    return f"Either {wide} is too narrow for this model (--dtypes takes a wider one, int16), or there is a mistake."
