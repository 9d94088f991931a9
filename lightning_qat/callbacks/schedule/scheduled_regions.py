"""Put the regions of a run into the state that the schedule asks for."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lightning_qat.callbacks.schedule.frozen_parts import FrozenParts
from lightning_qat.callbacks.schedule.learned_scales import freeze_learned
from lightning_qat.callbacks.schedule.schedule import Schedule
from lightning_qat.callbacks.trainer import _compat
from lightning_qat.quantization.modules.batch_norms import is_batch_norm
from lightning_qat.quantization.planning.plan import ScaleRole
from lightning_qat.quantization.region.region import Region, find_regions
from lightning_qat.quantization.region.switches import State


class ScheduledRegions:
    """Switches regions, batch norm and frozen parts as a run goes on.

    Args:
        schedule: what changes in which epoch.
        frozen_parts: what stays at its quantized state, and from which epoch on.
        compile: how to compile the regions, see :meth:`Region.set_compile`; None leaves them as they are.

    Attributes:
        regions: the regions of the module at the last call of :meth:`apply`.
    """

    def __init__(
        self, schedule: Schedule, frozen_parts: FrozenParts, compile: bool | dict[str, Any] | None = None
    ) -> None:
        self.schedule = schedule
        self.frozen_parts = frozen_parts
        self.compile = compile
        self.regions: tuple[Region, ...] = ()
        self._batch_norms: tuple[nn.Module, ...] = ()

    def apply(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, state: State, updates: Collection[ScaleRole]
    ) -> None:
        """Apply the state again: Lightning flips modes around validation, and other callbacks may switch regions.

        Args:
            trainer: the running trainer.
            pl_module: its module.
            state: of all regions.
            updates: the scales that follow the data.
        """
        self.regions = tuple(find_regions(pl_module).values())
        self._batch_norms = tuple(m for r in self.regions for m in r.target.modules() if is_batch_norm(m))
        for region in self.regions:
            region.set_state(state, updates)
            region.switches.first_scales = not self.schedule.freezes_scales(trainer.current_epoch)
            if "weight" not in updates:
                region.scales.keep_weights()
            if self.compile is not None:
                region.set_compile(self.compile)
        for copy in _compat.averaged_copies(trainer):
            expect_other_weights(copy, updates)
        if self.schedule.freeze_observers_after is not None:
            freeze_learned(self.regions, self.schedule.freezes_scales(trainer.current_epoch))
        self._freeze_batch_norm(trainer.current_epoch)
        self.frozen_parts.apply(pl_module, trainer.current_epoch)

    def are_in(self, state: State, updates: frozenset[ScaleRole]) -> bool:
        """Whether all regions are in a state, with these scales following the data."""
        return all(r.current_state == state and r.updates == updates for r in self.regions)

    def hold(self, epoch: int) -> None:
        """Put frozen modules back into eval mode: a module's own ``on_validation_model_train`` may have changed it."""
        self._freeze_batch_norm(epoch)
        self.frozen_parts.hold()

    def release(self) -> None:
        """Forget the regions, and unfreeze what was frozen."""
        self.regions, self._batch_norms = (), ()
        self.frozen_parts.undo()

    def _freeze_batch_norm(self, epoch: int) -> None:
        for module in self._batch_norms if self.schedule.freezes_batch_norm(epoch) else ():
            if module.training:
                module.eval()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "regions": (), "_batch_norms": ()}


def expect_other_weights(module: nn.Module, updates: Collection[ScaleRole]) -> None:
    """Prepare for weights that training did not make (an average): scales that follow the weights are computed anew."""
    for region in find_regions(module).values():
        if "weight" in updates:
            region.scales.expect_other_weights()
        else:
            region.scales.keep_weights()
