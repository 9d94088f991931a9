"""The metric of a sensitivity table: one of ours by name, a function, or a torchmetrics Metric."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor
from torchmetrics import Metric

from lightning_qat.analysis.metric_direction import higher_is_better
from lightning_qat.analysis.metrics import MetricName, check_metric, metric_of_sums
from lightning_qat.quantization.errors import ConfigurationError

MetricLike: TypeAlias = MetricName | Metric | Callable[[Any, Any], Any]


class SensitivityMetric:
    """How the change of an output is measured.

    Args:
        metric: ``L1``, ``MSE``, ``Cosine``, ``SQNR`` or ``KL``; a function ``(float_output, output) -> float``, whose
            values are averaged over batches; or a torchmetrics ``Metric``, which is updated with
            ``(output, float_output)``. An output of several tensors is given as a list. For a function or a Metric,
            larger means more sensitive unless its attribute ``higher_is_better`` is true.

    Raises:
        ConfigurationError: neither a name of a metric nor callable.

    Example:
        >>> def largest(base, analy):
        ...     return (base - analy).abs().max()
        >>> SensitivityMetric(largest).name, SensitivityMetric("SQNR").higher_is_better
        ('largest', True)
    """

    def __init__(self, metric: MetricLike) -> None:
        if isinstance(metric, str):
            check_metric(metric)
            self.name: str = metric
        elif callable(metric):
            self.name = getattr(metric, "__name__", type(metric).__name__)
        else:
            raise ConfigurationError(f"metric must be a name such as 'MSE', a function or a Metric, not {metric!r}.")
        self.higher_is_better = higher_is_better(metric)
        self._metric = metric

    def accumulator(self) -> MetricAccumulator:
        """Return an accumulator for the metric of one point."""
        if isinstance(self._metric, str):
            return MetricAccumulator(name=self._metric)
        if isinstance(self._metric, Metric):
            own = copy.deepcopy(self._metric)
            own.reset()
            return MetricAccumulator(metric=own)
        return MetricAccumulator(function=self._metric)


class MetricAccumulator:
    """Collects the metric of one point over batches.

    Attributes:
        sums: for a function: the sum of its values, and their number.
    """

    def __init__(
        self,
        name: MetricName | None = None,
        metric: Metric | None = None,
        function: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        self._name = name
        self._metric = metric
        self._function = function
        self.sums = (0.0, 0.0)

    def update(self, reference: list[Tensor], analysed: list[Tensor]) -> None:
        """Add a batch."""
        if self._name is not None:
            return
        base, analy = (v[0] if len(v) == 1 else v for v in (reference, analysed))
        if self._metric is not None:
            self._metric.to(reference[0].device).update(analy, base)
        elif self._function is not None:
            self.sums = (self.sums[0] + float(self._function(base, analy)), self.sums[1] + 1)

    def compute(self, error_sums: Tensor) -> float:
        """Return the metric; ``error_sums`` are those of :func:`~lightning_qat.analysis.metrics.error_sums`."""
        if self._name is not None:
            return float(metric_of_sums(self._name, error_sums))
        if self._metric is not None:
            return float(self._metric.compute())
        return self.sums[0] / self.sums[1] if self.sums[1] else math.nan
