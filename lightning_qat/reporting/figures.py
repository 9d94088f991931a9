"""Figures: each function takes a result and returns a matplotlib figure.

matplotlib is an extra (``plots``) and imported when a figure is drawn. No global state is used or changed: no pyplot,
no backend is chosen; a figure brings its own Agg canvas, so that it can be saved anywhere.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from lightning_qat.analysis.comparison.point_inspection import PointInspection, flat
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.reporting.plain_text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_VALUE, _QUANTIZED, _LIMIT = "#4c72b0", "#dd8452", "#c44e52"
_MOST_DOTS = 20_000


def value_histogram(inspection: PointInspection, bins: int = 100) -> Figure:
    """Draw how the values of a point are distributed, and which range its type represents.

    The counts are logarithmic, because usually only a few values, far from the others, are clipped.

    Args:
        inspection: the point.
        bins: how many bins.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    figure, axes = _new_figure(inspection, "values")
    before, after, edges = inspection.histogram(bins)
    axes.stairs(before, edges, fill=True, color=_VALUE, alpha=0.45, label="float")
    axes.stairs(after, edges, color=_QUANTIZED, linewidth=1.0, label="quantized")
    for limit in (inspection.lowest, inspection.highest):
        axes.axvline(limit, color=_LIMIT, linestyle="--", linewidth=1.2)
    for start, end in ((edges[0], inspection.lowest), (inspection.highest, edges[-1])):
        if start < end:
            axes.axvspan(start, end, color=_LIMIT, alpha=0.08, linewidth=0)
    axes.plot([], [], color=_LIMIT, linestyle="--", label="representable (shaded: clipped)")
    _count_axis(axes)
    axes.set_xlabel("value")
    axes.set_title(_subtitle(inspection), fontsize=9, loc="left")
    _legend(figure)
    return figure


def error_histogram(inspection: PointInspection, bins: int = 100) -> Figure:
    """Draw how the errors of a point are distributed: rounding stays within half a step, clipping does not.

    Args:
        inspection: the point.
        bins: how many bins.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    figure, axes = _new_figure(inspection, "error")
    step = float(inspection.scale.max())
    errors = flat(inspection.errors)
    widest = max(float(np.abs(errors).max(initial=0.0)), 0.6 * step)
    axes.hist(errors, bins=bins, range=(-widest, widest), color=_VALUE, alpha=0.6, label="quantized - float")
    for limit in (-step / 2, step / 2):
        axes.axvline(limit, color=_LIMIT, linestyle="--", linewidth=1.2)
    axes.plot([], [], color=_LIMIT, linestyle="--", label="half a step")
    _count_axis(axes)
    axes.set_xlabel("error")
    s = inspection.statistics
    axes.set_title(f"rounding energy {s.rounding:.4g}, clipping energy {s.clipping:.4g}", fontsize=9, loc="left")
    _legend(figure)
    return figure


def quantized_against_float(inspection: PointInspection) -> Figure:
    """Draw every value against its quantized value: a staircase, with flat ends where values are clipped.

    Args:
        inspection: the point; of more than 20,000 values an even sample and all extremes are drawn.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    figure, axes = _new_figure(inspection, "quantized against float")
    before, after = _pairs(inspection.values, inspection.quantized)
    if before.size > _MOST_DOTS:
        order = np.argsort(before)
        chosen = order[np.unique(np.linspace(0, order.size - 1, _MOST_DOTS).astype(np.int64))]
        before, after = before[chosen], after[chosen]
    if before.size:
        ends = [min(before.min(), after.min()), max(before.max(), after.max())]
        axes.plot(ends, ends, color="0.6", linewidth=0.8, label="no error")
    axes.scatter(before, after, s=5, color=_VALUE, linewidths=0, zorder=3, label=f"{before.size} values")
    for limit in (inspection.lowest, inspection.highest):
        axes.axhline(limit, color=_LIMIT, linestyle="--", linewidth=1.2)
    axes.plot([], [], color=_LIMIT, linestyle="--", label="representable")
    axes.set_xlabel("float")
    axes.set_ylabel("quantized")
    axes.set_title(_subtitle(inspection), fontsize=9, loc="left")
    _legend(figure)
    return figure


def blank_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure with its own canvas, and its axes.

    Args:
        width: in inches.
        height: in inches.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError("figures need matplotlib: pip install 'lightning-qat[plots]'.") from error
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _new_figure(inspection: PointInspection, what: str) -> tuple[Figure, Axes]:
    figure, axes = blank_figure(7.0, 4.2)
    # names come from the user's model: "$" would start mathematics
    title = "\n".join(textwrap.wrap(f"{one_line(inspection.point)}: {what}", 86))
    figure.suptitle(title, fontsize=10, x=0.01, ha="left", parse_math=False)
    return figure, axes


def _count_axis(axes: Axes) -> None:
    """Logarithmic, with a place for zero."""
    axes.set_yscale("symlog", linthresh=1.0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("number of values")


def _legend(figure: Figure) -> None:
    """Below everything, where it covers nothing."""
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9, markerscale=3)


def _subtitle(inspection: PointInspection) -> str:
    scale = inspection.scale.reshape(-1)
    steps = f"{scale.min():.4g}" if scale.numel() == 1 else f"{scale.min():.4g} ... {scale.max():.4g}"
    return (
        f"{inspection.dtype}, scale {steps}, {100 * inspection.clipped_share:.3g} % clipped, "
        f"SQNR {inspection.sqnr:.1f} dB"
    )


def _pairs(values: tuple[Tensor, ...], quantized: tuple[Tensor, ...]) -> tuple[np.ndarray[Any, Any], ...]:
    """Values and quantized values where both are finite."""
    before = np.concatenate([v.double().reshape(-1).numpy() for v in values])
    after = np.concatenate([q.double().reshape(-1).numpy() for q in quantized])
    finite = np.isfinite(before) & np.isfinite(after)
    return before[finite], after[finite]
