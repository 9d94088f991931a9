"""Shorten the errors of LightningCLI about a mistake in a configuration.

jsonargparse tries every type that an option may have, and reports each attempt with all values that were given. That
can be dozens of lines, and only one of them says what is wrong.
"""

from __future__ import annotations

import argparse
import re

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_qat.quantization.errors import ConfigurationError

_NOISE = re.compile(
    r"\s*(Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|Given value.*|"
    r"- Not a valid subclass of \w+|Subclass types expect one of:|- a (class path \(str\)|dict with(out)? .*)|"
    r"- Expected a <class 'NoneType'>)"
)


def readable(error: Exception) -> ConfigurationError | None:
    """Return a short error in place of one that LightningCLI raised; None if it is not about the configuration.

    Args:
        error: raised while LightningCLI reads its arguments or makes the objects they describe.
    """
    if isinstance(error, argparse.ArgumentError):
        return ConfigurationError(shortened(str(error)))
    cause: BaseException | None = error
    while cause is not None:  # raised by a class that cannot be made as configured
        if isinstance(cause, (ConfigurationError, MisconfigurationException)):
            return ConfigurationError(str(cause))
        cause = cause.__cause__
    return None


def shortened(message: str) -> str:
    """Drop the lines that are the same for every mistake, and reduce the indentation of the others.

    Args:
        message: of jsonargparse.

    Example:
        >>> print(shortened('''Parser key "trainer.callbacks":
        ...   Does not validate against any of the Union subtypes
        ...   Errors:
        ...     - Problem with given class_path 'lightning_qat.Calibration':
        ...         Option 'batchs' is not accepted
        ...     - Expected a <class 'NoneType'>
        ...   Given value type: <class 'list'>'''))
        Parser key "trainer.callbacks":
          Problem with given class_path 'lightning_qat.Calibration':
            Option 'batchs' is not accepted
    """
    kept: list[str] = []
    depths: list[int] = []
    for line in message.splitlines():
        if not line.strip() or _NOISE.fullmatch(line):
            continue
        text = line.strip().removeprefix("- ")
        depth = len(line) - len(text)
        depths = [d for d in depths if d < depth]
        kept.append("  " * len(depths) + text)
        depths.append(depth)
    return "\n".join(kept) or message
