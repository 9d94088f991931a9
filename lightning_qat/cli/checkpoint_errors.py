"""Say in one sentence that a checkpoint is the reason why a command failed."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.reading.files import Document, OtherObjectsError
from lightning_qat.quantization.reading.schema import read_as

_RESTORING = "checkpoint_connector.py"
"""The file in which Lightning restores a checkpoint."""


def blamed_on_checkpoint(error: BaseException, path: Any) -> BaseException:
    """Return the error to show in place of one that was raised while a project ran with a checkpoint.

    Args:
        error: what was raised.
        path: the checkpoint, if there is one; URLs and words such as ``best`` are left to Lightning.

    Returns:
        A ConfigurationError if the file is damaged, or if Lightning could not restore it; else the same error.
    """
    expected = (ConfigurationError, MisconfigurationException)
    if not isinstance(error, Exception) or isinstance(error, expected) or not isinstance(path, (str, Path)):
        return error
    if not Path(path).is_file():
        return error
    if not any(Path(frame.filename).name == _RESTORING for frame in traceback.extract_tb(error.__traceback__)):
        return error  # it came later, and has another reason
    document = Document(path, "a checkpoint that can be restored", "give another one as --ckpt_path")
    try:
        checkpoint = document.tensors()
        with document.checked():
            read_as(_Envelope, checkpoint, ignore_unknown=True)
    except OtherObjectsError as found:
        remedy = "if you trust the file, let the script call trainer.fit(..., weights_only=False)"
        problem = f"it holds an object of {found.class_name}, and only tensors and plain data are read"
        return _caused(replace(document, remedy=remedy).error(problem), error)
    except ConfigurationError as found:
        return _caused(found, error)
    what = " ".join(str(error).split())[:200]
    return _caused(document.error(f"it does not fit this project ({type(error).__name__}: {what})"), error)


def _caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@dataclass(frozen=True)
class _Envelope:
    """What every checkpoint of Lightning holds."""

    state_dict: Mapping[str, object]
