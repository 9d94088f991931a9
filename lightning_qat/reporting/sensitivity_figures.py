"""Figures of sensitivity and layer comparison; each function takes a result and returns a matplotlib figure."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_qat.analysis.comparison.comparison_result import LayerComparisonResult
from lightning_qat.analysis.sensitivity.sensitivity_result import SensitivityResult, SensitivityRow
from lightning_qat.atomic_files import write_atomically
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.numerics.break_away import break_away
from lightning_qat.reporting.figures import blank_figure
from lightning_qat.reporting.loggers import method_of
from lightning_qat.reporting.plain_text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

_ACTIVATION, _WEIGHT, _GAP, _OWN = "#4c72b0", "#dd8452", "#c44e52", "#55a868"
_HIGHEST_SQNR = 120.0
"""The largest SQNR that is drawn, in dB: an exact tensor has an infinite one."""
_SHORT = 48
_LONGEST_NOTE = 300
_LINEAR = 100.0
"""Up to this ratio an axis is linear, so that the lengths of bars can be compared."""
_MOST_NAMES = 40
_NEAR = 0.12


def sensitivity_bars(result: SensitivityResult, most: int = 30) -> Figure:
    """Draw the most sensitive points as bars, the most sensitive on top, and mark where the leaders break away.

    The bars are the scores: the root mean square change of the chosen output, in its unit.

    Args:
        result: the sensitivity table.
        most: how many points.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    every = sorted(result.rows, key=lambda row: -_finite(row.score))
    rows = every[:most]
    figure, axes = _new_figure("Sensitivity", height=max(2.4, 0.9 + 0.21 * len(rows)))
    colours = [_WEIGHT if row.role == "weight" else _ACTIVATION for row in rows]
    finite = [row.score for row in rows if 0 < row.score < math.inf]
    smallest, largest = min(finite, default=1.0), max(finite, default=1.0)
    # an output that became NaN has no number: its bar ends at the edge
    widths = [row.score if math.isfinite(row.score) else 10 * largest for row in rows]
    bars = axes.barh(range(len(rows)), widths, color=colours, height=0.75)
    for bar, row in zip(bars, rows, strict=True):
        bar.set_alpha(1.0 if row.exact else 0.45)
    labels = [f"{_short(_name(row))}  {_short(row.quant_dtype, 12)}" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    _plain(axes.get_yticklabels())
    axes.invert_yaxis()
    scores = [row.score for row in every if row.score > 0 or math.isnan(row.score)]
    leaders = break_away(scores)
    if 0 < leaders < len(rows):
        axes.axhline(leaders - 0.5, color=_GAP, linestyle="--", linewidth=1.2)
        ratio = scores[leaders - 1] / scores[leaders] if scores[leaders] else math.inf
        text = f"{leaders} broke away: {ratio:.3g} times the next"
        axes.annotate(
            text, (1.0, leaders - 0.4), xycoords=("axes fraction", "data"), ha="right", va="top", color=_GAP, fontsize=8
        )
    if largest > _LINEAR * smallest:
        axes.set_xscale("log")
    axes.set_xlabel("root mean square change of the output", fontsize=8)
    handles = [
        axes.barh([math.nan], [math.nan], color=c, label=n) for n, c in _ROLES if any(_role(r) == n for r in rows)
    ]
    if any(not row.exact for row in rows):
        handles.append(axes.barh([math.nan], [math.nan], color=_ACTIVATION, alpha=0.45, label="estimated"))
    if len(handles) > 1:
        axes.legend(handles=handles, frameon=False, fontsize=8, loc="lower right")
    axes.set_title(_short(result.note, _LONGEST_NOTE), fontsize=8, loc="left", wrap=True, parse_math=False)
    return figure


_ROLES = (("activation", _ACTIVATION), ("weight", _WEIGHT))


def sqnr_by_depth(result: LayerComparisonResult) -> Figure:
    """Draw the signal to quantization noise ratio along the depth of the model: own and accumulated.

    A dip of an op's own ratio shows that the op causes error. Where only the accumulated ratio falls, the error comes
    from earlier ops. Inputs and results are drawn; weights have no depth of their own.

    Args:
        result: the layer comparison.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    rows = [row for row in result.rows if row.base_op_type != "weight" and row.SQNR is not None]
    figure, axes = _new_figure("Signal to quantization noise, along the depth")
    places = range(len(rows))
    axes.plot(places, [_decibels(row.SQNR) for row in rows], color=_ACTIVATION, linewidth=1.4, label="accumulated")
    own = [(i, _decibels(row.own_SQNR)) for i, row in zip(places, rows, strict=True) if row.own_SQNR is not None]
    style: dict[str, Any] = {"color": _OWN, "linewidth": 0.9, "marker": "o", "markersize": 3.0}
    axes.plot([i for i, _ in own], [v for _, v in own], label="own", **style)
    if len(rows) <= _MOST_NAMES:
        axes.set_xticks(places, [_short(row.mod_name, 28) for row in rows], rotation=60, ha="right", fontsize=6)
        _plain(axes.get_xticklabels())
    else:
        _mark_lowest(axes, own, [row.mod_name for row in rows])
        axes.set_xlabel("position in execution order", fontsize=9)
    axes.set_ylabel("SQNR in dB (more is better)", fontsize=9)
    axes.margins(y=0.12)
    axes.legend(frameon=False, fontsize=9)
    return figure


def _mark_lowest(axes: Axes, own: list[tuple[int, float]], names: list[str], most: int = 3) -> None:
    """Write the names of the lowest dots, as far as they do not overlap."""
    marked: list[int] = []
    for place, value in sorted(own, key=lambda pair: pair[1]):
        if len(marked) == most or any(abs(place - other) < 2 * _NEAR * len(names) for other in marked):
            continue
        marked.append(place)
        right = place > (1 - 2 * _NEAR) * len(names)
        text = axes.annotate(_short(names[place], 32), (place, value), (4 - 8 * right, -10), fontsize=7, color="0.25",
                             textcoords="offset points", ha="right" if right else "left")  # fmt: skip
        _plain([text])


def _plain(texts: Iterable[Text]) -> None:
    """Escape a name of the user's model: "$" would start mathematics."""
    for text in texts:
        text.set_parse_math(False)


def sensitivity_over_epochs(results: Mapping[int, SensitivityResult], most: int = 8) -> Figure:
    """Draw the scores, over the epochs, of the points that are most sensitive in the last epoch.

    Args:
        results: by epoch; a point that an epoch did not measure has no dot there.
        most: how many points.

    Raises:
        ConfigurationError: matplotlib is not installed, or there is no result.
    """
    if not results:
        raise ConfigurationError("there is no sensitivity of an epoch to draw.")
    last = results[max(results)]
    names = [_name(row) for row in sorted(last.rows, key=lambda row: -_finite(row.score))[:most]]
    figure, axes = _new_figure("Sensitivity over epochs")
    for name in names:
        found = {
            epoch: row.score for epoch, result in sorted(results.items()) for row in result.rows if _name(row) == name
        }
        values = [found[epoch] for epoch in found]
        axes.plot(list(found), values, marker="o", markersize=3.0, linewidth=1.2, label=_short(name))
    if any(0 < row.score < math.inf for row in last.rows):
        axes.set_yscale("log")
    axes.set_xlabel("epoch", fontsize=9)
    axes.set_xticks(sorted(results)[:: max(1, len(results) // 10)])
    axes.set_ylabel("root mean square change of the output", fontsize=9)
    _plain(axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5)).get_texts())
    return figure


def write_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as PNG, at once."""
    image = BytesIO()
    figure.savefig(image, format="png")
    return write_atomically(path, image.getvalue())


def require_matplotlib() -> None:
    """Raise a ConfigurationError that says what to install, if figures cannot be drawn."""
    _new_figure("")


def log_figure(loggers: Iterable[Any], tag: str, figure: Figure, step: int) -> None:
    """Send a figure to every logger that shows figures.

    Args:
        loggers: ``trainer.loggers``.
        tag: where the logger files it.
        figure: the figure.
        step: the x-axis.
    """
    for logger in loggers:
        add_figure = method_of(logger, "add_figure")
        if add_figure is not None:
            add_figure(tag, figure, global_step=step, close=False)  # closing would need pyplot


def shows_figures(logger: Any) -> bool:
    """Whether a logger shows figures.

    Args:
        logger: one of ``trainer.loggers``.
    """
    return method_of(logger, "add_figure") is not None


def _new_figure(title: str, height: float = 4.2) -> tuple[Figure, Axes]:
    figure, axes = blank_figure(8.0, height)
    axes.tick_params(which="both", labelsize=8)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure, axes


def _name(row: SensitivityRow) -> str:
    return f"{row.region}.{row.point}" if row.region else row.point


def _role(row: SensitivityRow) -> str:
    return "weight" if row.role == "weight" else "activation"


def _short(name: str, length: int = _SHORT) -> str:
    """Leave out the middle of a long name. The end says most; the beginning tells names with equal ends apart."""
    name = one_line(name)
    if len(name) <= length:
        return name
    head = length // 3 if length >= _SHORT else 0
    return f"{name[:head]}...{name[head + 3 - length :]}"


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _decibels(value: float | None) -> float:
    return math.nan if value is None or math.isnan(value) else max(-20.0, min(_HIGHEST_SQNR, value))
