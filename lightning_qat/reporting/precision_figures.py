"""Figures of mixed precision; each function takes a result and returns a matplotlib figure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_qat.analysis.mixed_precision.precision_choice import PrecisionFront
from lightning_qat.reporting.figures import blank_figure
from lightning_qat.reporting.plain_text import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINE, _CHOSEN = "#4c72b0", "#c44e52"
_NAMED = 5
_LONGEST = 60
_AXIS = {
    "points": "share of the points at a wider type",
    "ops": "share of the ops with a wider point",
    "bops": "bit operations, relative to the narrowest types",
    "latency": "time, relative to the narrowest types",
}


def error_against_cost(front: PrecisionFront, chosen: int | None = None) -> Figure:
    """Draw the predicted signal to noise ratio of the output against the cost of each choice on the front.

    The points that the first steps raise are listed: they gain most per cost. Choices whose prediction is out of range
    are drawn hollow.

    Args:
        front: the choices, the cheapest first.
        chosen: number of raised points of a choice to mark.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    figure, axes = blank_figure(7.0, 4.2)
    figure.suptitle("Error of the output against cost", fontsize=10, x=0.01, ha="left")
    rows = [row for row in front.rows if math.isfinite(row.sqnr)]
    axes.plot([r.cost for r in rows], [r.sqnr for r in rows], color=_LINE, linewidth=1.2)
    for inside, face in ((True, _LINE), (False, "white")):
        at = [(row.cost, row.sqnr) for row in rows if row.in_range is inside]
        axes.scatter([x for x, _ in at], [y for _, y in at], s=14, facecolors=face, edgecolors=_LINE, zorder=3)
    steps = [row.added for row in rows if row.added][:_NAMED]
    names = [f"{one_line(added[0])}{f' and {len(added) - 1} more' if len(added) > 1 else ''}" for added in steps]
    if names:
        text = "\n".join(["raised first:", *(f"{i}  {name[:_LONGEST]}" for i, name in enumerate(names, 1))])
        axes.text(0.99, 0.02, text, transform=axes.transAxes, ha="right", va="bottom", fontsize=7, parse_math=False)
    for row in rows:
        if row.raised == chosen:
            axes.scatter([row.cost], [row.sqnr], s=60, facecolors="none", edgecolors=_CHOSEN, linewidths=1.6, zorder=4)
            axes.plot([], [], "o", markerfacecolor="none", color=_CHOSEN, label=f"chosen: {row.raised} points")
            figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    axes.set_xlabel(_AXIS[front.cost_name])
    axes.set_ylabel("predicted SQNR (dB)")
    return figure
