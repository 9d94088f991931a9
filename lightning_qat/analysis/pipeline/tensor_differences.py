"""How the tensors of two pipelines differ, with a guess at the cause by its usual traces."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_qat.analysis.pipeline.pipeline_difference import PipelineDifference, Suspicion
from lightning_qat.analysis.pipeline.pipeline_rows import STANDARD_ERRORS
from lightning_qat.analysis.pipeline.tensor_summary import TensorSummary


def tensor_differences(
    part: str, before: dict[str, tuple[TensorSummary, ...]], now: dict[str, tuple[TensorSummary, ...]]
) -> Iterator[PipelineDifference]:
    """Compare summaries of the same name, stage by stage.

    Args:
        part: what they are of, such as ``data``.
        before: by stage, of the reference.
        now: the same here.
    """
    for stage in before.keys() & now.keys():
        known = {summary.name: summary for summary in before[stage]}
        for summary in now[stage]:
            if summary.name in known:
                yield from tensor_difference(f"{part} ({stage})", known[summary.name], summary)
            else:
                what = f"{part} {summary.name} exists only here"
                yield PipelineDifference("possible", f"{part} ({stage})", summary.name, "", str(summary.shape), what)


def tensor_difference(part: str, before: TensorSummary, now: TensorSummary) -> Iterator[PipelineDifference]:
    """Compare two summaries beyond what other samples of the same data would change.

    Args:
        part: what they are of, such as ``data (train)``.
        before: of the reference.
        now: here.
    """
    name = now.name

    def row(suspicion: Suspicion, reference: object, value: object, what: str) -> PipelineDifference:
        return PipelineDifference(suspicion, part, name, str(reference), str(value), f"{part}, {name}: {what}")

    if before.dtype != now.dtype:
        yield row("strong", before.dtype, now.dtype, f"type {before.dtype} -> {now.dtype}")
    if before.shape != now.shape:
        yield row("strong", before.shape, now.shape, f"shape {before.shape} -> {now.shape}: other preprocessing?")
    if before.labels is not None and now.labels is not None:
        yield from _labels(part, before, now)
        return
    if len(before.mean) != len(now.mean) or not now.mean:
        return
    moved = [i for i in range(len(now.mean)) if _moved(before, now, i)]
    if not moved:
        return
    first = moved[0]
    channel = f"channel {first}: " if len(now.mean) > 1 else ""
    more = f" (and {len(moved) - 1} more channels)" if len(moved) > 1 else ""
    numbers = (
        f"{channel}mean {before.mean[first]:.4g} -> {now.mean[first]:.4g}, "
        f"std {before.std[first]:.4g} -> {now.std[first]:.4g}"
    )
    suspicion, guess = _guess(before, now, moved)
    yield row(suspicion, f"mean {before.mean[first]:.4g}", f"mean {now.mean[first]:.4g}", f"{numbers}{more}: {guess}")


def _moved(before: TensorSummary, now: TensorSummary, channel: int) -> bool:
    """Whether mean or spread differ by more than other samples of the same data would make them."""
    noise = math.hypot(before.mean_error[channel], now.mean_error[channel])
    # means of augmented or shuffled batches vary; a tenth of the spread is nothing that ruins a network
    tolerance = max(STANDARD_ERRORS * noise, 0.1 * before.std[channel], 1e-6)
    if abs(now.mean[channel] - before.mean[channel]) > tolerance:
        return True
    low, high = sorted((before.std[channel], now.std[channel]))
    return high > 1e-6 and low < high / 1.5


def _guess(before: TensorSummary, now: TensorSummary, moved: list[int]) -> tuple[Suspicion, str]:
    """The usual mistakes by their traces."""
    channels = len(now.mean)
    order = list(range(channels))[::-1]
    if channels == 3 and all(
        abs(now.mean[i] - before.mean[j]) <= 0.1 * max(before.std[j], 1e-6) for i, j in enumerate(order)
    ):
        return "strong", "channels in reversed order (RGB and BGR)?"
    first = moved[0]
    ratio = now.std[first] / before.std[first] if before.std[first] > 0 else math.inf
    if now.std[first] <= 1e-6:
        return "strong", "constant here: the input is destroyed?"
    for factor in (255.0, 256.0):
        if abs(ratio / factor - 1) < 0.1 or abs(ratio * factor - 1) < 0.1:
            return "strong", f"scaled by {factor:g}: 0..1 in one and 0..255 in the other?"
    if _is_normalized(before) != _is_normalized(now):
        return "strong", f"normalization {'missing' if _is_normalized(before) else 'added'} here?"
    if ratio > 1.5 or ratio < 1 / 1.5 or abs(now.mean[first] - before.mean[first]) > before.std[first]:
        return "strong", "other normalization, or an augmentation that destroys the input?"
    return "possible", "other data or augmentation?"


def _is_normalized(summary: TensorSummary) -> bool:
    """About zero mean and unit variance in every channel."""
    return all(abs(m) < 0.5 and 0.5 < s < 2 for m, s in zip(summary.mean, summary.std, strict=True))


def _labels(part: str, before: TensorSummary, now: TensorSummary) -> Iterator[PipelineDifference]:
    one, other = before.labels or {}, now.labels or {}
    totals = max(1, sum(one.values())), max(1, sum(other.values()))
    new = sorted((k for k in other if k not in one), key=int)
    values = one.keys() | other.keys()
    distance = sum(abs(one.get(k, 0) / totals[0] - other.get(k, 0) / totals[1]) for k in values) / 2
    # Pixels of one image are no independent labels: so many as there are samples count.
    counts = [(one.get(k, 0) / totals[0] * before.samples, other.get(k, 0) / totals[1] * now.samples) for k in values]
    if not _differ(counts) or distance < 0.02:
        return
    values_text = f"; values only here: {', '.join(new[:5])}" if new else ""
    what = f"{part}, {now.name}: {distance:.0%} of the labels are distributed differently{values_text}: other labels?"
    yield PipelineDifference("strong" if distance > 0.2 or new else "possible", part, now.name, "", "", what)


def _differ(counts: list[tuple[float, float]]) -> bool:
    """Pearson's test of homogeneity of two samples, by Wilson and Hilferty's normal approximation of chi-square."""
    first, second = sum(a for a, _ in counts), sum(b for _, b in counts)
    freedom = len(counts) - 1
    if freedom < 1 or not first or not second:
        return False
    ratio = math.sqrt(second / first)
    chi_square = sum((ratio * a - b / ratio) ** 2 / (a + b) for a, b in counts if a + b)
    spread = 2 / (9 * freedom)
    deviate: float = ((chi_square / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return deviate > STANDARD_ERRORS
