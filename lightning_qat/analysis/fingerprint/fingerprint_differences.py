"""List the differences between two training pipelines, the most suspicious first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_qat.analysis.fingerprint.difference import (
    PipelineDifference,
    PipelineDifferences,
    StageDifferences,
    Suspicion,
    module_names,
)
from lightning_qat.analysis.fingerprint.fingerprint import Fingerprint
from lightning_qat.analysis.fingerprint.label_agreement import agreement_of_stages, agreement_with_reference
from lightning_qat.analysis.fingerprint.module_differences import LAYERS, MODULES, module_differences
from lightning_qat.analysis.fingerprint.tensor_differences import tensor_difference, tensor_differences
from lightning_qat.analysis.metric_direction import higher_is_better, is_quality
from lightning_qat.analysis.tolerance import COLLAPSE, ROUNDING, tolerance


def compare_fingerprints(reference: Fingerprint, here: Fingerprint) -> PipelineDifferences:
    """List what differs.

    Args:
        reference: of the float run that worked.
        here: of the run that does not.

    Example:
        >>> one = Fingerprint(weights={"conv": "1f"}, settings={"precision": "32-true"})
        >>> other = Fingerprint(weights={"conv": "2e"}, settings={"precision": "32-true"})
        >>> [row.what for row in compare_fingerprints(one, other).rows]
        ['the weights of all 1 modules differ: another checkpoint?']
    """
    rows = [
        *_weights(reference, here),
        *tensor_differences("model input", reference.model_inputs, here.model_inputs),
        *tensor_differences("data", reference.data, here.data),
        *_swapped(reference, here),
        *_modes(reference, here),
        *_randomness(reference, here),
        *module_differences(reference, here),
    ]
    rows += agreement_with_reference(reference, here, rows)
    rows += [
        *_results(reference, here, rows),
        *_batch_norm(reference, here),
        *_optimizers(reference, here),
        *_plain("scheduler", {"schedulers": reference.schedulers}, {"schedulers": here.schedulers}, "possible"),
        *_settings(reference.settings, here.settings),
        *_plain("dataset", reference.datasets, here.datasets, "possible"),
        *_plain("version", reference.versions, here.versions, "unlikely"),
    ]
    return PipelineDifferences.of(rows)


def compare_stages(here: Fingerprint) -> StageDifferences:
    """List how the training data differ from the validation data of the same pipeline, as the model sees them.

    This needs no reference. It shows preprocessing that only one of the two has, and labels that fit in only one. An
    augmentation shows as well, so this alone proves no fault.

    Args:
        here: of one pipeline.
    """
    training, validation = here.model_inputs.get("train", ()), here.model_inputs.get("validate", ())
    known = {summary.name: summary for summary in validation}
    rows = [
        row
        for summary in training
        if summary.name in known and summary.shape == known[summary.name].shape
        for row in tensor_difference("model input (validation -> train)", known[summary.name], summary)
    ]
    return StageDifferences.of([*rows, *agreement_of_stages(here, rows)])


def _weights(reference: Fingerprint, here: Fingerprint) -> Iterator[PipelineDifference]:
    before, now = reference.weights, here.weights
    missing, extra = sorted(before.keys() - now.keys()), sorted(now.keys() - before.keys())
    for names, what in ((missing, "exist only in the reference"), (extra, "exist only here")):
        if names:
            shown = module_names(names)
            yield PipelineDifference("strong", "weights", shown, "", "", f"modules {shown} {what}: another model?")
    common = before.keys() & now.keys()
    different = [name for name in now if name in common and before[name] != now[name]]
    if different:
        whole = len(different) == len(common)
        shown = module_names(different)
        what = (
            f"the weights of all {len(common)} modules differ: another checkpoint?"
            if whole
            else f"the weights of {len(different)} of {len(common)} modules differ ({shown}): partly loaded?"
        )
        suspicion: Suspicion = "strong"
        if whole and _reproduces(reference, here):
            suspicion = "possible"
            what = (
                f"the weights of all {len(common)} modules differ, and the metrics are as good: an average of the "
                "weights (EMA), or the checkpoint of another epoch?"
            )
        yield PipelineDifference(suspicion, "weights", shown, before[different[0]], now[different[0]], what)


def _reproduces(reference: Fingerprint, here: Fingerprint) -> bool:
    """Whether the evaluation is as good as in the reference; scores decide where there are some."""
    common = _common_metrics(reference, here)
    judged = [name for name in common if higher_is_better(name)] or common
    for name in judged:
        one, other = reference.metrics[name], here.metrics[name]
        errors = reference.standard_errors.get(name, 0.0), here.standard_errors.get(name, 0.0)
        fall = one - other if higher_is_better(name) else other - one
        if not fall <= tolerance(*errors, least=ROUNDING * abs(one)):  # NaN is no reproduction
            return False
    return bool(judged)


def _randomness(reference: Fingerprint, here: Fingerprint) -> Iterator[PipelineDifference]:
    if here.random_evaluation and not reference.random_evaluation:
        what = (
            "the same batch evaluated twice has different results here: is dropout, or another random layer, active "
            "in evaluation?"
        )
        yield PipelineDifference("strong", "evaluation", "random", "no", "yes", what)


def _swapped(reference: Fingerprint, here: Fingerprint) -> Iterator[PipelineDifference]:
    names = sorted(set(here.swapped) - set(reference.swapped))
    if names:
        what = (
            f"the weights of {module_names(names)} are replaced while validation runs, only here: an average that is "
            "swapped in at the wrong place, or that was made before the checkpoint was loaded?"
        )
        yield PipelineDifference("strong", "evaluation", module_names(names), "", "", what)


def _results(
    reference: Fingerprint, here: Fingerprint, found: Sequence[PipelineDifference]
) -> Iterator[PipelineDifference]:
    """Compare losses and metrics: what they follow from is named before them."""
    explained = {row.part for row in found if row.suspicion == "strong" or _acts_in_training(row)}
    follows = ""
    if reference.weights != here.weights:
        follows = " (the weights differ, so this follows)"
    elif any(part.startswith(LAYERS) for part in explained):
        follows = " (the layers compute something else, so this follows)"
    metrics = _common_metrics(reference, here)
    kept = [name for name in metrics if _is_kept(reference, here, name)]
    for part, names, before, now in (
        ("loss", _common(reference.losses, here.losses), reference.losses, here.losses),
        ("metric", metrics, reference.metrics, here.metrics),
    ):
        for name in names:
            one, other = before[name], now[name]
            errors = reference.standard_errors.get(name, 0.0), here.standard_errors.get(name, 0.0)
            tolerated = tolerance(*errors, least=ROUNDING * abs(one))
            if abs(one - other) <= tolerated or (one != one and other != other):
                continue
            ratio = other / one if one else math.inf
            guess = ""
            if part == "loss" and not any(p.endswith("(train)") or p == MODULES for p in explained):
                guess = _guess_at_loss(ratio)
            elif part == "metric" and kept and not any(p.endswith("(validate)") for p in explained):
                guess = f", while {module_names(kept)} is the same: computed from another output, or in another way?"
            suspicion: Suspicion = "possible" if follows or abs(one - other) <= COLLAPSE * abs(one) else "strong"
            what = f"{part} {name} of the untouched float model {one:.4g} -> {other:.4g}{follows or guess}"
            yield PipelineDifference(suspicion, part, name, f"{one:.6g}", f"{other:.6g}", what)


def _acts_in_training(row: PipelineDifference) -> bool:
    """Whether a row is about a setting, such as that of dropout, which no evaluation shows."""
    return row.part == MODULES and row.suspicion == "possible"


def _is_kept(reference: Fingerprint, here: Fingerprint, name: str) -> bool:
    return abs(reference.metrics[name] - here.metrics[name]) <= ROUNDING * abs(reference.metrics[name])


_OTHER_LOSS = "a term missing or added, targets in other units, or labels that belong to other inputs?"
_WHOLE = 0.02
"""How near a ratio of losses must be to a whole number to count as a factor in the code."""


def _guess_at_loss(ratio: float) -> str:
    for factor, guess in ((ratio, "scaled by {}?"), (1 / ratio if ratio else math.inf, "divided by {}, or {}")):
        whole = round(factor) if math.isfinite(factor) else 0
        if whole >= 2 and abs(factor - whole) < _WHOLE:
            return f": {guess.format(whole, _OTHER_LOSS)}"
    return f": {_OTHER_LOSS}"


def _modes(reference: Fingerprint, here: Fingerprint) -> Iterator[PipelineDifference]:
    for mode in ("train", "eval"):
        before, now = set(reference.modes.get(mode, ())), set(here.modes.get(mode, ()))
        for names, where, values in (
            (sorted(before - now), "in the reference", (mode, "")),
            (sorted(now - before), "here", ("", mode)),
        ):
            if names:
                shown = module_names(names)
                what = f"in {mode} mode while training, only {where}: {shown}: frozen batch norm or dropout?"
                yield PipelineDifference("strong", "modes", shown, *values, what)
    kind = "train in evaluation"
    active = sorted(set(here.modes.get(kind, ())) - set(reference.modes.get(kind, ())))
    if active:
        what = f"in train mode while evaluating, only here: {module_names(active)}: active dropout, moving batch norm?"
        yield PipelineDifference("strong", "evaluation", module_names(active), "eval", "train", what)


def _batch_norm(reference: Fingerprint, here: Fingerprint) -> Iterator[PipelineDifference]:
    changed: dict[tuple[str, str], list[str]] = {}
    for name in _common(reference.batch_norm, here.batch_norm):
        one, other = (str(norms[name].get("momentum")) for norms in (reference.batch_norm, here.batch_norm))
        if one != other:
            changed.setdefault((one, other), []).append(name)
    for (one, other), names in changed.items():
        what = f"batch norm {module_names(names)}: momentum {one} -> {other}"
        yield PipelineDifference("possible", "batch norm", module_names(names), one, other, what)


def _optimizers(reference: Fingerprint, here: Fingerprint) -> Iterator[PipelineDifference]:
    """Compare optimizers. QAT has its own learning rate (1/10 to 1/20 of the float one); other differences are
    suspicious."""
    if len(reference.optimizers) != len(here.optimizers):
        yield _other_count("optimizers", len(reference.optimizers), len(here.optimizers))
    for one, other in zip(reference.optimizers, here.optimizers, strict=False):
        if one.get("class") != other.get("class"):
            what = f"optimizer class {one.get('class')} -> {other.get('class')}"
            yield PipelineDifference(
                "possible", "optimizer", "class", str(one.get("class")), str(other.get("class")), what
            )
        groups, groups_now = one.get("groups", ()), other.get("groups", ())
        if len(groups) != len(groups_now):
            yield _other_count("optimizer groups", len(groups), len(groups_now))
        for number, (group, now) in enumerate(zip(groups, groups_now, strict=False)):
            for key in sorted(group.keys() & now.keys()):
                if group[key] != now[key]:
                    yield _group_difference(number, key, group[key], now[key])


def _other_count(what: str, before: int, now: int) -> PipelineDifference:
    return PipelineDifference("possible", "optimizer", what, str(before), str(now), f"{before} -> {now} {what}")


def _group_difference(number: int, key: str, before: Any, now: Any) -> PipelineDifference:
    name = f"group {number}, {key}"
    what = f"optimizer {name}: {before} -> {now}"
    numbers = isinstance(before, (int, float)) and isinstance(now, (int, float))
    suspicion: Suspicion = "possible"
    if key in ("lr", "initial_lr") and numbers and before:
        ratio = now / before
        if 0.02 <= ratio <= 0.2:
            suspicion = "unlikely"
            what += f": {ratio:.2g} of the float one, as is usual in QAT"
        elif ratio > 1:
            suspicion = "strong"
            what += ": higher than in float training; QAT wants 1/10 to 1/20 of it"
    elif key == "weight_decay" and numbers and (now > 10 * before > 0):
        suspicion = "strong"
        what += ": more than ten times that of float training"
    return PipelineDifference(suspicion, "optimizer", name, str(before), str(now), what)


def _settings(before: dict[str, Any], now: dict[str, Any]) -> Iterator[PipelineDifference]:
    for row in _plain("settings", before, now, "possible"):
        one, other = before.get(row.name), now.get(row.name)
        clips_more = isinstance(one, (int, float)) and isinstance(other, (int, float)) and 0 < other < 0.1 * one
        if row.name == "max_epochs":
            yield replace(row, suspicion="unlikely")  # QAT is shorter
        elif row.name == "gradient_clip_val" and clips_more:
            yield replace(row, suspicion="strong", what=f"{row.what}: gradients are clipped to less than a tenth")
        else:
            yield row


def _plain(
    part: str, before: dict[str, Any], now: dict[str, Any], suspicion: Suspicion
) -> Iterator[PipelineDifference]:
    for key in sorted(before.keys() | now.keys()):
        one, other = before.get(key), now.get(key)
        if one != other:
            what = f"{part} {key}: {_short(one)} -> {_short(other)}"
            yield PipelineDifference(suspicion, part, key, _short(one), _short(other), what)


def _common(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Keys of both, in the order of the first."""
    return [key for key in before if key in now]


def _common_metrics(reference: Fingerprint, here: Fingerprint) -> list[str]:
    """The metrics of both that measure quality; how long an evaluation took, for instance, does not."""
    return [name for name in _common(reference.metrics, here.metrics) if is_quality(name)]


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 120 else f"{text[:117]}..."
