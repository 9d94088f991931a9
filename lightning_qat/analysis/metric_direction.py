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
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", metric)
    return metric != "L1" and not any(word.lower() in _COSTS for word in words)
