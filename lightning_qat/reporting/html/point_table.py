"""One row per point, from all tables of a run; the columns keep the names that they have in the files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_qat.analysis.diagnosis.diagnosis_result import Diagnosis
from lightning_qat.reporting.html.point_history import PointKey, full_name, point_key
from lightning_qat.reporting.html.run_folder import RunFolder
from lightning_qat.reporting.html.sensitivity_scale import RULE, output_size


@dataclass(frozen=True)
class Column:
    """One column of the table of all points.

    Args:
        key: its name, that of the column in the files where there is one.
        label: what the page calls it.
        help: what it means.
        shown: whether it is shown at first.
        share: whether it is a fraction of something, which the page writes in percent.
    """

    key: str
    label: str
    help: str
    shown: bool = False
    share: bool = False


COLUMNS = (
    Column("point", "point", "name of the quantization point; it can be pasted into an override's match", True),
    Column("op_type", "op", "torch function of its op"),
    Column("role", "role", "output or input of an op, or weight"),
    Column("requested", "requested", "type that the configuration asks for"),
    Column("dtype", "type", "quantized type in effect", True),
    Column("scale", "scale", "step between two codes; the largest one of a point with several", True),
    Column("lowest", "from", "smallest value that the type represents"),
    Column("highest", "to", "largest value that the type represents"),
    Column("min", "min", "smallest value seen"),
    Column("max", "max", "largest value seen"),
    Column("clipped_share", "clipped", "share of the values outside the range of codes", True, share=True),
    Column("used_share", "used", "part of the range of codes that the values reach", share=True),
    Column("rounding_energy", "rounding energy", "sum of squared errors of the values inside the range"),
    Column("clipping_energy", "clipping energy", "sum of squared errors of the values outside the range"),
    Column("sqnr", "SQNR (dB)", "signal to quantization noise of this point in the quantized model", True),
    Column("own_SQNR", "own SQNR (dB)", "the op's own error: it gets the inputs of the float model"),
    Column("SQNR", "accumulated SQNR (dB)", "error with the whole model quantized: own and inherited"),
    Column("origin", "error is", "own, or inherited from what comes before"),
    Column(
        "score",
        "sensitivity",
        "root mean square change of the output, in its unit, when this point alone is quantized; the diagnosis calls "
        f"it large from {RULE} on",
        True,
    ),
    Column("effect", "of the output", "sensitivity as a share of the root mean square of the output", True, share=True),
    Column("standard_error", "± (1 s.e.)", "repeatability of an estimated sensitivity; 0 if it was measured"),
    Column("exact", "measured", "the sensitivity was measured, not estimated"),
    Column(
        "flops_share",
        "FLOPs",
        "share of the op, with what is fused to it, of all floating-point operations",
        share=True,
    ),
    Column("scale_drift", "drift", "change of the scale since calibration, relative to the calibrated one", share=True),
    Column("flip_rate", "flips", "share of the weight codes that changed since the measurement before", share=True),
    Column(
        "verdict",
        "verdict",
        "what the diagnosis says about the point; what follows from another point is mended there",
        True,
    ),
    Column("reason", "rule", "the rule that decided on the type"),
)
_FROM_STATISTICS = (
    "min", "max", "clipped_share", "used_share", "rounding_energy", "clipping_energy", "sqnr", "scale_drift",
    "flip_rate",
)  # fmt: skip
_FROM_SENSITIVITY = ("score", "standard_error", "exact", "flops_share")
_FROM_COMPARISON = ("own_SQNR", "SQNR", "origin")


@dataclass(frozen=True)
class PointTable:
    """All points, in execution order.

    Args:
        keys: of the points.
        rows: one cell per column of :data:`COLUMNS`.
        diagnoses: by key.
    """

    keys: tuple[PointKey, ...] = ()
    rows: tuple[tuple[Any, ...], ...] = ()
    diagnoses: Mapping[PointKey, Diagnosis] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the points, with the path of the region in front unless that is the model itself."""
        return tuple(map(full_name, self.keys))

    def column(self, key: str) -> tuple[Any, ...]:
        """One column."""
        place = next(index for index, column in enumerate(COLUMNS) if column.key == key)
        return tuple(row[place] for row in self.rows)


