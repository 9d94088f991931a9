"""Reading the weights of a float checkpoint into a module."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_qat.callbacks.insertion.quantized_checkpoint import stored_regions
from lightning_qat.quantization.errors import DamagedFileError
from lightning_qat.quantization.reading.files import Document, OtherObjectsError


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
        checkpoint = Document(path, "a float checkpoint", "write the path of one that is whole").tensors()
    except OtherObjectsError as error:
        raise FloatCheckpointError(
            f"init_from: {os.fspath(path)!r} cannot be read as weights only: it holds an object of {error.class_name}. "
            "If you trust the file, write its weights to another one: "
            'torch.save(torch.load(path, weights_only=False)["state_dict"], "float_weights.pt").'
        ) from error
    except DamagedFileError as error:
        raise FloatCheckpointError(f"init_from: {error}") from error
    state_dict = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not (isinstance(state_dict, dict) and all(isinstance(name, str) for name in state_dict)):
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
