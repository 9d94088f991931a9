"""Which point, quantized alone, changes the chosen output most: ``sensitivity(region, batches)``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

from lightning_qat.analysis.captured_calls import analysis_mode
from lightning_qat.analysis.flops import flops_shares
from lightning_qat.analysis.influence import Influence, influence_on
from lightning_qat.analysis.metrics import metric_of_sums
from lightning_qat.analysis.outputs import OutputSelector
from lightning_qat.analysis.region_memory import RegionMemory
from lightning_qat.analysis.sensitivity.isolation import Isolation, choose_points
from lightning_qat.analysis.sensitivity.sensitivity_metric import MetricLike, SensitivityMetric
from lightning_qat.analysis.sensitivity.sensitivity_result import (
    SensitivityResult,
    SensitivityRow,
    most_sensitive_first,
)
from lightning_qat.analysis.sensitivity.sensitivity_sketch import Sketch, forwards_of_sketch
from lightning_qat.quantization import ranks
from lightning_qat.quantization.errors import ConfigurationError, unknown_choice
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.region.region import Region

Method = Literal["auto", "sketch", "isolation"]

TOP_SHARE = 0.1
"""Share of the points that are reported as the most sensitive, if ``top_k`` does not say how many."""

CANDIDATES = 3
"""A sketch confirms this many times ``top_k`` points. Twice as many were enough for convolutional networks; int4
estimates of attention logits are a third too low (the exponential is not linear there) and need more room."""


def sensitivity(
    region: Region,
    batches: Iterable[object],
    output: str | Callable[[Any], Any] | None = None,
    post_process: Callable[[Any], Any] | None = None,
    metric: MetricLike = "MSE",
    *,
    method: Method = "auto",
    probes: int = 4,
    top_k: int | None = None,
    confirm: int | None = None,
    max_points: int | None = None,
    turn: int = 0,
    seed: int = 0,
    previous: SensitivityResult | None = None,
    across_ranks: bool = False,
    max_samples: int | None = None,
    memory: RegionMemory | None = None,
) -> SensitivityResult:
    """Rank the points by what quantizing each of them alone, in the float model, does to the chosen output.

    ``sketch``: all points are estimated from one float forward and ``probes`` backward passes per batch (see
    :mod:`~lightning_qat.analysis.sensitivity.sensitivity_sketch`), whatever their number; then the most sensitive are
    measured. ``isolation``: every point is measured, one forward per point and batch. All forwards run in evaluation
    mode with the same inputs, buffers and random numbers. The metric sees several batches, and several tensors of the
    output, as one long vector. Elements that are infinite in the float output are left out. Nothing of the region or
    its target is changed.

    The estimate is the first-order change. ``detach``, ``.data`` and ``no_grad`` inside the model do not stop it.
    Points that act on the output without a gradient (only through indices, rounding, opaque code) are measured by
    isolation. Where a point acts both ways, the estimate leaves out what goes through indices and rounding (``held``
    names the ops), while isolation shows everything: with near ties in a ``topk``, the two differ. The backward of a
    custom ``autograd.Function`` is taken for the derivative (``custom_backward`` names the classes). Where quantizing a
    point changes the *shape* of the output (boxes that a score selects), missing elements count as zero (``reshaped``
    names the points): better choose an output before the selection.

    Args:
        region: a calibrated region.
        batches: see :meth:`~lightning_qat.quantization.modules.call.Call.of`. A sketch keeps them until it has
            confirmed.
        output: path into the output such as ``map.layer_3``, or a callable on it; None: all its tensors.
        post_process: applied to the chosen output in float, such as ``torch.sigmoid``.
        metric: ``L1``, ``MSE``, ``Cosine``, ``SQNR`` or ``KL`` (see :mod:`lightning_qat.analysis.metrics`), a function
            ``(float_output, output) -> float`` or a torchmetrics Metric; see
            :class:`~lightning_qat.analysis.sensitivity.sensitivity_metric.SensitivityMetric`.
        method: ``sketch``, ``isolation``, or ``auto``: isolation where it is as quick (few points) and where there is
            no gradient, else a sketch.
        probes: backward passes per batch of a sketch.
        top_k: how many of the most sensitive points matter; a tenth of all points if not given.
        confirm: how many candidates, the highest estimated scores, a sketch measures by isolation with ``metric``;
            three times ``top_k`` if not given, but at most ``max_points``; 0 for none.
        max_points: by isolation, measure at most this many points, after a sketch of those without an estimate; see
            :func:`~lightning_qat.analysis.sensitivity.isolation.choose_points`.
        turn: number of this turn; ``ceil(points / max_points)`` turns in a row measure all points.
        seed: of the probes, of the order in which points take turns, and of the random numbers that the forward draws.
        previous: an earlier table to compare the ranks with.
        across_ranks: every rank calls this with its own batches; the result is that of all batches, on all ranks.
        max_samples: make the estimates from this many samples of each batch (the first ones), if samples are
            independent of each other; None for all. Fewer samples give a larger standard error. Measurements always use
            all samples.
        memory: give the same object to several analyses of the same region and output: facts that follow from the code
            are then searched only once.

    Raises:
        ConfigurationError: nothing is calibrated, there is no batch or it is empty, the output does not exist, it holds
            NaN, or a sketch was asked for where it is impossible.

    Example:
        >>> import torch
        >>> from lightning_qat.quantization.region.insertion import insert
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> region = insert(model, (torch.randn(8, 4),), qconfig={"weight": {"dtype": "int2"}})
        >>> with region.state("observe"):
        ...     _ = model(torch.randn(8, 4))
        >>> _ = region.compute_scales()
        >>> result = sensitivity(region, [torch.randn(8, 4)], metric="SQNR")
        >>> result.columns()[:5], {row.role for row in result.rows[:2]}
        (('op_name', 'sensitive_type', 'op_type', 'SQNR', 'quant_dtype'), {'weight'})
    """
    if method not in get_args(Method):
        raise unknown_choice("method", method, get_args(Method))
    for name, value, least, default in (
        ("max_points", max_points, 1, ", or None for all"),
        ("probes", probes, 1, ""),
        ("top_k", top_k, 1, ", or None for a tenth of the points"),
        ("max_samples", max_samples, 2, ", or None for all"),
    ):
        if value is not None and value < least:
            raise ConfigurationError(f"{name} must be at least {least}{default}, not {value}.")
    if confirm is not None and confirm < 0:
        raise ConfigurationError(f"confirm must be a number of points, 0 for none, not {confirm}.")
    memory = memory or RegionMemory()
    select = OutputSelector(output, post_process)
    analysis = _Analysis(region, select, SensitivityMetric(metric), seed, across_ranks, memory)
    if confirm is None:
        confirm = CANDIDATES * (top_k or max(1, math.ceil(TOP_SHARE * len(analysis.calibrated))))
        confirm = min(confirm, max_points or confirm)
    few = len(analysis.calibrated) <= forwards_of_sketch(probes) + confirm
    if method == "isolation" or (method == "auto" and few):
        return analysis.isolation(batches, max_points, turn).compared_with(previous)
    calls = [Call.of(batch) for batch in batches]
    sketch, problem = analysis.sketch(calls, probes, max_samples)
    if sketch is None:
        if method == "sketch":
            raise ConfigurationError(f"a sketch is impossible: {problem}. Use method='isolation'.")
        result = analysis.isolation(calls, max_points, turn, reason=f"isolation because {problem}")
        return result.compared_with(previous)
    path = output if isinstance(output, str) else None
    influence = memory.find(region.plan, ("influence", path), lambda: influence_on(region.graph, path))
    return analysis.confirmed(sketch, influence, calls, confirm, max_points, turn).compared_with(previous)


class _Analysis:
    """One call of :func:`sensitivity`: the settings that both methods share, and the two methods."""

    def __init__(
        self,
        region: Region,
        select: OutputSelector,
        metric: SensitivityMetric,
        seed: int,
        across_ranks: bool,
        memory: RegionMemory,
    ) -> None:
        self.region = region
        self.select = select
        self.metric = metric
        self.seed = seed
        self.across_ranks = across_ranks
        self.memory = memory
        self.owners = [point.name for point in region.plan.points if point.same_as is None]
        self._points = region.points
        self.calibrated = [name for name in self.owners if self._points[name].scale_source is not None]
        if not self.calibrated:
            raise ConfigurationError("no point has a scale: calibrate the region before measuring its sensitivity.")
        self._flops = memory.find(region.plan, "flops", lambda: flops_shares(region))

    def isolation(
        self, batches: Iterable[object], max_points: int | None, turn: int, reason: str = ""
    ) -> SensitivityResult:
        """Measure the points of this turn."""
        chosen = choose_points(self.calibrated, max_points, self.seed, turn)
        measured = self._measure(batches, chosen)
        rows = [self._exact(name, measured) for name in chosen if name in measured.reached]
        return self._result(
            rows,
            measured.batches,
            reason=reason,
            left_out=tuple(name for name in self.calibrated if name not in set(chosen)),
            not_reached=tuple(name for name in chosen if name not in measured.reached),
            reshaped=tuple(name for name in chosen if name in measured.reshaped),
        )

    def sketch(self, calls: list[Call], probes: int, max_samples: int | None) -> tuple[Sketch | None, str]:
        """Estimate all points; return None and the reason if that is impossible."""
        sketch = Sketch(self.region, self.calibrated, self.select, probes, self.seed, max_samples, self.memory)
        if problem := sketch.add(calls, self.across_ranks):
            return None, problem
        if sketch.batches == 0:
            raise ConfigurationError(_NO_BATCH)
        reached = [e for e in sketch.estimates.values() if e.reached]
        if sketch.elements and reached and not any(e.squared for e in reached):
            return None, f"no gradient reaches a point from {self.select.description}"
        return sketch, ""

    def confirmed(
        self, sketch: Sketch, influence: Influence, calls: list[Call], confirm: int, max_points: int | None, turn: int
    ) -> SensitivityResult:
        """Make the table of a sketch: measure the candidates and the points without an estimate."""
        scores = {name: math.sqrt(sketch.mse(name)[0]) for name in self.calibrated if sketch.estimates[name].reached}
        op_of = {point.name: point.op for point in self.region.plan.points}
        without = [
            name
            for name in scores
            if sketch.estimates[name].failed and (sketch.left_torch or influence.reaches(op_of[name]))
        ]
        now = choose_points(without, max_points, self.seed, turn)
        estimated = [name for name in scores if name not in set(without)]
        candidates = sorted(estimated, key=lambda name: -scores[name])[:confirm]
        chosen = {*candidates, *now}
        rows, reshaped = [], set()
        if chosen or sketch.elements == 0:
            measured = self._measure(calls, [name for name in self.calibrated if name in chosen])
            rows = [self._exact(name, measured) for name in self.calibrated if name in measured.reached & chosen]
            reshaped = measured.reshaped
        rows += [self._row(n, None, scores[n], False, sketch.standard_error(n)) for n in estimated if n not in chosen]
        return self._result(
            rows,
            sketch.batches,
            method="sketch",
            probes=sketch.probes,
            left_out=tuple(name for name in without if name not in chosen),
            not_reached=tuple(name for name in self.calibrated if name not in scores),
            without_gradient=tuple(without),
            held=influence.picking,
            custom_backward=sketch.custom_backward,
            reshaped=tuple(name for name in self.calibrated if name in reshaped),
        )

    def _measure(self, batches: Iterable[object], names: list[str]) -> Isolation:
        isolation = Isolation(self.region, names, self.select, self.metric, self.seed)
        with ranks.failing_together(self.across_ranks), analysis_mode(self.region, buffers=False):
            for batch in batches:
                isolation.run(Call.of(batch))
        if self.across_ranks:
            isolation.all_reduce()
        if isolation.batches == 0:
            raise ConfigurationError(_NO_BATCH)
        if names and not any(float(isolation.sums[name][0]) != 0 for name in names):
            raise ConfigurationError(
                f"{self.select.description} has no finite element in any batch: give batches that are not empty."
            )
        return isolation

    def _exact(self, name: str, measured: Isolation) -> SensitivityRow:
        score = math.sqrt(float(metric_of_sums("MSE", measured.sums[name])))
        return self._row(name, measured.value(name), score, True, 0.0)

    def _row(
        self, name: str, value: float | None, score: float, exact: bool, standard_error: float | None
    ) -> SensitivityRow:
        point = self.region.plan.by_name[name]
        return SensitivityRow(
            op_name=point.op,
            role=point.scale_role,
            op_type=self.region.graph.by_name[point.op].kind,
            value=value,
            quant_dtype=self._points[name].dtype,
            point=name,
            score=score,
            exact=exact,
            standard_error=standard_error,
            flops_share=self._flops[point.op],
        )

    def _result(self, rows: list[SensitivityRow], batches: int, **fields: Any) -> SensitivityResult:
        calibrated = set(self.calibrated)
        return SensitivityResult(
            rows=most_sensitive_first(rows, self.metric.name, self.metric.higher_is_better),
            metric=self.metric.name,
            ascending=self.metric.higher_is_better,
            output=self.select.description,
            batches=batches,
            points=len(self.calibrated),
            uncalibrated=tuple(name for name in self.owners if name not in calibrated),
            **fields,
        )


_NO_BATCH = "there was no batch to measure the sensitivity on."
