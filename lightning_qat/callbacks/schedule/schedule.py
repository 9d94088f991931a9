"""The epochs in which quantization, scales and batch norm change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_qat.quantization.errors import unknown_choice
from lightning_qat.quantization.planning.plan import ScaleRole

ActivationScales = Literal["fixed", "ema", "learned"]
WeightScales = Literal["updated", "fixed", "learned"]


@dataclass(frozen=True)
class Schedule:
    """When a run quantizes, and how scales and batch norm move meanwhile.

    Args:
        activation_scales: ``fixed``, ``ema`` (they follow a moving average) or ``learned``.
        weight_scales: ``updated`` (those of the present weights), ``fixed`` or ``learned``.
        start_epoch: the first epoch that quantizes.
        freeze_observers_after: the first epoch in which no scale moves; None if there is none.
        freeze_batch_norm_after: the first epoch in which batch norm keeps its statistics; None if there is none.

    Raises:
        MisconfigurationException: a value is not one of the choices, or an epoch is negative.

    Example:
        >>> schedule = Schedule(activation_scales="ema", weight_scales="learned", freeze_observers_after=3)
        >>> schedule.moving_scales(epoch=2), schedule.moving_scales(epoch=3), schedule.learned_scales
        (('activation',), (), ('weight',))
    """

    activation_scales: ActivationScales = "fixed"
    weight_scales: WeightScales = "updated"
    start_epoch: int = 0
    freeze_observers_after: int | None = None
    freeze_batch_norm_after: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (("activation_scales", ActivationScales), ("weight_scales", WeightScales)):
            if getattr(self, name) not in get_args(choices):
                raise MisconfigurationException(str(unknown_choice(name, getattr(self, name), get_args(choices))))
        for name in ("start_epoch", "freeze_observers_after", "freeze_batch_norm_after"):
            epoch = getattr(self, name)
            if epoch is not None and epoch < 0:
                raise MisconfigurationException(f"{name}={epoch}: epochs count from 0.")

    def quantizes(self, epoch: int) -> bool:
        """Whether fake-quant is on in an epoch of training."""
        return epoch >= self.start_epoch

    def moving_scales(self, epoch: int) -> tuple[ScaleRole, ...]:
        """Which scales follow the data in an epoch of training."""
        moving: dict[ScaleRole, bool] = {
            "weight": self.weight_scales == "updated",
            "activation": self.activation_scales == "ema",
        }
        return () if self.freezes_scales(epoch) else tuple(role for role, moves in moving.items() if moves)

    @property
    def learned_scales(self) -> tuple[ScaleRole, ...]:
        """The scales that training finds by gradient."""
        learned: dict[ScaleRole, str] = {"weight": self.weight_scales, "activation": self.activation_scales}
        return tuple(role for role, how in learned.items() if how == "learned")

    def freezes_scales(self, epoch: int) -> bool:
        """Whether all scales stand still in an epoch."""
        return self.freeze_observers_after is not None and epoch >= self.freeze_observers_after

    def freezes_batch_norm(self, epoch: int) -> bool:
        """Whether batch norm keeps its statistics in an epoch."""
        return self.freeze_batch_norm_after is not None and epoch >= self.freeze_batch_norm_after
