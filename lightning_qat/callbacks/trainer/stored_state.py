"""Reading what a checkpoint holds of a callback."""

from __future__ import annotations

from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_qat.quantization.reading.plain_values import UnreadableValueError
from lightning_qat.quantization.reading.schema import read_as

T = TypeVar("T")


def read_state(kind: type[T], state: Any, callback: pl.Callback) -> T:
    """Read the state of a callback as a dataclass. Keys that the dataclass does not have are left out.

    Args:
        kind: the dataclass.
        state: what the checkpoint holds.
        callback: whose state it is.

    Raises:
        MisconfigurationException: a value is damaged or missing.
    """
    try:
        return read_as(kind, state, ignore_unknown=True)
    except UnreadableValueError as error:
        name = type(callback).__name__
        raise MisconfigurationException(
            f"the state of {name} in the checkpoint is damaged: {str(error).rstrip('.')}; use another checkpoint of "
            f"that run, or leave {name} out of the callbacks."
        ) from error
