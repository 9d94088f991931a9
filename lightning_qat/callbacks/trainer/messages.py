"""Warnings and infos of rank zero. What they quote (names, errors, values of a configuration) is shown literally."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero

from lightning_qat.reporting.plain_text import printable


def rank_zero_warn(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn on rank zero, at the line of the caller.

    Args:
        text: the warning.
        category: its class.
    """
    rank_zero.rank_zero_warn(printable(text), stacklevel=5, category=category)  # type: ignore[attr-defined]


def rank_zero_info(text: str) -> None:
    """Log on rank zero.

    Args:
        text: the message.
    """
    rank_zero.rank_zero_info(printable(text), stacklevel=5)  # type: ignore[attr-defined]
