"""Numbers that users write as a count, a share or a percentage."""

from __future__ import annotations

from lightning_qat.quantization.errors import ConfigurationError


def count_of(value: float | str, whole: int | None, name: str) -> float:
    """Return the number behind a count, a share or a percentage.

    Args:
        value: a number, or a text such as ``"0.5%"``.
        whole: what a percentage is a percentage of; None returns the share itself.
        name: of the argument, for messages.

    Raises:
        ConfigurationError: it is not a positive number or percentage.

    Example:
        >>> count_of("0.5%", None, "share"), count_of(3, 200, "top"), count_of("10%", 200, "top")
        (0.005, 3.0, 20.0)
    """
    text = str(value).strip()
    is_percentage = text.endswith("%")
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf") or isinstance(value, bool):
        raise ConfigurationError(f"{name} must be a positive number or a percentage such as '0.5%', not {value!r}.")
    return number / 100 * (whole or 1) if is_percentage else number


def share_of(value: float | str, name: str) -> float:
    """Return the number behind a share of a whole, at most 1.

    Args:
        value: a number, or a text such as ``"0.5%"``.
        name: of the argument, for messages.

    Raises:
        ConfigurationError: it is not positive, or more than the whole: a count, or a percentage without its sign.

    Example:
        >>> share_of("0.5%", "share"), share_of(1, "share")
        (0.005, 1.0)
    """
    share = count_of(value, None, name)
    if share > 1:
        raise ConfigurationError(
            f"{name} is a share of the whole, at most 1 or '100%', not {value!r}: write '5%' or 0.05 for five percent."
        )
    return share
