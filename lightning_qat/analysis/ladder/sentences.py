"""What a broken rung of the pipeline check means, in words, and what to do next: two texts of one sentence or more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lightning_qat.analysis.ladder.measurements import Finetune
from lightning_qat.analysis.ladder.rows import PipelineRow, format_falls, judged
from lightning_qat.quantization.counts import number_of

Said = tuple[str, str]
"""What is found, and what to do next; the second is empty where the first says all."""
Sentence = Callable[[Sequence[PipelineRow], Finetune], Said]
FINGERPRINT_COMMAND = "python -m lightning_qat fingerprint train.py --config float.yaml --ckpt_path float.ckpt"
MAKE_REFERENCE = (
    f"Make a reference in the float project: {FINGERPRINT_COMMAND}; then write "
    "PipelineCheck(reference='pipeline_fingerprint.json')"
)
NOT_QUANTIZATION = "Quantization is not the cause; do not tune learning rate or weight decay before this is fixed."
LOWER_LEARNING_RATE = "lower the learning rate (QAT wants about 1/10 to 1/20 of the float one, no warm-up)"
NO_METRIC: Said = (
    "the evaluation logs no finite number to judge by.",
    "Log one in validation_step, self.log('val_acc', ...), and give it batches (limit_val_batches).",
)
TRAINING_LOSS: Said = (
    "the training loss of the untouched float model is {loss}.",
    "Look for bad values in the training data, the labels or the loss.",
)
QUANTIZED_LOSS: Said = (
    "the training loss is {loss} as soon as the model is quantized, and finite in float.",
    "See the findings of Calibration, and give the points with nan, inf or a zero scale dtype: float32 in overrides.",
)


def other_metrics(rows: Sequence[PipelineRow]) -> str:
    """Say that the float model is not as good here as it was in the float run (rung 0)."""
    return (
        f"the float model does not reproduce its own accuracy here ({format_falls(judged(rows))}), before any training "
        "and with fake-quant off"
    )


def side_effect(rung: Sequence[PipelineRow], finetune: Finetune) -> Said:
    """Say that the training step changes the evaluation though nothing may move (rung 2)."""
    buffers = f" It writes to {', '.join(list(finetune.moved_buffers)[:3])}." if finetune.moved_buffers else ""
    return (
        f"the evaluation changes ({format_falls(judged(rung))}) although weights and batch norm are fixed: the "
        f"training step has a side effect.{buffers}"
    ), "Look for what it stores in the module."


def batch_norm(rung: Sequence[PipelineRow], finetune: Finetune) -> Said:
    """Say that moving batch norm destroys the accuracy (rung 3)."""
    most = f"; moved most: {_format_moved(finetune.moved_buffers)}" if finetune.moved_buffers else ""
    return (
        "accuracy collapses at learning rate 0 as soon as batch norm updates its statistics "
        f"({format_falls(judged(rung))}{most}). The training data do not look like the "
        "evaluation data (normalization, channel order, preprocessing, augmentation), or the batches are too small."
    ), (
        "Compare the training pipeline with that of the float run, line by line. If only the batches are small: "
        "QuantizationAwareTraining(freeze_batch_norm_after=0)."
    )


def scales(rung: Sequence[PipelineRow], finetune: Finetune) -> Said:
    """Say that values that move in the quantized model destroy its accuracy (rung 4)."""
    moved = finetune.moved_scales
    what = f"scales moved most: {_format_moved(moved)}" if moved else "no scale moved, batch norm did"
    remedy = (
        "Keep the calibrated scales (activation_scales: fixed, freeze_observers_after: 0) and calibrate with more "
        "batches."
        if moved
        else "Set freeze_batch_norm_after: 0."
    )
    return (
        f"the calibrated model collapses at learning rate 0 ({format_falls(judged(rung))}; {what}) while the float "
        "model holds: values that move without training destroy it, not the learning rate."
    ), remedy


def moved_weights(finetune: Finetune) -> str:
    """Say who moves weights at learning rate 0."""
    names = finetune.changed_parameters
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    cause = (
        "the optimizer's own step moves them: it does not scale its update by the group's lr"
        if finetune.changed_by_optimizer
        else "something other than the optimizer writes to them (an average that is swapped in, a clamp, a hook)"
    )
    return f"weights change although the learning rate is 0 ({', '.join(names[:3])}{more}): {cause}."


def other_loss(value: float | None, expected: float | None) -> Said:
    """Say that the training loss is not that of the float run (rung 2)."""
    return (
        f"the untouched float model has a training loss of {value:.4g} here and had {expected:.4g} in the float run: "
        "the training data, labels, augmentation or loss are not those of the float run."
    ), "Compare the two training pipelines."


def format_training(finetune: Finetune) -> str:
    """Say how a copy was trained, with the learning rates."""
    if finetune.learning_rates is None:
        rates = ""
    else:
        low, high = finetune.learning_rates
        rates = f" (lr {low:.3g})" if low == high else f" (lr {low:.3g} to {high:.3g})"
    return f"{number_of(finetune.batches, 'batch')} of QAT's own training{rates}"


def nothing_moved(finetune: Finetune) -> Said:
    """Say that training changed no weight."""
    return (
        f"{format_training(finetune)} changed no weight at all: a warm-up that starts at 0, a step without loss, or "
        "nothing to optimize."
    ), "Write FloatFinetune(batches=...) with more batches than the warm-up has."


def ended(what: str) -> str:
    """Return a difference in words as a sentence that ends."""
    return what if what.endswith(("?", ".")) else f"{what}."


def worst_points(points: Sequence[str]) -> str:
    """Name the points that lose most, the worst first."""
    return f"Worst points: {'; '.join(points[:3])}." if points else ""


def _format_moved(moved: Mapping[str, float]) -> str:
    return ", ".join(f"{name} by {change:.0%}" for name, change in list(moved.items())[:3])
