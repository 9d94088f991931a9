"""What keeps a part of a tensor that is lost beside far larger values."""

from __future__ import annotations

import math

from lightning_qat.analysis.comparison.point_evidence import PointEvidence
from lightning_qat.analysis.comparison.populations import Population
from lightning_qat.analysis.diagnosis.remedies import scale_per_channel, wider_dtype, wider_type
from lightning_qat.analysis.diagnosis.remedy import INT8_MAX, INT16_MAX, Remedy, override, percent, rounded_up

KEPT = 1 / 8
"""Three bits of the spread of the values are enough to keep their order."""


def keep_part(e: PointEvidence, part: Population) -> Remedy:
    """Keep a part of the tensor that is lost beside far larger values: scales of its own, or a wider type.

    Of those that suffice the first is taken: a scale per channel of a weight; under a profile, the wider type that the
    hardware has; groups with scales of their own; a wider type; both. If none suffices, the best.
    """
    is_weight = e.role == "weight"
    found: list[Remedy] = []
    channels = scale_per_channel(e) if part.axis == e.channel_axis else None
    if channels is not None:
        found.append(_kept(e, part, channels.action, channels.yaml, part.own_error))
    wide = wider_dtype(e)
    quant_max = INT16_MAX if wide == "int16" else INT8_MAX
    wider = []
    if wide is not None:
        error = max(part.largest, part.others) / quant_max / math.sqrt(12) / part.size
        fields: dict[str, object] = {"dtype": wide}
        if e.fixed_scale is not None:
            fields["fixed_scale"] = f"{rounded_up(e.largest):g}/{quant_max}"
        even = "Bring the inputs to like sizes in the model, or: " if is_weight and channels is None else ""
        wider = [_kept(e, part, f"{even}Raise it to {wide}.", override(e.point, is_weight, **fields), error)]
    groups = []
    if part.groups and not is_weight:
        split_along = {"axis": part.axis, "sizes": list(part.groups)}
        apart = "Return the parts apart and join them behind the region" if e.leaves else "Keep the parts apart"
        action = f"{apart}, so that each has a scale of its own: as with {list(part.groups)} along axis {part.axis}."
        groups = [_kept(e, part, action, override(e.point, False, split=split_along), part.group_error)]
        if wide is not None:
            yaml = override(e.point, False, dtype=wide, split=split_along)
            error = part.group_error * e.quant_max / quant_max
            groups.append(_kept(e, part, f"{action} Raise it to {wide} too.", yaml, error))
    found += [*wider, *groups] if e.types else [*groups[:1], *wider, *groups[1:]]
    enough = [remedy for remedy in found if remedy.after is not None and remedy.after <= KEPT]
    best = sorted(found, key=lambda remedy: remedy.after or 0.0)
    return next(iter([*enough, *best]), wider_type(e))


def _kept(e: PointEvidence, part: Population, action: str, yaml: str, after: float) -> Remedy:
    outcome = f"The error of these values, relative to their spread, falls from {percent(part.error)} to "
    factor = float(math.floor(part.error / after / 2)) if after else None
    return Remedy(action, yaml, factor, after=after, outcome=f"{outcome}{percent(after)} (predicted).")
