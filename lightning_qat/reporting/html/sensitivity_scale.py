"""What a sensitivity means: its share of the output, and from where on it is large."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from lightning_qat.analysis.comparison.comparison_result import CHOSEN
from lightning_qat.analysis.diagnosis.diagnosis import LEAST_EFFECT, SENSITIVE_FACTOR
from lightning_qat.reporting.html.point_history import full_name
from lightning_qat.reporting.html.run_folder import RunFolder

_MOST_NAMES = 5
RULE = f"{SENSITIVE_FACTOR:g} times the median of all points and {100 * LEAST_EFFECT:.4g} % of the output"
"""From where on the diagnosis calls a point sensitive."""


@dataclass(frozen=True)
class SensitivityScale:
    """How large the sensitivities of a run are.

    Args:
        text: the median, and from where on one is large, as a sentence; empty without sensitivities.
        large: the points that are above it, the largest first; at most five.
        more: how many others there are.
    """

    text: str = ""
    large: tuple[str, ...] = ()
    more: int = 0


def output_size(run: RunFolder) -> float | None:
    """Return the root mean square of the output that sensitivities are about; None where it is not known.

    Args:
        run: its files.
    """
    rows = [row for row in run.comparison.rows if row.get("mod_name") == CHOSEN]
    same_output = run.comparison.about.get("output") == run.sensitivity_table.about.get("output")
    if len(rows) != 1 or not same_output:
        return None
    mean, var = rows[0].get("base_model_mean"), rows[0].get("base_model_var")
    if not isinstance(mean, (int, float)) or not isinstance(var, (int, float)):
        return None
    size = math.hypot(mean, math.sqrt(max(0.0, var)))
    return size if math.isfinite(size) and size > 0 else None


def sensitivity_scale(run: RunFolder) -> SensitivityScale:
    """Say what the sensitivities of a run are compared with.

    The median and the limit are those of the diagnosis, which raises a point only if it is above both.

    Args:
        run: its files.
    """
    scores = {full_name(key): row.get("score") for key, row in run.sensitivity.latest.items()}
    known = {n: float(s) for n, s in scores.items() if isinstance(s, (int, float)) and math.isfinite(s)}
    if not known:
        return SensitivityScale()
    usual, size = statistics.median_low(known.values()), output_size(run)
    limit = max(SENSITIVE_FACTOR * usual, LEAST_EFFECT * size if size is not None else 0.0)
    large = sorted((name for name in known if known[name] >= limit > 0), key=lambda name: -known[name])
    of_output = f"; the output itself has a root mean square of {size:.4g}" if size is not None else ""
    rule = RULE if size is not None else f"{SENSITIVE_FACTOR:g} times the median of all points"
    text = (
        f"Sensitivity, in the unit of the output: the median of {len(known)} points is {usual:.4g}{of_output}. It is "
        f"large from {limit:.4g} on "
        f"({rule})."
    )
    return SensitivityScale(text, tuple(large[:_MOST_NAMES]), max(0, len(large) - _MOST_NAMES))
