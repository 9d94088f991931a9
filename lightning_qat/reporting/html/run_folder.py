"""The files of one run, read back for its report. A file that is missing or damaged is a gap, never an error."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lightning_qat.analysis.convergence.convergence import ConvergenceResult, ConvergenceVerdict
from lightning_qat.analysis.convergence.training_series import ConvergenceRow
from lightning_qat.analysis.diagnosis.diagnosis_result import Diagnosis, DiagnosisResult
from lightning_qat.analysis.fingerprint.difference import PipelineDifference, PipelineDifferences, StageDifferences
from lightning_qat.analysis.ladder.pipeline_result import PipelineResult
from lightning_qat.analysis.ladder.rows import PipelineRow
from lightning_qat.analysis.ladder.rungs import Verdict
from lightning_qat.analysis.model_check.model_check_result import ModelCheckResult
from lightning_qat.analysis.open_question import OpenQuestion
from lightning_qat.analysis.runs.accuracy import AccuracyResult
from lightning_qat.analysis.runs.run_files import FOLDER, files_folder, log_directory
from lightning_qat.quantization.errors import ConfigurationError, DamagedFileError
from lightning_qat.quantization.reading.files import Document
from lightning_qat.reporting.accuracy_table_files import OWN_TABLE, read_own_accuracy
from lightning_qat.reporting.html.point_history import PointHistory, PointKey, read_history
from lightning_qat.reporting.model_check_file import FILE_NAME, read_model_check

T = TypeVar("T")
LADDER_FILES = ("pipeline_check", "zero_lr_finetune", "float_finetune")
"""The most complete first."""
STATISTICS_SERIES = ("scale", "clipped_share", "flip_rate", "scale_drift", "sqnr")
SENSITIVITY_SERIES = ("score",)
_FILES_OF_A_RUN = (
    "quant_plan.json", "layer_statistics.csv", "sensitivity.csv", "layer_comparison.json", "model_check_result.json",
    "convergence.json", OWN_TABLE, "front.json", "search/front.json", *(f"{name}.json" for name in LADDER_FILES),
)  # fmt: skip
_REMEDY = "the report is made without it"


@dataclass(frozen=True)
class Gap:
    """Something that the report does not show.

    Args:
        what: the subject, such as ``accuracy``.
        why: why it is missing, and what to do to have it.
    """

    what: str
    why: str


@dataclass(frozen=True)
class Table:
    """A table as its JSON file holds it.

    Args:
        rows: by column.
        about: what stands beside the rows.
    """

    rows: tuple[dict[str, Any], ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFolder:
    """What the files of a run say.

    Args:
        name: what the run is called.
        path: the folder of its files.
        regions: of ``quant_plan.json``, by path of the target.
        statistics, sensitivity: the growing tables.
        comparison: the layer comparison of the last epoch.
        sensitivity_table, statistics_table: what their JSON files hold beside the rows.
        diagnosis: of the last analysis.
        start_diagnosis: of the calibrated model, if calibration has made a metric worse.
        convergence, model_check, accuracy: these results.
        ladders: results of the pipeline checks, by name of the file.
        front: the choices of mixed precision, the cheapest first, and what is chosen.
        provenance: how the run was started.
        gaps: what is damaged.
        follows: the points whose error comes from a point before them, with its name; empty as it is read.
    """

    name: str
    path: Path
    regions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    statistics: PointHistory = field(default_factory=PointHistory)
    sensitivity: PointHistory = field(default_factory=PointHistory)
    comparison: Table = field(default_factory=Table)
    statistics_table: Table = field(default_factory=Table)
    sensitivity_table: Table = field(default_factory=Table)
    diagnosis: DiagnosisResult | None = None
    start_diagnosis: DiagnosisResult | None = None
    convergence: ConvergenceResult | None = None
    model_check: ModelCheckResult | None = None
    accuracy: AccuracyResult | None = None
    ladders: Mapping[str, PipelineResult] = field(default_factory=dict)
    front: Table = field(default_factory=Table)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    gaps: tuple[Gap, ...] = ()
    follows: Mapping[PointKey, str] = field(default_factory=dict)


def read_run(path: str | os.PathLike[str]) -> RunFolder:
    """Read the files of a run; of a run without any, everything is empty.

    Args:
        path: its log directory, or the folder ``lightning_qat`` in it.
    """
    return _Reader(files_folder(path)).run()


def require_run(path: str | os.PathLike[str]) -> Path:
    """Return the path of a run that has files.

    Args:
        path: its log directory, or the folder ``lightning_qat`` in it.

    Raises:
        ConfigurationError: there is no such folder, or it holds no file of a run.
    """
    place = Path(path)
    if not place.is_dir():
        raise ConfigurationError(f"there is no folder {place}: give the log directory of a run.")
    folder = files_folder(place)
    if not any((folder / name).is_file() for name in _FILES_OF_A_RUN):
        raise ConfigurationError(
            f"{folder} holds no file of a run: give the log directory of a run with QuantizationAwareTraining(), "
            f"which has a folder {FOLDER}."
        )
    return place


class _Reader:
    """Reads one folder, and collects what cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gaps: list[Gap] = []

    def run(self) -> RunFolder:
        accuracy = self._tried(OWN_TABLE, lambda path: read_own_accuracy(path))
        return RunFolder(
            name=accuracy.run if accuracy is not None and accuracy.run else _run_name(log_directory(self.folder)),
            path=self.folder,
            regions=self._regions(),
            statistics=self._history("layer_statistics.csv", STATISTICS_SERIES),
            sensitivity=self._history("sensitivity.csv", SENSITIVITY_SERIES),
            comparison=self._table("layer_comparison.json"),
            statistics_table=self._table("layer_statistics.json"),
            sensitivity_table=self._table("sensitivity.json"),
            diagnosis=self._diagnosis("diagnosis.json"),
            start_diagnosis=self._diagnosis("calibrated_diagnosis.json"),
            convergence=self._convergence(),
            model_check=self._tried(f"{FILE_NAME}.json", read_model_check),
            accuracy=accuracy,
            ladders={name: found for name in LADDER_FILES if (found := self._ladder(name)) is not None},
            front=self._front(),
            provenance=self._tried("provenance.json", _mapping) or {},
            gaps=tuple(self.gaps),
        )

    def _tried(self, name: str, read: Any) -> Any:
        """What a file holds; None if there is none, or if it is damaged."""
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            return read(path)
        except DamagedFileError as error:
            self.gaps.append(Gap(name, str(error)))
            return None

    def _history(self, name: str, columns: tuple[str, ...]) -> PointHistory:
        return self._tried(name, lambda path: read_history(path, columns)) or PointHistory()

    def _table(self, name: str) -> Table:
        document = self._tried(name, _mapping)
        if document is None:
            return Table()
        about = dict(document)
        rows = about.pop("rows", [])
        is_table = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
        if not is_table:
            self.gaps.append(Gap(name, f"{self.folder / name} holds no rows; {_REMEDY}."))
        return Table(tuple(rows) if is_table else (), about)

    def _regions(self) -> dict[str, Mapping[str, Any]]:
        document = self._tried("quant_plan.json", _mapping) or {}
        regions = document.get("regions")
        return {path: held for path, held in regions.items() if _is_plan(held)} if isinstance(regions, dict) else {}

    def _diagnosis(self, name: str) -> DiagnosisResult | None:
        found = self._tried(name, lambda path: _typed(path, _StoredDiagnosis))
        return None if found is None else DiagnosisResult(**vars(found))

    def _convergence(self) -> ConvergenceResult | None:
        found = self._tried("convergence.json", lambda path: _typed(path, _StoredConvergence))
        return None if found is None else ConvergenceResult(**vars(found))

    def _ladder(self, name: str) -> PipelineResult | None:
        found = self._tried(f"{name}.json", lambda path: _typed(path, _StoredLadder))
        if found is None:
            return None
        differences = PipelineDifferences(found.differences.rows, found.differences.note)
        stages = StageDifferences(found.stages.rows, found.stages.note)
        held = {**vars(found), "differences": differences, "stages": stages, "finding": found.finding or found.note}
        return PipelineResult(**held)

    def _front(self) -> Table:
        for name in ("front.json", "search/front.json"):
            if (self.folder / name).is_file():
                return self._table(name)
        return Table()


