"""The front of mixed precision: error against cost, each choice with its overrides to paste."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lightning_qat.reporting.html.drawings import short
from lightning_qat.reporting.html.run_folder import RunFolder

_MOST_CHOICES = 20
_MOST_OVERRIDES = 200
"""Overrides of one choice that the page holds; ``front.json`` has all."""


@dataclass(frozen=True)
class Choice:
    """One choice on the front.

    Args:
        raised: number of points at a wider type.
        cost: what it costs.
        sqnr: predicted signal to noise ratio of the output, in dB.
        yaml: its overrides, to paste.
    """

    raised: Any
    cost: Any
    sqnr: Any
    yaml: str


def front_choices(run: RunFolder) -> tuple[Choice, ...]:
    """Return at most 20 choices, spread evenly over the front, the cheapest first.

    Args:
        run: the files of a run, or of a tuning.
    """
    rows, overrides = run.front.rows, run.front.about.get("overrides")
    count = min(len(rows), _MOST_CHOICES)
    kept = [round(place * (len(rows) - 1) / max(1, count - 1)) for place in range(count)]
    held = overrides if isinstance(overrides, list) else []
    return tuple(
        Choice(rows[p].get("raised"), rows[p].get("cost"), rows[p].get("sqnr"), _yaml(held[p] if p < len(held) else []))
        for p in kept
    )


def front_chart(run: RunFolder) -> dict[str, Any]:
    """Return what the chart draws: cost and signal to noise ratio of every choice.

    Args:
        run: the files of a run, or of a tuning.
    """
    return {
        "cost": str(run.front.about.get("cost_name") or "points"),
        "choices": [[short(row.get(name)) for name in ("cost", "sqnr", "raised")] for row in run.front.rows],
    }


def _yaml(overrides: Any) -> str:
    """Overrides as flow mappings: JSON is YAML."""
    if not isinstance(overrides, list) or not overrides:
        return ""
    lines = [f"  - {json.dumps(override, ensure_ascii=False)}" for override in overrides[:_MOST_OVERRIDES]]
    more = len(overrides) - _MOST_OVERRIDES
    return "\n".join(["overrides:", *lines, *([f"  # and {more} more, in front.json"] if more > 0 else [])]) + "\n"
