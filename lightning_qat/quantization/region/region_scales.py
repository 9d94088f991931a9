"""The scales of a region: how they are found, whether they are learned, and that all ranks have the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

from torch import nn

from lightning_qat.quantization.errors import unknown_choice
from lightning_qat.quantization.fake_quant.scale_synchronization import average_over_ranks
from lightning_qat.quantization.planning.plan import QuantPlan
from lightning_qat.quantization.region.region_mode import OpQuantizers
from lightning_qat.quantization.region.region_state import SwitchedRegion, Updates


class RegionScales(SwitchedRegion):
    """The part of a region that has to do with its scales."""

    plan: QuantPlan
    target: nn.Module
    _quantizers: dict[str, OpQuantizers]

    def learn_scales(self, roles: Iterable[Updates] = ("weight", "activation")) -> None:
        """Make the scales of these points parameters, trained with the gradient of LSQ, and all others buffers.

        Do it before the optimizer is built, before or after calibration. Scales that the user has fixed stay so. Weight
        decay would shrink a scale to nothing: see :func:`lightning_qat.parameter_groups`. A checkpoint brings its own.

        Args:
            roles: ``weight``, ``activation`` or both; nothing to end learning.

        Raises:
            ConfigurationError: there is no such role.

        Example:
            >>> import torch
            >>> from lightning_qat.quantization.region.insertion import insert
            >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
            >>> region = insert(model, (torch.randn(16, 4),))
            >>> region.learn_scales({"weight"})
            >>> {name: tuple(scale.shape) for name, scale in region.learned_scales.items()}
            {'0.weight': (8,), '2.weight': (2,)}
        """
        chosen = frozenset(roles)
        for role in chosen:
            if role not in get_args(Updates):
                raise unknown_choice("role", role, get_args(Updates))
        points = self.points
        for point in self.plan.points:
            points[point.name].learn_scale(("weight" if point.is_weight else "activation") in chosen)

    @property
    def learned_scales(self) -> dict[str, nn.Parameter]:
        """The scales that are parameters, by point; one that points share is listed once."""
        points = self.points
        found = {p.name: points[p.name] for p in self.plan.points if p.same_as is None}
        return {name: f.scale for name, f in found.items() if isinstance(f.scale, nn.Parameter)}

    def refresh_weight_scales(self) -> None:
        """Take the scales of the present weights, as the next evaluation would: the optimizer has stepped meanwhile.

        Training does not depend on it, as every training forward takes them anew. Weights that are computed from
        parameters (spectral norm, pruning) wait for the next evaluation.
        """
        parameters = set(map(id, self.target.parameters()))
        for quantizers in self._quantizers.values():
            for point in quantizers.inputs.values():
                point.refresh(parameters)

    def expect_other_weights(self) -> None:
        """Take the scales of weights anew when asked for next: something else than training replaces the weights."""
        points = self.points
        for point in self.plan.points:
            points[point.name].outdated = point.is_weight

    def keep_weight_scales(self) -> None:
        """Let the scales of weights stay from now on as those of the present weights, whatever these become."""
        self.refresh_weight_scales()
        for fake_quant in self.points.values():
            fake_quant.outdated = False

    def reset_statistics(self) -> None:
        """Forget what was observed, before a new calibration; the scales stay."""
        for fake_quant in self.points.values():
            if not fake_quant.keeps_scale:
                fake_quant.reset_statistics()

    def compute_scales(self, observer: str | None = None, dtype: str | None = None) -> tuple[str, ...]:
        """Derive all scales from the statistics that calibration kept, but for frozen ones.

        Args:
            observer: another method than planned, for every point without a fixed scale.
            dtype: another dtype than planned.

        Returns:
            Names of the points that never saw a finite value; they have no scale and stay float.
        """
        without_data = []
        for name, fake_quant in self.points.items():
            if fake_quant.keeps_scale:
                continue
            if fake_quant.fixed_scale is not None:
                fake_quant.compute_scale(None, dtype)
            elif fake_quant.statistics.count:
                fake_quant.compute_scale(observer, dtype)
            else:
                without_data.append(name)
        return tuple(without_data)

    def synchronize_scales(self) -> None:
        """Give all ranks the same activation scales, for scales that follow each rank's own batches."""
        points = self.points
        average_over_ranks([points[p.name] for p in self.plan.points if not p.is_weight])

    @property
    def is_calibrated(self) -> bool:
        """Whether scales were computed or restored: at least one that is not merely fixed by the configuration."""
        sources = {f.scale_source for f in self.points.values()}
        return bool(sources - {None, "fixed"}) or None not in sources
