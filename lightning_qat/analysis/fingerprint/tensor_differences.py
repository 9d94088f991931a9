"""How the tensors of two pipelines differ, by more than other samples of the same data would."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lightning_qat.analysis.fingerprint.difference import PipelineDifference, Suspicion
from lightning_qat.analysis.fingerprint.tensor_guesses import guessed_cause, guessed_shape, has_moved
from lightning_qat.analysis.fingerprint.tensor_summary import TensorSummary
from lightning_qat.analysis.tolerance import STANDARD_ERRORS

LEAST_SHARE = 0.02
"""A smaller difference in the distribution of labels or empty samples does not ruin a training."""
LARGE_SHARE = 0.2
"""A fifth of the samples with other labels, or empty, is enough to ruin one."""


def tensor_differences(
    part: str, before: dict[str, tuple[TensorSummary, ...]], now: dict[str, tuple[TensorSummary, ...]]
) -> Iterator[PipelineDifference]:
    """Compare summaries of the same name, stage by stage.

    Args:
        part: the part of the pipeline, such as ``data``.
        before: summaries of the reference, by stage.
        now: the same here.
    """
    for stage in (stage for stage in before if stage in now):
        known = {summary.name: summary for summary in before[stage]}
        here = {summary.name: summary for summary in now[stage]}
        for name, summary in here.items():
            if name in known:
                yield from tensor_difference(f"{part} ({stage})", known[name], summary)
            else:
                what = f"{part} ({stage}), {name}: exists only here"
                yield PipelineDifference("possible", f"{part} ({stage})", name, "", str(summary.shape), what)
        for name in (name for name in known if name not in here):
            what = f"{part} ({stage}), {name}: exists only in the reference"
            yield PipelineDifference("possible", f"{part} ({stage})", name, str(known[name].shape), "", what)


def tensor_difference(part: str, before: TensorSummary, now: TensorSummary) -> Iterator[PipelineDifference]:
    """Compare two summaries.

    Args:
        part: the part of the pipeline, such as ``data (train)``.
        before: of the reference.
        now: here.
    """

    def row(suspicion: Suspicion, reference: object, value: object, what: str) -> PipelineDifference:
        return PipelineDifference(suspicion, part, now.name, str(reference), str(value), f"{part}, {now.name}: {what}")

    if before.dtype != now.dtype:
        yield row("strong", before.dtype, now.dtype, f"type {before.dtype} -> {now.dtype}")
    if not _same_shape(before.shape, now.shape):
        guess = guessed_shape(before.shape, now.shape)
        yield row("strong", before.shape, now.shape, f"shape {before.shape} -> {now.shape}: {guess}")
    if before.labels is not None and now.labels is not None:
        yield from _labels(part, before, now)
        return
    if before.constant is not None and now.constant is not None:
        shares = before.constant, now.constant
        empty = shares[0] * before.samples, shares[1] * now.samples
        distance = abs(shares[1] - shares[0])
        if distance >= LEAST_SHARE and _differ([empty, (before.samples - empty[0], now.samples - empty[1])]):
            what = (
                f"{shares[1]:.0%} of the samples are empty (one value all over), in the reference {shares[0]:.0%}: "
                "missing or padded samples?"
            )
            suspicion: Suspicion = "strong" if distance > LARGE_SHARE else "possible"
            yield row(suspicion, f"{shares[0]:.0%}", f"{shares[1]:.0%}", what)
    if len(before.mean) != len(now.mean):
        return
    broken = [i for i, mean in enumerate(now.mean) if not math.isfinite(mean) and math.isfinite(before.mean[i])]
    if broken:
        what = (
            f"{_channel(now, broken)}nan or inf here: bad values in the data, or a division by zero before the model?"
        )
        yield row("strong", f"mean {before.mean[broken[0]]:.4g}", "not finite", what)
        return
    moved = [i for i in range(len(now.mean)) if has_moved(before, i, now, i)]
    if moved:
        first = moved[0]
        numbers = (
            f"{_channel(now, moved)}mean {before.mean[first]:.4g} -> {now.mean[first]:.4g}, "
            f"std {before.std[first]:.4g} -> {now.std[first]:.4g}"
        )
        more = f" (and {len(moved) - 1} more channels)" if len(moved) > 1 else ""
        suspicion, guess = guessed_cause(before, now, moved)
        what = f"{numbers}{more}: {guess}"
        yield row(suspicion, f"mean {before.mean[first]:.4g}", f"mean {now.mean[first]:.4g}", what)
        return
    if outlying := [i for i in range(len(now.mean)) if _reaches_far(before, now, i)]:
        known, here = (f"{s.min[outlying[0]]:.4g} to {s.max[outlying[0]]:.4g}" for s in (before, now))
        values = f"values from {here}, in the reference {known}"
        yield row("possible", known, here, f"{_channel(now, outlying)}{values}: a fill value, or outliers?")


def _channel(summary: TensorSummary, channels: Sequence[int]) -> str:
    """The first of some channels, if they are told apart."""
    return f"channel {channels[0]}: " if len(summary.mean) > 1 else ""


def _same_shape(before: tuple[int, ...], now: tuple[int, ...]) -> bool:
    """Whether shapes agree where they do not vary."""
    pairs = zip(before, now, strict=False)
    return len(before) == len(now) and all(one == other or -1 in (one, other) for one, other in pairs)


def _reaches_far(before: TensorSummary, now: TensorSummary, channel: int) -> bool:
    """Whether some values lie further outside the range of the reference than it is wide: it sets a scale, if rare."""
    low, high = before.min[channel], before.max[channel]
    return max(low - now.min[channel], now.max[channel] - high) > high - low > 0


def _labels(part: str, before: TensorSummary, now: TensorSummary) -> Iterator[PipelineDifference]:
    one, other = _shares(before.labels), _shares(now.labels)
    if not _distributed_differently(one, other, before.samples, now.samples):
        return
    new, gone = (sorted(a.keys() - b.keys()) for a, b in ((other, one), (one, other)))
    distance = _distance(one, other)
    text = "".join(
        f"; values only {where}: {', '.join(map(str, values[:5]))}"
        for where, values in (("here", new), ("in the reference", gone))
        if values
    )
    guess = "other labels?"
    for shift in (1, -1):
        shifted = {label + shift: share for label, share in one.items()}
        if shifted.keys() == other.keys() and not _distributed_differently(shifted, other, before.samples, now.samples):
            guess = f"every label one {'more' if shift > 0 else 'less'} than in the reference?"
    what = f"{part}, {now.name}: {distance:.0%} of the labels are distributed differently{text}: {guess}"
    suspicion: Suspicion = "strong" if distance > LARGE_SHARE or new else "possible"
    yield PipelineDifference(suspicion, part, now.name, "", "", what)


def _shares(labels: dict[str, int] | None) -> dict[int, float]:
    total = max(1, sum((labels or {}).values()))
    return {int(label): count / total for label, count in (labels or {}).items()}


def _distance(one: dict[int, float], other: dict[int, float]) -> float:
    """Total variation distance: the share of labels that would have to be others."""
    return sum(abs(one.get(k, 0.0) - other.get(k, 0.0)) for k in one.keys() | other.keys()) / 2


def _distributed_differently(one: dict[int, float], other: dict[int, float], samples: int, now: int) -> bool:
    # pixels of one image are no independent labels: as many count as there are samples
    counts = [(one.get(k, 0.0) * samples, other.get(k, 0.0) * now) for k in sorted(one.keys() | other.keys())]
    return _distance(one, other) >= LEAST_SHARE and _differ(counts)


def _differ(counts: list[tuple[float, float]]) -> bool:
    """Pearson's test of homogeneity of two samples, beyond three standard deviations.

    Sources:
        K. Pearson, "On the probability that two independent distributions of frequency are really samples from the same
        population", Biometrika 8 (1911); E. B. Wilson and M. M. Hilferty, "The distribution of chi-square", Proceedings
        of the National Academy of Sciences 17 (1931), for the normal approximation.
    """
    counts = [(a, b) for a, b in counts if a + b]
    first, second = sum(a for a, _ in counts), sum(b for _, b in counts)
    freedom = len(counts) - 1
    if freedom < 1 or not first or not second:
        return False
    ratio = math.sqrt(second / first)
    chi_square = sum((ratio * a - b / ratio) ** 2 / (a + b) for a, b in counts)
    spread = 2 / (9 * freedom)
    deviate: float = ((chi_square / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return deviate > STANDARD_ERRORS
