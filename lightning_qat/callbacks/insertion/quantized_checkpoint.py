"""Reading quantized checkpoints: what they hold, and a quantized model without a Trainer."""

from __future__ import annotations

import io
import os
import pickle
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_qat.callbacks.trainer.misconfiguration import misconfiguration
from lightning_qat.quantization.modules.module_walk import REGION_NAME, is_in_region
from lightning_qat.quantization.planning.plan_compatibility import read_extra_state
from lightning_qat.quantization.region.insertion import attach
from lightning_qat.quantization.region.region import Region

ModuleT = TypeVar("ModuleT", bound=pl.LightningModule)
_EXTRA_STATE = "_extra_state"


def load_quantized(
    cls: type[ModuleT], checkpoint_path: str | os.PathLike[str], *, weights_only: bool = True, **kwargs: Any
) -> ModuleT:
    """Load a module with its fake-quants from a checkpoint, without a Trainer. It is in eval mode and quantizes.

    Args:
        cls: the LightningModule class.
        checkpoint_path: a checkpoint written during or after QAT.
        weights_only: read tensors and primitives only. False also reads hyperparameters of other classes: only for
            files that you trust.
        kwargs: given to ``cls.load_from_checkpoint`` (constructor arguments that are not in the checkpoint).

    Raises:
        MisconfigurationException: ``cls`` is not a class, there is no such file, or the checkpoint holds
            no fake-quants, or they do not fit the code.

    Example::

        model = lightning_qat.load_quantized(MyModule, "last.ckpt")
        logits = model(images)
    """
    if not isinstance(cls, type):
        raise MisconfigurationException(
            f"load_quantized got {str(cls)[:40]!r}: give it the class itself: load_quantized(MyModule, path)."
        )
    try:
        checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=weights_only)
    except FileNotFoundError as error:
        raise MisconfigurationException(
            f"there is no file {os.fspath(checkpoint_path)!r}; write the path of a checkpoint of QAT."
        ) from error
    except pickle.UnpicklingError as error:
        raise MisconfigurationException(
            f"{os.fspath(checkpoint_path)!r} holds more than tensors and primitives. If you trust the file, write "
            f"load_quantized({cls.__name__}, path, weights_only=False)."
        ) from error
    state_dict = checkpoint["state_dict"]
    stored = stored_regions(state_dict)
    if not stored:
        raise MisconfigurationException(
            f"{os.fspath(checkpoint_path)!r} holds no fake-quants: it is a float checkpoint. Use "
            f"{cls.__name__}.load_from_checkpoint for it."
        )
    floats = {key: value for key, value in state_dict.items() if not is_in_region(key)}
    buffer = io.BytesIO()
    torch.save({**checkpoint, "state_dict": floats}, buffer)
    buffer.seek(0)
    module = cls.load_from_checkpoint(buffer, map_location="cpu", weights_only=weights_only, **kwargs)
    for path, state in stored.items():
        region = _attached(module, path, state, state_dict)
        if not region.is_calibrated:
            raise MisconfigurationException(
                f"{os.fspath(checkpoint_path)!r} was saved before calibration: its fake-quants have no scales. Use a "
                "later checkpoint."
            )
        region.set_state("quantize")
    return module.eval()


def _attached(module: pl.LightningModule, path: str, state: dict[str, Any], state_dict: dict[str, Any]) -> Region:
    """Attach a stored region to its target, and load its scales."""
    prefix = f"{path}.{REGION_NAME}." if path else f"{REGION_NAME}."
    with misconfiguration():
        region = attach(stored_target(module, path), *read_extra_state(state), traced=False)
        region.load_state_dict({k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)})
    return region


def stored_regions(state_dict: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the extra state of every region in a state_dict, by target path (``""`` for the module itself)."""
    ending = f"{REGION_NAME}.{_EXTRA_STATE}"
    return {
        key[: -len(ending)].removesuffix("."): value
        for key, value in state_dict.items()
        if key == ending or key.endswith("." + ending)
    }


def stored_target(pl_module: pl.LightningModule, path: str) -> nn.Module:
    """Return the target of a stored region.

    Raises:
        MisconfigurationException: the module has no such submodule.
    """
    try:
        return pl_module.get_submodule(path)
    except AttributeError as error:
        raise MisconfigurationException(
            f"the checkpoint has fake-quants on {path!r}, which {type(pl_module).__name__} does not have: restore the "
            "code the checkpoint was made with."
        ) from error
