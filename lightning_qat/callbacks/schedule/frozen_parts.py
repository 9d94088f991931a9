"""The ``freeze`` option: parts of the quantized model that stay as they are, from the start or from some epoch on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy

from lightning_qat.callbacks.trainer import _compat
from lightning_qat.callbacks.trainer.misconfiguration import misconfiguration
from lightning_qat.quantization.region.region import Region, find_regions
from lightning_qat.quantization.region.regions import freeze


class FrozenParts:
    """Freezes and unfreezes regions as a run goes on.

    Args:
        parts: patterns, or a dictionary from pattern to the first epoch that is frozen; None freezes nothing.

    Raises:
        MisconfigurationException: an epoch is negative.
    """

    def __init__(self, parts: Sequence[str] | Mapping[str, int] | str | None) -> None:
        self._given = parts is not None
        parts = [parts] if isinstance(parts, str) else parts or ()
        self.first_epochs = dict(parts) if isinstance(parts, Mapping) else dict.fromkeys(parts, 0)
        for pattern, epoch in self.first_epochs.items():
            if not isinstance(epoch, int):
                raise MisconfigurationException(
                    f"freeze={{{pattern!r}: {epoch!r}}}: write the epoch to freeze from: {{{pattern!r}: 3}}."
                )
            if epoch < 0:
                raise MisconfigurationException(f"freeze={{{pattern!r}: {epoch}}}: epochs count from 0.")
        self._regions: tuple[Region, ...] = ()
        self._applied: list[str] = []
        self._started = False

    def check(self, trainer: pl.Trainer) -> None:
        """Look at the strategy.

        Raises:
            MisconfigurationException: it needs a gradient for each parameter that had one at the start.
        """
        later = [pattern for pattern, epoch in self.first_epochs.items() if epoch > 0]
        strategy = trainer.strategy
        if not later or trainer.world_size == 1 or not isinstance(strategy, DDPStrategy):
            return
        if not _compat.finds_unused_parameters(strategy):
            raise MisconfigurationException(
                f"freeze: {later[0]!r} from epoch {self.first_epochs[later[0]]} on: DistributedDataParallel waits for "
                'the gradients of its parameters. Use Trainer(strategy="ddp_find_unused_parameters_true"), or freeze '
                "from the start."
            )

    def apply(self, pl_module: pl.LightningModule, epoch: int) -> None:
        """Freeze the parts of this epoch, and put back train/eval modes that have been changed since.

        Raises:
            MisconfigurationException: a pattern matches nothing.
        """
        regions = find_regions(pl_module)
        if not (self._given and regions):
            return
        wanted = [pattern for pattern, first in self.first_epochs.items() if epoch >= first]
        if tuple(regions.values()) == self._regions and wanted == self._applied:
            self.hold()
            return
        for region in regions.values():
            region.unfreeze()
        with misconfiguration():
            if wanted != list(self.first_epochs):
                freeze(regions, self.first_epochs)  # a pattern that matches nothing is said now, not epochs later
                for region in regions.values():
                    region.unfreeze()
            freeze(regions, wanted)
        self._regions, self._applied = tuple(regions.values()), wanted
        if self._started:
            self._require_something_to_train(pl_module)
            return
        for region in regions.values():
            region.freezing.release_modes(region.target)

    def start(self, pl_module: pl.LightningModule) -> None:
        """Begin training: from now on frozen modules are in eval mode between forwards too.

        Raises:
            MisconfigurationException: there is nothing left to train.
        """
        self._started = True
        self.hold()
        self._require_something_to_train(pl_module)

    def _require_something_to_train(self, pl_module: pl.LightningModule) -> None:
        if self._applied and not any(p.requires_grad for p in pl_module.parameters()):
            raise MisconfigurationException(
                f"freeze: {', '.join(self._applied)} leaves no parameter to train in epoch {pl_module.current_epoch}: "
                "freeze less, or end the training before."
            )

    def hold(self) -> None:
        """Put frozen modules back into eval mode."""
        for region in self._regions if self._started else ():
            region.freezing.hold()

    def undo(self) -> None:
        """Unfreeze all that was frozen here."""
        for region in self._regions:
            region.unfreeze()
        self._regions, self._applied, self._started = (), [], False

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_regions": (), "_applied": [], "_started": False}
