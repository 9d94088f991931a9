"""Whether a larger value of a metric is better: for logged metrics, our own error metrics and functions."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

# fmt: off
_COSTS = frozenset({
    "loss", "losses", "cost", "error", "err", "mse", "mae", "rmse", "mape", "smape", "epe", "ade", "fde", "perplexity",
    "ppl", "nll", "bce", "ce", "crossentropy", "entropy", "kl", "wer", "cer", "mer", "ter", "eer", "fid", "lpips",
    "fpr", "fnr", "ece", "brier", "hamming", "distance",
})
_OBJECTIVES = frozenset({
    "loss", "losses", "cost", "perplexity", "ppl", "nll", "bce", "ce", "crossentropy", "entropy", "kl", "ece", "brier",
})
"""Costs that grow with the confidence of wrong answers."""
_ERROR_RATES = frozenset({
    "error", "err", "rate", "wer", "cer", "mer", "ter", "eer", "fpr", "fnr", "hamming",
})
# fmt: on


def higher_is_better(metric: str | Callable[..., Any]) -> bool:
    """Whether a larger value of a metric is a better one; if not, the metric is a cost.

    A name is judged by its words: it is a score unless one of them names a cost. A function or a torchmetrics
    ``Metric`` says it by its attribute ``higher_is_better``; without one it is a cost.

    Args:
        metric: name of a logged metric, such as ``val_acc``, or of an error metric, such as ``SQNR``; or a function.

    Example:
        >>> [higher_is_better(name) for name in ("val_loss", "test/RMSE", "valLoss", "error_rate", "lossless_acc")]
        [False, False, False, False, True]
        >>> [higher_is_better(name) for name in ("L1", "MSE", "Cosine", "SQNR", "KL")]
        [False, False, True, True, False]
        >>> higher_is_better(lambda base, analysed: 0.0)
        False
    """
    if not isinstance(metric, str):
        return getattr(metric, "higher_is_better", None) is True
    return metric != "L1" and not _words(metric) & _COSTS


def is_objective(metric: str) -> bool:
    """Whether a logged cost is what training minimizes, or depends on how sure the answers are.

    Such a cost may rise while all answers stay right. An error in the unit of its task may not.

    Example:
        >>> [is_objective(name) for name in ("val_loss", "val/ece", "val_mae", "depth_rmse", "val_acc")]
        [True, True, False, False, False]
    """
    return bool(_words(metric) & _OBJECTIVES)


def is_error_rate(metric: str, value: float) -> bool:
    """Whether a logged cost is the share of wrong answers, so that one minus it is a score.

    Example:
        >>> is_error_rate("val_error", 0.02), is_error_rate("val_angle_error", 3.6), is_error_rate("val_mae", 0.02)
        (True, False, False)
    """
    return 0 <= value <= 1 and bool(_words(metric) & _ERROR_RATES)


def _words(metric: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", metric)}
