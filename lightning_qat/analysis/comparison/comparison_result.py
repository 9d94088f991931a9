"""The table of a layer comparison: its rows and columns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from typing_extensions import override

from lightning_qat.analysis.comparison.loop_rounds import worst_rounds
from lightning_qat.analysis.comparison.point_evidence import PointEvidence
from lightning_qat.analysis.results import Result
from lightning_qat.quantization.counts import number_of

Origin = Literal["own", "inherited", "none"]

CHOSEN = "<output>"
"""Name of the last row, that of the chosen output."""


@dataclass(frozen=True)
class LayerComparisonRow:
    """One tensor of the float model (``base``) beside that of the quantized model (``analy``).

    Without a prefix, the columns are about the *accumulated* error: the whole model is quantized. With ``own_`` they
    are about the op's *own* error: its inputs are those of the float model, and only its own fake-quants are on (of
    everything it is fused with, too). Definitions:
    :class:`~lightning_qat.analysis.comparison.comparison_metrics.LayerErrors`.

    Args:
        index: position in execution order.
        mod_name: name of the op for its result, of the point for its inputs and weights.
        base_op_type: torch function; ``input`` and ``weight`` for what goes into one.
        analy_op_type: the same in the quantized model: one type for a fused group, ``fake_quantize`` for an input or
            weight.
        shape: of the last batch.
        quant_dtype: quantized type, ``float32`` if the tensor is not quantized.
        qscale: scale; the largest (coarsest) of a tensor with several; None if it has none.
        Cosine, MSE, L1, KL, SQNR, Atol, Rtol: accumulated error. None where the two models cannot be compared,
            because a tensor has other shapes or another number of them.
        base_model_min, analy_model_min, base_model_max, analy_model_max, base_model_mean, analy_model_mean,
            base_model_var, analy_model_var: of the values; variances are unbiased.
        max_atol_diff: the same as Atol.
        max_qscale_diff: Atol divided by qscale: the largest error in steps.
        own_Cosine, own_MSE, own_L1, own_KL, own_SQNR, own_Atol, own_Rtol: own error.
        origin: ``own`` if at least half of the accumulated error's energy could be the op's own, ``inherited`` if more
            than half comes from before, ``none`` without an error.
        point: name of the quantization point; empty for a tensor without one.
        region: path of the target in the model, ``""`` for the model itself.
        loop: the line whose round it is, ``<torch function> in <file.py:line>``, if it is in a loop of 64 rounds or
            more that are ops of their own; else empty.
    """

    index: int
    mod_name: str
    base_op_type: str
    analy_op_type: str
    shape: str
    quant_dtype: str
    qscale: float | None
    Cosine: float | None
    MSE: float | None
    L1: float | None
    KL: float | None
    SQNR: float | None
    Atol: float | None
    Rtol: float | None
    base_model_min: float | None
    analy_model_min: float | None
    base_model_max: float | None
    analy_model_max: float | None
    base_model_mean: float | None
    analy_model_mean: float | None
    base_model_var: float | None
    analy_model_var: float | None
    max_atol_diff: float | None
    max_qscale_diff: float | None
    own_Cosine: float | None
    own_MSE: float | None
    own_L1: float | None
    own_KL: float | None
    own_SQNR: float | None
    own_Atol: float | None
    own_Rtol: float | None
    origin: Origin | None
    point: str
    region: str = ""
    loop: str = ""


@dataclass(frozen=True)
class LayerComparisonResult(Result[LayerComparisonRow]):
    """One row per input, weight and result that is quantized or could be, in execution order; the chosen output last.

    Of a long loop, whose rounds are rows of their own, people are shown the worst round of each line (on
    the terminal, in txt and in TensorBoard); csv and json hold all.

    Args:
        output: description of the chosen output.
        batches: number of batches, on all ranks that took part.
        diverged: rows whose tensors cannot be compared: they have other shapes, or there is another number of them.
        kept_bytes: the most memory that float values took at a time.
        evidence: the numbers that a diagnosis needs, per point; not written to files.
        what_to_do: lines of advice, worst first.
        lost_output: whether a part of the chosen output is lost in the quantized model.
    """

    title: ClassVar[str] = "Layer comparison"
    shown: ClassVar[tuple[str, ...]] = ("mod_name", "quant_dtype", "qscale", "SQNR", "own_SQNR", "origin")

    output: str = ""
    batches: int = 0
    diverged: tuple[str, ...] = ()
    kept_bytes: int = 0
    evidence: tuple[PointEvidence, ...] = ()
    what_to_do: tuple[str, ...] = ()
    lost_output: bool = dataclasses.field(default=False, repr=False)

    def columns(self) -> tuple[str, ...]:
        """Names of all columns, also without rows."""
        return tuple(LayerComparisonRow.__dataclass_fields__)

    def about(self) -> dict[str, Any]:
        """Return the facts beside the rows, without the evidence."""
        return {**super().about(), "evidence": ()}

    @override
    def for_people(self) -> LayerComparisonResult:
        """Keep one round per line of a loop: the one with the lowest own SQNR."""

        def badness(row: LayerComparisonRow) -> float:
            return -math.inf if row.own_SQNR is None else math.inf if math.isnan(row.own_SQNR) else -row.own_SQNR

        kept = worst_rounds(self.rows, lambda r: r.loop and (r.region, r.loop, r.base_op_type), badness)
        rows = [
            dataclasses.replace(row, mod_name=f"{row.mod_name} (worst of {rounds} rounds)") if rounds > 1 else row
            for row, rounds in kept
        ]
        return dataclasses.replace(self, rows=tuple(rows))

    @property
    def by_name(self) -> dict[str, LayerComparisonRow]:
        """Rows by ``mod_name``."""
        return {row.mod_name: row for row in self.rows}

    @property
    def output_size(self) -> float | None:
        """Root mean square of the chosen output of the float model; None if the two models cannot be compared."""
        row = self.by_name.get(CHOSEN)
        if row is None or row.base_model_mean is None or row.base_model_var is None:
            return None
        return math.hypot(row.base_model_mean, math.sqrt(row.base_model_var) if row.base_model_var > 0 else 0.0)

    @property
    def note(self) -> str:
        """Say what was compared, and what to do about it."""
        text = f"float (base) against quantized (analy), {number_of(self.batches, 'batch')}, {self.output}"
        if self.diverged:
            text += f"; {len(self.diverged)} rows cannot be compared (other shapes): {', '.join(self.diverged[:3])}"
        return "\n".join([text, *self.what_to_do])

    @classmethod
    def merged(cls, results: Mapping[str, LayerComparisonResult]) -> LayerComparisonResult:
        """Put the results of several regions together, by the paths of their targets."""
        first = next(iter(results.values()))
        rows = [dataclasses.replace(row, region=name) for name, result in results.items() for row in result.rows]
        return dataclasses.replace(
            first,
            rows=tuple(dataclasses.replace(row, index=index) for index, row in enumerate(rows)),
            diverged=tuple(f"{n}: {row}" if n else row for n, result in results.items() for row in result.diverged),
            kept_bytes=max(result.kept_bytes for result in results.values()),
            evidence=tuple(e for result in results.values() for e in result.evidence),
            what_to_do=tuple(line for result in results.values() for line in result.what_to_do),
            lost_output=any(result.lost_output for result in results.values()),
        )
