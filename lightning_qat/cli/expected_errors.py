"""Errors that end a command in one line, because a person has to do something about them."""

from __future__ import annotations

import sys

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_qat.atomic_files import NotWrittenError
from lightning_qat.export.export_errors import ExportMismatchError
from lightning_qat.quantization.errors import ConfigurationError, TracingError
from lightning_qat.reporting.plain_text import printable

EXPECTED = (ConfigurationError, ExportMismatchError, MisconfigurationException, NotWrittenError, TracingError)


def fail(error: Exception) -> int:
    """Print an error as one line to stderr, and return the exit status for it."""
    sys.stderr.write(printable(f"error: {error}\n"))
    return 2
