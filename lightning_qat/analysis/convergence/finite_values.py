"""The check of the convergence monitor that looks for values that are not finite, and says which came first."""

from __future__ import annotations

import math

from lightning_qat.analysis.convergence.training_series import ConvergenceRow, TrainingSeries
from lightning_qat.analysis.ladder.rows import breaks, compare

_CLEAN = (
    "The data are at fault, neither quantization nor the learning rate: clean them, or leave such samples out in the "
    "dataset or its collate_fn. To skip the loss is not enough, as the forward has run: batch norm has averaged nan "
    "into its statistics."
)
_POINT = (
    "Look at that op's inputs: give it activation: {dtype: float32} or int16 in overrides; if it is finite in float at "
    "the same step, its scale is too small or zero, see Calibration's findings. If the float model is not finite "
    "either, lower the learning rate."
)
_LOSS = (
    "See what ZeroLRFinetune() says: if the loss is finite there, lower the learning rate; if it is not, look for bad "
    "values in the data and for points with a zero scale."
)
_STATISTICS = (
    "A forward has written them, so look for the batch that does it: bad values in the data, or activations that "
    "overflow. Until then every evaluation is nan, whatever quantization does."
)


def finite_values(series: TrainingSeries) -> ConvergenceRow:
    """Look at losses, buffers, metrics and inputs."""
    check = "finite loss"
    bad = next((i for i, loss in enumerate(series.losses) if not math.isfinite(loss)), None)
    first = _first(series)
    if bad is not None:
        before = series.losses[:bad]
        jump = f" after {before[-1]:.4g}" if before else ""
        step = bad * max(1, series.steps // len(series.losses))  # of a long run, several steps make one value
        where = f" The first result that is not finite: {series.first_bad}." if series.first_bad and not first else ""
        evidence = f"the training loss is {series.losses[bad]} at step {step}{jump}.{where}{first}"
        return ConvergenceRow(check, "flagged", float(step), evidence=evidence, next_step=_next_step(series))
    metrics = _bad_metrics(series)
    if metrics or (series.bad_buffers and not series.keeps_metric):
        said = [f"{', '.join(metrics[:3])} of the evaluation is not finite"] if metrics else []
        said += [f"the buffers {_names(series)} are not finite"] if series.bad_buffers else []
        evidence = f"{' and '.join(said)}, while the losses that training takes are finite.{first}"
        return ConvergenceRow(check, "flagged", evidence=evidence, next_step=_next_step(series))
    if first:
        return ConvergenceRow(check, "noted", evidence=first.strip(), next_step=_next_step(series))
    if not series.losses:
        return ConvergenceRow(check, "cannot tell", evidence="no step yet")
    return ConvergenceRow(check, "holds", evidence="every training loss is finite.")


def _first(series: TrainingSeries) -> str:
    """Say what came first: the input, or else the buffers."""
    if series.bad_input:
        follows = f"; then the buffers {_names(series)}" if series.bad_buffers else ""
        return f" First came the input that the loader delivers, {series.bad_input}{follows}."
    if series.bad_buffers:
        return f" The buffers {_names(series)} are not finite, seen first at {series.bad_since}."
    return ""


def _next_step(series: TrainingSeries) -> str:
    if series.bad_input:
        return _CLEAN
    if series.first_bad:
        return _POINT
    return _STATISTICS if series.bad_buffers else _LOSS


def _bad_metrics(series: TrainingSeries) -> list[str]:
    """The metrics that were finite after calibration and are not now, where the evaluation breaks by it."""
    before, now = series.calibrated, series.metrics
    if before is None or now is None or not breaks(compare(before.metrics, now, before)):
        return []
    finite = [name for name, value in before.metrics.items() if math.isfinite(value)]
    return [name for name in finite if name in now.metrics and not math.isfinite(now.metrics[name])]


def _names(series: TrainingSeries) -> str:
    names = series.bad_buffers
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
