"""Reading checkpoints: float weights into a module, quantized models without a Trainer."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_qat.callbacks.trainer.misconfiguration import misconfiguration
from lightning_qat.quantization.modules.module_walk import REGION_NAME, is_in_region
from lightning_qat.quantization.planning.plan_compatibility import read_extra_state
from lightning_qat.quantization.region.insertion import attach

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


class FloatCheckpointError(MisconfigurationException):
    """A file that cannot give a module its weights."""


def load_float_weights(pl_module: pl.LightningModule, path: str | os.PathLike[str]) -> None:
    """Load the weights of a float checkpoint, strictly. Loops and optimizer are not touched, nor is the file.

    Args:
        pl_module: the float module.
        path: a Lightning checkpoint, or a file that holds a ``state_dict``.

    Raises:
        FileNotFoundError: there is no such file.
        FloatCheckpointError: the file is a quantized checkpoint, holds no weights, or does not fit the module.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"init_from: there is no file {os.fspath(path)!r}; write the path of a float checkpoint."
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FloatCheckpointError(
            f"init_from: {os.fspath(path)!r} cannot be read as weights only ({type(error).__name__}). If you trust the "
            'file, write its weights to another one: torch.save(torch.load(path, weights_only=False)["state_dict"], '
            '"float_weights.pt").'
        ) from error
    state_dict = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state_dict, dict):
        raise FloatCheckpointError(
            f"init_from: {os.fspath(path)!r} holds no weights by name: write the path of a Lightning checkpoint, or "
            'of a file made by torch.save(module.state_dict(), "float_weights.pt").'
        )
    if stored_regions(state_dict):
        raise FloatCheckpointError(
            f"init_from: {os.fspath(path)!r} is a quantized checkpoint. To resume it, pass it as ckpt_path to the "
            "Trainer; init_from takes a float checkpoint."
        )
    try:
        pl_module.load_state_dict(state_dict, strict=True)
    except RuntimeError as error:
        weights = 'torch.load(path)["state_dict"]' if state_dict is not checkpoint else "torch.load(path)"
        raise FloatCheckpointError(
            f"init_from: {os.fspath(path)!r} does not fit {type(pl_module).__name__}: "
            f"{_misfit(state_dict, pl_module.state_dict(), weights) or error}"
        ) from error


def _misfit(given: dict[str, Any], own: dict[str, Any], weights: str) -> str:
    """Say how the weights of a file (``weights`` as code) differ from those of a module, and what to do."""
    missing, unexpected = [key for key in own if key not in given], [key for key in given if key not in own]
    shapes = {
        key: (list(given[key].shape), list(value.shape))
        for key, value in own.items()
        if isinstance(value, Tensor) and isinstance(given.get(key), Tensor) and given[key].shape != value.shape
    }
    differences = [
        _counted(missing, "weight is missing in the file", "weights are missing in the file"),
        _counted(unexpected, "is unknown to the module", "are unknown to the module"),
        _counted(
            [f"{key}: {there} in the file, {here} in the module" for key, (there, here) in shapes.items()],
            "has another shape",
            "have other shapes",
        ),
    ]
    found = "; ".join(filter(None, differences))
    if not found:
        return ""
    renamed = _renaming(given, own)
    if renamed:
        return (
            f"{found}. Only the names differ: write the weights to another file, torch.save({{{renamed}: weight for "
            f'name, weight in {weights}.items()}}, "float_weights.pt"), and give its path.'
        )
    return (
        f"{found}. Is it the checkpoint of another model, or were other hyperparameters given? Create the module as it "
        "was created in the float training, and write the path of the checkpoint that this training made."
    )


def _renaming(given: dict[str, Any], own: dict[str, Any]) -> str:
    """The code that makes the module's name of the file's ``name``, if one has a prefix that the other has not."""
    for name in list(given)[:1]:
        for key in own:
            inner, outer = key.removesuffix(f".{name}"), name.removesuffix(f".{key}")
            if inner != key and {f"{inner}.{name}" for name in given} == set(own):
                return f"{inner + '.'!r} + name"
            if outer != name and {name.removeprefix(f"{outer}.") for name in given} == set(own):
                return f"name.removeprefix({outer + '.'!r})"
    return ""


def _counted(names: list[str], one: str, several: str, limit: int = 3) -> str:
    """Return how many there are, and the first names."""
    if not names:
        return ""
    shown = ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
    return f"{len(names)} {one if len(names) == 1 else several} ({shown})"


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
        target = stored_target(module, path)
        prefix = f"{path}.{REGION_NAME}." if path else f"{REGION_NAME}."
        with misconfiguration():
            region = attach(target, *read_extra_state(state), traced=False)
            region.load_state_dict({k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)})
        if not region.is_calibrated:
            raise MisconfigurationException(
                f"{os.fspath(checkpoint_path)!r} was saved before calibration: its fake-quants have no scales. Use a "
                "later checkpoint."
            )
        region.set_state("quantize")
    return module.eval()
