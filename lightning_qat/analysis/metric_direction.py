"""Which way is up for a metric."""

from __future__ import annotations

import re

# fmt: off
_COSTS = frozenset({
    "loss", "losses", "cost", "error", "err", "mse", "mae", "rmse", "mape", "smape", "epe", "ade", "fde", "perplexity",
    "ppl", "nll", "bce", "ce", "crossentropy", "entropy", "kl", "wer", "cer", "mer", "ter", "eer", "fid", "lpips",
    "fpr", "fnr", "ece", "brier", "hamming", "distance",
})
# fmt: on


def is_worse_when_larger(metric: str) -> bool:
    """Whether a metric is a cost, judged by the words of its name; everything else counts as a score.

    Example:
        >>> [is_worse_when_larger(name) for name in ("val_loss", "test/RMSE", "valLoss", "error_rate", "lossless_acc")]
        [True, True, True, True, False]
    """
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", metric)
    return any(word.lower() in _COSTS for word in words)
