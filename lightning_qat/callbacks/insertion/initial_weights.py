"""The ``init_from`` option: a float checkpoint that a module starts from."""

from __future__ import annotations

import weakref

import lightning.pytorch as pl

from lightning_qat.callbacks.insertion.float_checkpoint import load_float_weights


class InitialWeights:
    """Loads a float checkpoint into a module once. A second fit continues with the module's present weights.

    Args:
        path: the checkpoint; None leaves the module as it was created.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path
        self._loaded_into: weakref.ref[pl.LightningModule] | None = None

    def load(self, pl_module: pl.LightningModule) -> None:
        """Load the weights, unless this module has them already.

        Raises:
            FileNotFoundError: there is no such file.
            FloatCheckpointError: the file cannot give this module its weights.
        """
        if self.path is not None and not self.were_loaded_into(pl_module):
            load_float_weights(pl_module, self.path)
            self._loaded_into = weakref.ref(pl_module)

    def load_early(self, pl_module: pl.LightningModule) -> None:
        """Load the weights for those who look at them before :meth:`load`, which will load them again."""
        if self.path is not None:
            load_float_weights(pl_module, self.path)

    def were_loaded_into(self, pl_module: pl.LightningModule) -> bool:
        """Whether the weights were loaded into this module."""
        return self._loaded_into is not None and self._loaded_into() is pl_module

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_loaded_into": None}
