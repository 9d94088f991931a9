"""Errors of the configuration, as Lightning raises them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_qat.quantization.errors import ConfigurationError


@contextmanager
def misconfiguration() -> Iterator[None]:
    """Turn the quantization layer's configuration errors into Lightning's."""
    try:
        yield
    except ConfigurationError as error:
        raise MisconfigurationException(str(error)) from error