def point_table(run: RunFolder) -> PointTable:
    """Put together what all tables of a run say about each point.

    Args:
        run: its files; what follows from another point is known from
            :func:`~lightning_qat.reporting.html.point_causes.with_causes` on.
    """
    planned = {point_key(path, p.get("name")): p for path, held in run.regions.items() for p in held.get("points", [])}
    compared = {point_key(r.get("region"), r["point"]): r for r in run.comparison.rows if r.get("point")}
    keys = dict.fromkeys([*planned, *run.statistics.latest, *run.sensitivity.latest, *compared])
    diagnoses, size = _diagnoses(run), output_size(run)
    requested = _requested(run)
    rows = []
    for key in keys:
        plan, statistics = planned.get(key, {}), run.statistics.latest.get(key, {})
        sensitivity, comparison = run.sensitivity.latest.get(key, {}), compared.get(key, {})
        scale, lowest, highest = _range(plan)
        diagnosis = diagnoses.get(key)
        dtype = plan.get("dtype") or statistics.get("dtype") or sensitivity.get("quant_dtype")
        cells = {
            "point": full_name(key),
            "op_type": plan.get("op_type") or statistics.get("op_type") or sensitivity.get("op_type"),
            "role": plan.get("role") or statistics.get("role") or sensitivity.get("sensitive_type"),
            "requested": requested.get(key, dtype) if run.model_check is not None else None,
            "dtype": dtype,
            "scale": scale if scale is not None else statistics.get("scale"),
            "lowest": lowest,
            "highest": highest,
            "effect": _share(sensitivity.get("score"), size),
            "verdict": None if diagnosis is None else f"{diagnosis.verdict}{', follows' if key in run.follows else ''}",
            "reason": plan.get("reason"),
            **{name: statistics.get(name) for name in _FROM_STATISTICS},
            **{name: sensitivity.get(name) for name in _FROM_SENSITIVITY},
            **{name: comparison.get(name) for name in _FROM_COMPARISON},
        }
        rows.append(tuple(cells[column.key] for column in COLUMNS))
    return PointTable(tuple(keys), tuple(rows), diagnoses)


def _diagnoses(run: RunFolder) -> dict[PointKey, Diagnosis]:
    """What the diagnosis says; that of the model that training started from, where the later one says nothing."""
    results = [result for result in (run.start_diagnosis, run.diagnosis) if result is not None]
    found: dict[PointKey, Diagnosis] = {}
    for result in results:
        found.update({point_key(row.region, row.point): row for row in result.rows})
    return found


def _requested(run: RunFolder) -> dict[PointKey, str]:
    """The points whose type is not the one that a rule asks for: the model check has a table of them."""
    found = {}
    for section in run.model_check.sections if run.model_check is not None else ():
        if section.columns[:2] == ("point", "requested"):
            found.update({point_key(section.region, row[0]): str(row[1]) for row in section.rows})
    return found


def _share(score: Any, size: float | None) -> float | None:
    return score / size if isinstance(score, (int, float)) and size is not None else None


def _range(plan: Mapping[str, Any]) -> tuple[float | None, float | None, float | None]:
    """The scale of a point, and the values that its type represents; those of its coarsest channel."""
    scales, zeros = _numbers(plan.get("scale")), _numbers(plan.get("zero_point"))
    smallest, largest = _numbers(plan.get("quant_min")), _numbers(plan.get("quant_max"))
    if not scales or not smallest or not largest:
        return None, None, None
    place = max(range(len(scales)), key=scales.__getitem__)
    zero = zeros[place] if place < len(zeros) else 0.0
    return scales[place], (smallest[0] - zero) * scales[place], (largest[0] - zero) * scales[place]


def _numbers(value: Any) -> list[float]:
    values: Iterable[Any] = value if isinstance(value, list) else [value]
    return [float(v) for v in values if isinstance(v, (int, float)) and math.isfinite(v)]
