"""Callbacks that copy weights or the whole module in their ``setup``, before the float weights and fake-quant are in.

``setup`` runs in the order of the list, and ours stands behind the user's callbacks where a command line appends it. So
they copy again once there is something to copy.
"""

from __future__ import annotations

import warnings

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelPruning
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_qat.callbacks.insertion.float_checkpoint import FloatCheckpointError
from lightning_qat.callbacks.insertion.initial_weights import InitialWeights
from lightning_qat.callbacks.trainer import _compat
from lightning_qat.callbacks.trainer.listed_callbacks import listed
from lightning_qat.quantization.region.region import find_regions


def load_weights_for_copies(
    initial_weights: InitialWeights, trainer: pl.Trainer, pl_module: pl.LightningModule, ours: Callback
) -> None:
    """Load the float weights already in ``setup``, if another callback may copy them in its own.

    ModelPruning keeps the weights to which it resets what it has not pruned; if it is listed earlier, it takes them
    anew. Layers that are built later have no weights yet, and a file that does not fit is named at insertion.

    Args:
        initial_weights: what to load. It is loaded once more at insertion, as the module's own ``setup`` is still to
            come.
        trainer: the running trainer.
        pl_module: its module.
        ours: the callback whose ``setup`` runs.
    """
    if initial_weights.path is None or initial_weights.were_loaded_into(pl_module) or find_regions(pl_module):
        return
    callbacks = listed(trainer, Callback)
    if not any(_may_copy_weights(callback) for callback in callbacks):
        return
    try:
        initial_weights.load_early(pl_module)
    except (FileNotFoundError, FloatCheckpointError):
        return
    for callback in callbacks[: callbacks.index(ours)]:
        if isinstance(callback, ModelPruning):
            callback.setup(trainer, pl_module, "fit")


def renew_model_copies(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Let callbacks that average weights copy the module again, if they did so before fake-quant was inserted."""
    if trainer.state.fn != "fit" or not find_regions(pl_module):
        return
    for callback in _compat.callbacks_with_model_copies(trainer):
        copy = _compat.model_copy(callback)
        if copy is not None and not find_regions(copy):
            _compat.drop_model_copy(callback)  # there need not be room for two
            with warnings.catch_warnings():  # that we replace configure_model shards nothing
                warnings.filterwarnings("ignore", message=".*overrides the configure_model")
                callback.setup(trainer, pl_module, "fit")


def _may_copy_weights(callback: Callback) -> bool:
    """Whether ``setup`` may look at weights: that of ModelPruning, and of classes that are not Lightning's or ours."""
    package = type(callback).__module__.partition(".")[0]
    own = package in ("lightning", "pytorch_lightning", "lightning_qat")
    return isinstance(callback, ModelPruning) or (not own and is_overridden("setup", callback, parent=Callback))
