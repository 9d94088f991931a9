"""Whether a logged number measures quality, and whether a larger value of a metric is better."""

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
_EFFORT = frozenset({
    "lr", "learning", "grad", "gradient", "momentum", "seconds", "second", "secs", "sec", "s", "ms", "us", "minutes",
    "min", "hours", "time", "times", "timestamp", "duration", "elapsed", "runtime", "latency", "speed", "throughput",
    "fps", "it", "its", "iter", "iters", "iteration", "iterations", "samples", "images", "tokens", "batches", "size",
    "memory", "mem", "ram", "vram", "gpu", "cpu", "cuda", "mb", "gb", "mib", "gib", "bytes", "util", "utilization",
    "epoch", "epochs", "step", "steps",
})
"""Words for what a run takes, or how far it is."""
_BESIDE_EFFORT = frozenset({
    "val", "valid", "validation", "test", "train", "training", "eval", "evaluation", "predict", "dataloader", "idx",
    "avg", "average", "mean", "median", "max", "peak", "total", "sum", "num", "number", "count", "n", "of", "per", "in",
    "norm", "rate", "global", "current", "batch", "sample", "image", "token", "data", "load", "loading", "inference",
    "forward", "allocated", "reserved", "used", "usage", "seen",
})
"""Words that change nothing of that."""
# fmt: on


def is_quality(metric: str) -> bool:
    """Whether a logged number measures how good the answers are, rather than what a run takes or how far it is.

    Seconds, rates, memory, learning rates, epochs and numbers of samples are no matter of quantization: they differ
    between two runs of one model. A name is judged by its words: all of them have to be of that kind.

    Example:
        >>> [is_quality(name) for name in ("val_acc", "val_loss_epoch", "time_mae", "count_error")]
        [True, True, True, True]
        >>> [is_quality(name) for name in ("epoch_seconds", "lr-AdamW", "samples_per_sec", "val/gpu_mem", "step")]
        [False, False, False, False, False]
    """
    words = _words(metric)
    of_a_run = bool(words & _EFFORT) and words <= _EFFORT | _BESIDE_EFFORT
    return not of_a_run and re.match(r"lr(?![a-zA-Z])", metric) is None


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