@dataclass(frozen=True)
class _StoredDiagnosis:
    rows: tuple[Diagnosis, ...]
    remark: str = ""
    calibration: str = ""
    left_open: OpenQuestion = ""


@dataclass(frozen=True)
class _StoredConvergence:
    rows: tuple[ConvergenceRow, ...]
    verdict: ConvergenceVerdict
    note: str = ""
    steps: int = 0
    epochs: int = 0


@dataclass(frozen=True)
class _StoredDifferences:
    rows: tuple[PipelineDifference, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class _StoredLadder:
    rows: tuple[PipelineRow, ...]
    verdict: Verdict
    note: str = ""
    rung: int | None = None
    cause: str = ""
    differences: _StoredDifferences = field(default_factory=_StoredDifferences)
    stages: _StoredDifferences = field(default_factory=_StoredDifferences)
    finding: str = ""
    next_step: str = ""


def _typed(path: Path, kind: type[T]) -> T:
    return Document(path, "a report of this version", _REMEDY).as_json(kind, ignore_unknown=True)


def _mapping(path: Path) -> dict[str, Any]:
    document = Document(path, "a report of a run", _REMEDY)
    found = document.json()
    if not isinstance(found, dict):
        raise document.error("it is no object")
    return found


def _is_plan(held: Any) -> bool:
    return isinstance(held, dict) and all(
        isinstance(held.get(part, []), list) and all(isinstance(row, dict) for row in held.get(part, []))
        for part in ("points", "ops")
    )


def _run_name(root: Path) -> str:
    """The last two parts of a log directory: ``int8/version_0``."""
    return "/".join(root.resolve().parts[-2:]).replace(os.sep, "/").lstrip("/")
