"""Reading quantized checkpoints: what they hold, and a quantized model without a Trainer."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_qat.callbacks.trainer.misconfiguration import misconfiguration
from lightning_qat.quantization.errors import ConfigurationError, DamagedFileError
from lightning_qat.quantization.modules.module_walk import REGION_NAME, is_in_region
from lightning_qat.quantization.reading.files import Document, OtherObjectsError
from lightning_qat.quantization.reading.plain_values import UnreadableValueError
from lightning_qat.quantization.reading.schema import read_as
from lightning_qat.quantization.region.insertion import attach
from lightning_qat.quantization.region.region import Region
from lightning_qat.quantization.region.stored_state import read_region

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
    if not os.path.exists(checkpoint_path):
        raise MisconfigurationException(
            f"there is no file {os.fspath(checkpoint_path)!r}; write the path of a checkpoint of QAT."
        )
    document = Document(checkpoint_path, "a checkpoint of QAT that can be loaded", "use another checkpoint of that run")
    checkpoint = _read(document, cls, weights_only)
    state_dict = checkpoint["state_dict"]
    stored = stored_regions(state_dict)
    if not stored:
        raise MisconfigurationException(
            f"{os.fspath(checkpoint_path)!r} holds no fake-quants: it is a float checkpoint. Use "
            f"{cls.__name__}.load_from_checkpoint for it."
        )
    module = _float_module(document, cls, checkpoint, weights_only, kwargs)
    for path in stored:
        region = _attached(document, module, path, state_dict)
        if not region.is_calibrated:
            raise MisconfigurationException(
                f"{os.fspath(checkpoint_path)!r} was saved before calibration: its fake-quants have no scales. Use a "
                "later checkpoint."
            )
        region.set_state("quantize")
    return module.eval()


def _read(document: Document, cls: type, weights_only: bool) -> dict[str, Any]:
    """The content of a checkpoint, as far as it can be checked without its code."""
    try:
        checkpoint = document.tensors(weights_only)
    except OtherObjectsError as error:
        raise MisconfigurationException(
            f"{os.fspath(document.path)!r} holds an object of {error.class_name}, so more than tensors and primitives. "
            f"If you trust the file, write load_quantized({cls.__name__}, path, weights_only=False)."
        ) from error
    except DamagedFileError as error:
        raise MisconfigurationException(str(error)) from error
    with misconfiguration(), document.checked():
        state_dict = read_as(_Envelope, checkpoint, ignore_unknown=True).state_dict
        missing = [k for k in state_dict if is_in_region(k) and not k.endswith(_EXTRA_STATE)]
        if missing and not stored_regions(state_dict):
            raise UnreadableValueError(
                "is missing, which holds the plan", f"state_dict[...{REGION_NAME}.{_EXTRA_STATE}]"
            )
    return dict(checkpoint)


@dataclass(frozen=True)
class _Envelope:
    """What a checkpoint of Lightning holds beside things that are not needed here."""

    state_dict: Mapping[str, object]
    hyper_parameters: dict[str, object] | None = None


def _float_module(
    document: Document, cls: type[ModuleT], checkpoint: dict[str, Any], weights_only: bool, kwargs: dict[str, Any]
) -> ModuleT:
    """The module without its fake-quants. What goes wrong in here may be the fault of the file or of the code."""
    floats = {key: value for key, value in checkpoint["state_dict"].items() if not is_in_region(key)}
    buffer = io.BytesIO()
    torch.save({**checkpoint, "state_dict": floats}, buffer)
    buffer.seek(0)
    try:
        return cls.load_from_checkpoint(buffer, map_location="cpu", weights_only=weights_only, **kwargs)
    except MisconfigurationException:
        raise
    except Exception as error:
        what = " ".join(str(error).split())[:200]
        problem = f"{cls.__name__} cannot be made from it ({type(error).__name__}: {what})"
        remedy = f"give arguments that are missing, load_quantized({cls.__name__}, path, name=value), or another file"
        raise MisconfigurationException(str(replace(document, remedy=remedy).error(problem))) from error


def _attached(document: Document, module: pl.LightningModule, path: str, state_dict: dict[str, Any]) -> Region:
    """Attach a stored region to its target, and load its scales."""
    prefix, target = region_prefix(path), stored_target(module, path)
    try:
        graph, plan = read_region(state_dict, prefix)
        region = attach(target, graph, plan, traced=False)
        region.reader.take(state_dict[prefix + _EXTRA_STATE], graph, plan)
        region.load_state_dict({k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)})
    except ConfigurationError as error:
        raise MisconfigurationException(f"{os.fspath(document.path)}: {error}") from error
    except RuntimeError as error:  # of load_state_dict: keys that no point has
        what = " ".join(str(error).split())[:200]
        raise MisconfigurationException(str(document.error(f"its scales do not fit its plan ({what})"))) from error
    return region


def region_prefix(path: str) -> str:
    """Return what the keys of a region begin with in a state_dict, by target path."""
    return f"{path}.{REGION_NAME}." if path else f"{REGION_NAME}."


def stored_regions(state_dict: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
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
