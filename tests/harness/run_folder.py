"""The folder of a run as the callbacks leave it, of any size, without training: to test and to measure reports."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_qat.analysis.convergence.convergence import ConvergenceResult
from lightning_qat.analysis.convergence.training_series import ConvergenceRow
from lightning_qat.analysis.diagnosis.diagnosis_result import Diagnosis, DiagnosisResult
from lightning_qat.analysis.ladder.pipeline_result import PipelineResult
from lightning_qat.analysis.ladder.rows import PipelineRow
from lightning_qat.analysis.ladder.rungs import Verdict
from lightning_qat.analysis.model_check.finding import Finding
from lightning_qat.analysis.model_check.model_check_result import ModelCheckResult, Section
from lightning_qat.analysis.runs.accuracy import ResultTable
from lightning_qat.analysis.sensitivity.sensitivity_result import SensitivityResult, SensitivityRow
from lightning_qat.analysis.statistics.statistics import LayerStatisticsResult, LayerStatisticsRow
from lightning_qat.reporting.accuracy_table_files import OWN_TABLE
from lightning_qat.reporting.files import write_json, write_result
from lightning_qat.reporting.growing_table import GrowingTable


def point_names(count: int) -> list[str]:
    """Names of points, three to an op."""
    roles = ("weight", "output", "input1")
    return [f"stage{i // 60}.block{i // 12 % 5}.conv{i // 3 % 4}.{roles[i % 3]}" for i in range(count)]


def write_run(folder: Path, names: Sequence[str] | int = 12, epochs: int = 3, seed: int = 0) -> Path:
    """Write plan, layer statistics and sensitivity of a run.

    Args:
        folder: its log directory.
        names: of its points, or how many.
        epochs: epochs that were analysed.
        seed: decides on the numbers.

    Returns:
        The log directory.
    """
    points = point_names(names) if isinstance(names, int) else list(names)
    place = folder / "lightning_qat"
    place.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    statistics, sensitivity = GrowingTable(place / "layer_statistics.csv"), GrowingTable(place / "sensitivity.csv")
    for epoch in range(epochs):
        of_layers = LayerStatisticsResult(tuple(statistics_row(name, draw) for name in points))
        of_output = SensitivityResult(tuple(sensitivity_row(name, draw) for name in points), points=len(points))
        statistics.write(of_layers, epoch)
        sensitivity.write(of_output, epoch)
    write_json(of_layers, place / "layer_statistics.json", epochs - 1)
    write_json(of_output, place / "sensitivity.json", epochs - 1)
    (place / "quant_plan.json").write_text(json.dumps(plan(points)))
    return folder


def plan(points: Sequence[str]) -> dict[str, Any]:
    """A plan of int8 points, and one op in float for each hundred of them."""
    ops: dict[str, dict[str, Any]] = {}
    before: list[str] = []
    for number, name in enumerate(points):
        op = name.rpartition(".")[0] or name
        if op not in ops:
            ops[op] = {"name": op, "status": "float" if number % 100 == 99 else "quantized", "reason": "",
                       "op_type": "conv2d", "location": "net.py:1", "inputs": before}  # fmt: skip
            before = [op]
    rows = [
        {"name": name, "op": name.rpartition(".")[0] or name, "op_type": "conv2d", "role": name.rpartition(".")[2],
         "operand": -1, "dtype": "int16" if number % 17 == 16 else "int8", "quant_min": -128, "quant_max": 127,
         "scale": 0.5, "zero_point": 0, "reason": "default"}
        for number, name in enumerate(points)
    ]  # fmt: skip
    return {"format_version": 1, "regions": {"": {"points": rows, "ops": list(ops.values()), "float_points": {}}}}


def statistics_row(point: str, draw: random.Random) -> LayerStatisticsRow:
    """One point with random numbers."""
    return LayerStatisticsRow(
        point, "conv2d", "weight" if point.endswith("weight") else "activation", "int8", draw.random() * 0.1,
        -draw.random(), draw.random(), draw.random(), draw.random(), draw.choice((0.0, draw.random() * 0.01)),
        draw.random(), draw.random(), draw.random(), draw.random(), draw.random() - 0.5, draw.random(), "rounding",
        20 + 30 * draw.random(), 4096, 0,
    )  # fmt: skip


def sensitivity_row(point: str, draw: random.Random) -> SensitivityRow:
    """One point with a random score."""
    score = draw.random()
    return SensitivityRow(point.rpartition(".")[0], "weight" if point.endswith("weight") else "activation", "conv2d",
                          score**2, "int8", point, score, True, 0.0, 0.01)  # fmt: skip


def write_accuracy(folder: Path, passed: bool | None, stages: Sequence[str] = ("calibrated", "QAT")) -> None:
    """Write the accuracy table of a run, with a target of 1 % that it reaches, misses, or does not have."""
    table = ResultTable()
    table.record("run", "float", {"val_acc": 0.9})
    for stage in stages:
        table.record("run", stage, {"val_acc": 0.9 if passed else 0.5})
    result = replace(table.result("run", ["val_acc"], None if passed is None else "1%"), samples=4321)
    write_json(result, folder / "lightning_qat" / OWN_TABLE)


def write_ladder(
    folder: Path,
    verdict: Verdict = "pipeline misaligned",
    finding: str = "it collapses.",
    next_step: str = "Compare the data.",
    cause: str = "",
) -> None:
    """Write a pipeline check."""
    status = "holds" if verdict == "healthy" else "breaks"
    row = PipelineRow(2, "lr 0, BN fixed", "val_acc", 0.9, 0.1, 0.05, status)
    note = f"{verdict} (rung 2): {finding} {next_step}" + (f" Most likely cause: {cause}." if cause else "")
    result = PipelineResult((row,), verdict, note, 2, cause, finding=finding, next_step=next_step)
    write_json(result, folder / "lightning_qat" / "pipeline_check.json")


def write_convergence(folder: Path, verdict: str = "diverging", names: tuple[str, ...] = ()) -> None:
    """Write a convergence report with one flag, or a healthy one."""
    flagged = ConvergenceRow("loss", "flagged", 9.0, 1.0, "The loss rises.", "Lower the learning rate.", names)
    rows = () if verdict in ("healthy", "too early") else (flagged,)
    result = ConvergenceResult(rows, verdict, f"{verdict}: see the rows.", 10, 2)  # type: ignore[arg-type]
    write_json(result, folder / "lightning_qat" / "convergence.json")


def write_diagnosis(folder: Path, *culprits: str, name: str = "diagnosis") -> None:
    """Write a diagnosis that wants some points raised."""
    rows = tuple(
        Diagnosis(point, "clipping", f"2 % of {point} clipped.", "Calibrate anew.", f'- {{match: "{point}"}}\n', 4.0)
        for point in culprits
    )
    write_result(DiagnosisResult(rows), folder / "lightning_qat", name)


def write_model_check(folder: Path, *names: str, severity: Any = "warning", region: str = "") -> None:
    """Write a model check with one finding, and one point whose type is not the requested one."""
    finding = Finding(severity, "unfused", names, "They do not fuse.", "It is slow.", "Mark it.", "net.py:3",
                      "overrides: []\n", region)  # fmt: skip
    rows = tuple((name, "int16", "rule 1", "int8", "rule 2") for name in names)
    columns = ("point", "requested", "by", "effective", "winner")
    section = Section("Requested and effective dtypes:", columns, rows, region=region)
    write_result(ModelCheckResult((finding,), (section,)), folder / "lightning_qat", "model_check_result",
                 formats=("txt", "json"))  # fmt: skip
