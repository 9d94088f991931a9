"""Reading checkpoints: float weights into a module, quantized models without a Trainer."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_qat.callbacks.extra_pass import misconfiguration
from lightning_qat.quantization.insertion import attach
from lightning_qat.quantization.region import REGION_NAME, find_regions, read_extra_state

ModuleT = TypeVar("ModuleT", bound=pl.LightningModule)
_EXTRA_STATE = "_extra_state"


def stored_regions(state_dict: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the extra state of every region in a state_dict, by target path (``""`` for the module itself)."""
    ending = f"{REGION_NAME}.{_EXTRA_STATE}"
    return {
        key[: -len(ending)].removesuffix("."): value
        for key, value in state_dict.items()
        if key == ending or key.endswith("." + ending)
    }


def load_float_weights(pl_module: pl.LightningModule, path: str | os.PathLike[str]) -> None:
    """Load the weights of a float checkpoint, strictly. Loops and optimizer are not touched, nor is the file.

    Args:
        pl_module: the float module.
        path: a Lightning checkpoint, or a file that holds a ``state_dict``.

    Raises:
        MisconfigurationException: the file is missing, is a quantized checkpoint, or does not fit the module.
    """
    if not Path(path).is_file():
        raise MisconfigurationException(f"init_from: there is no file {os.fspath(path)!r}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise MisconfigurationException(
            f"init_from: {os.fspath(path)!r} cannot be read as weights only ({type(error).__name__}: {error}). Save the "
            "float model with trainer.save_checkpoint(path, weights_only=True), or as torch.save(model.state_dict())."
        ) from error
    state_dict: dict[str, Tensor] = checkpoint.get("state_dict", checkpoint)
    if stored_regions(state_dict):
        raise MisconfigurationException(
            f"init_from: {os.fspath(path)!r} is a quantized checkpoint. To resume it, pass it as ckpt_path to the Trainer; "
            "init_from takes a float checkpoint."
        )
    try:
        pl_module.load_state_dict(state_dict, strict=True)
    except RuntimeError as error:
        raise MisconfigurationException(
            f"init_from: {os.fspath(path)!r} does not fit {type(pl_module).__name__}: {error}"
        ) from error


def load_quantized(cls: type[ModuleT], checkpoint_path: str | os.PathLike[str], **kwargs: Any) -> ModuleT:
    """Load a module with its fake-quants from a checkpoint, without a Trainer. It is in eval mode and quantizes.

    Args:
        cls: the LightningModule class.
        checkpoint_path: a checkpoint written during or after QAT.
        kwargs: passed to ``cls.load_from_checkpoint`` (constructor arguments that are not in the checkpoint).

    Raises:
        MisconfigurationException: the checkpoint holds no fake-quants, or they do not fit the code.

    Example::

        model = lightning_qat.load_quantized(MyModule, "last.ckpt")
        logits = model(images)
    """
    checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
    state_dict = checkpoint["state_dict"]
    stored = stored_regions(state_dict)
    if not stored:
        raise MisconfigurationException(
            f"{os.fspath(checkpoint_path)!r} holds no fake-quants: it is a float checkpoint. Use "
            f"{cls.__name__}.load_from_checkpoint for it."
        )
    floats = {key: value for key, value in state_dict.items() if f".{REGION_NAME}." not in f".{key}"}
    buffer = io.BytesIO()
    torch.save({**checkpoint, "state_dict": floats}, buffer)
    buffer.seek(0)
    module = cls.load_from_checkpoint(buffer, map_location="cpu", **kwargs)
    with misconfiguration():
        for path, state in stored.items():
            target = module.get_submodule(path) if path else module
            graph, plan = read_extra_state(state)
            attach(target, graph, plan, traced=False)
        module.load_state_dict(state_dict, strict=True)
    for region in find_regions(module).values():
        region.set_state("quantize")
    return module.eval()
