"""The scales of a region: deriving them from statistics, learning them, following weights, sharing them over ranks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, get_args

from torch import nn

from lightning_qat.quantization.errors import unknown_choice
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.fake_quant.first_scale import agree_over_ranks
from lightning_qat.quantization.fake_quant.scale_synchronization import average_over_ranks
from lightning_qat.quantization.planning.plan import QuantPlan, ScaleRole
from lightning_qat.quantization.region.bound_points import BoundPoint, OpQuantizers, refresh

PACKED_CHARACTERS = 384
"""For the counts of one point in a checkpoint. With its scale and its place in plan and graph, it takes below 2 kB."""


class RegionScales:
    """Operations on the scales of a region. Each new plan gets a new object.

    Args:
        target: the module whose forward is quantized.
        plan: the plan of the region.
        points: the fake-quants by point.
        bound: the fake-quants by the run-time identity of their ops.
    """

    def __init__(
        self,
        target: nn.Module,
        plan: QuantPlan,
        points: Mapping[str, FakeQuantize],
        bound: Mapping[str, OpQuantizers],
    ) -> None:
        self._target = target
        self._plan = plan
        self._points = points
        self._bound = bound

    def reset_statistics(self) -> None:
        """Reset all statistics except those of frozen points, before a new calibration. The scales stay."""
        for fake_quant in self._points.values():
            if not fake_quant.keeps_scale:
                fake_quant.reset_statistics()

    def compute(self, observer: str | None = None, dtype: str | None = None) -> tuple[str, ...]:
        """Derive all scales from the statistics that calibration kept, see :meth:`Region.compute_scales`."""
        self.observe_weights_again()
        without_data = []
        for name, fake_quant in self._points.items():
            if fake_quant.keeps_scale:
                continue
            if fake_quant.fixed_scale is not None:
                fake_quant.compute_scale(None, dtype)
            elif fake_quant.statistics.count:
                fake_quant.compute_scale(observer, dtype)
            else:
                without_data.append(name)
        return tuple(without_data)

    @property
    def are_calibrated(self) -> bool:
        """Whether scales were computed or restored: at least one that is not merely fixed by the configuration."""
        sources = {f.scale_source for f in self._points.values()}
        return bool(sources - {None, "fixed"}) or None not in sources

    def learn(self, roles: Iterable[ScaleRole]) -> None:
        """Make the scales of these roles parameters and all others buffers, see :meth:`Region.learn_scales`.

        Raises:
            ConfigurationError: there is no such role.
        """
        chosen = frozenset(roles)
        for role in chosen:
            if role not in get_args(ScaleRole):
                raise unknown_choice("role", role, get_args(ScaleRole))
        for point in self._plan.points:
            self._points[point.name].learn_scale(point.scale_role in chosen)

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """The scales that are parameters, by point; one that points share is listed once."""
        found = {p.name: self._points[p.name] for p in self._plan.points if p.same_as is None}
        return {name: f.scale for name, f in found.items() if isinstance(f.scale, nn.Parameter)}

    def refresh_weights(self) -> None:
        """Compute the scales of the present weights, as the next evaluation would: the optimizer may have stepped.

        Training does not depend on it, as every training forward computes them. The scales of weights that are computed
        from parameters (spectral norm, pruning) change at the next evaluation.
        """
        refresh((p for quantizers in self._bound.values() for p in quantizers.inputs.values()), self._target)

    def packed_statistics(self) -> dict[str, dict[str, Any]]:
        """Return the state of every point for a checkpoint, in few bytes; of weights, only what they do not tell."""
        names = dict(self._target.named_parameters(remove_duplicate=False))
        told = {id(p.fake_quant) for p in self._bound_weights() if p.parameter in names}
        found = {p.name: self._points[p.name] for p in self._plan.points if p.same_as is None}
        return {
            name: f.get_packed_state(None if id(f) in told and not f.starts_at_zero else PACKED_CHARACTERS)
            for name, f in found.items()
        }

    def observe_weights_again(self) -> None:
        """Take the statistics of weights that a checkpoint left out; those of the present weights are the same kind."""
        forgetting = [point for point in self._bound_weights() if point.fake_quant.forgotten]
        parameters = dict(self._target.named_parameters(remove_duplicate=False)) if forgetting else {}
        for point in forgetting:
            point.observe_again(parameters)

    def _bound_weights(self) -> Iterator[BoundPoint]:
        return (p for quantizers in self._bound.values() for p in quantizers.inputs.values() if p.is_weight)

    def expect_other_weights(self) -> None:
        """Mark the scales of weights as outdated, because something other than training replaces the weights."""
        for point in self._plan.points:
            self._points[point.name].outdated = point.is_weight

    def keep_weights(self) -> None:
        """Compute the scales of the present weights, and keep them in evaluation even if the weights change."""
        self.refresh_weights()
        for fake_quant in self._points.values():
            fake_quant.outdated = False

    def agree_on_first(self, updates: Collection[str]) -> None:
        """Give all ranks the same scales of points that began at zero, as long as those scales come from training.

        Args:
            updates: the scales that follow the data anyway.
        """
        own = [p for p in self._plan.points if p.same_as is None]
        agree_over_ranks([(self._points[p.name], p.scale_role in updates) for p in own])

    def synchronize(self) -> None:
        """Give all ranks the same activation scales, for scales that follow each rank's own batches."""
        average_over_ranks([self._points[p.name] for p in self._plan.points if not p.is_weight])
