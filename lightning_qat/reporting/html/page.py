"""Render a run as one HTML file that needs nothing else: no network, no other file, no relaxed security policy."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_qat.analysis.results import Block, Result
from lightning_qat.atomic_files import write_atomically
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.reporting.html.answers import Answers
from lightning_qat.reporting.html.background import background, compared_runs, find_gaps, float_places
from lightning_qat.reporting.html.drawings import segments
from lightning_qat.reporting.html.findings import SOURCES, first_flag, latest_model, with_verdict
from lightning_qat.reporting.html.front import front_choices
from lightning_qat.reporting.html.glossary import ANCHORS, GLOSSARY, MEANINGS, anchor
from lightning_qat.reporting.html.judged_run import JudgedRun
from lightning_qat.reporting.html.page_data import as_json_element, page_data
from lightning_qat.reporting.html.point_table import COLUMNS, Column, PointTable
from lightning_qat.reporting.html.provenance import overrides_place
from lightning_qat.reporting.html.run_folder import RunFolder, read_run
from lightning_qat.reporting.html.sensitivity_scale import sensitivity_scale
from lightning_qat.reporting.plain_text import one_line, printable
from lightning_qat.reporting.tables import cell_text

if TYPE_CHECKING:
    from jinja2 import Environment, Template
    from markupsafe import Markup

FILE_NAME = "report.html"
_ASSETS = Path(__file__).parent / "assets"
_SCRIPTS = ("format.js", "table.js", "charts.js", "sections.js", "point.js", "main.js")
"""In the order in which they stand in the one script of the page."""
SECTIONS = {
    "verdict": "Verdict",
    "findings": "Findings",
    "results": "Results",
    "front": "Cost",
    "points": "Points",
    "depth": "Depth",
    "epochs": "Epochs",
    "graph": "Model",
    "comparison": "Other runs",
    "gaps": "Not analysed",
    "checks": "Evidence",
    "provenance": "Provenance",
    "glossary": "Glossary",
}
"""Id and title of the sections, in their order."""
_HEAT_COLUMNS = ("scale_drift", "flip_rate", "clipped_share", "score")
"""Series of which the page draws points by epochs; ``sections.js`` has the same."""
_CODE = re.compile(r"`([^`\n]+)`")
_ARROW = "-&gt;"
"""Of a text that is escaped already: a line must not end within it."""
_MOST_NAMES = 30
"""Names of one finding; the file of the finding has all."""
_STATIC_ROWS = 50
"""Rows of the table of points that can be read without JavaScript."""


def write_report(runs: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str] | None = None) -> Path:
    """Write the report of a run as one HTML file, from the files that the run has written.

    Args:
        runs: log directories, the earliest first. The page is about the last one, and compares it with the others.
        path: the file; ``report.html`` in the run's ``lightning_qat`` folder if not given. A file that exists is
            replaced at once.

    Returns:
        The path of the file.

    Raises:
        ConfigurationError: Jinja2 is missing.
        NotWrittenError: the file cannot be written.
    """
    return write_page([JudgedRun.of(read_run(run)) for run in runs], path)


def write_page(judged: Sequence[JudgedRun], path: str | os.PathLike[str] | None = None) -> Path:
    """Write the report of runs that are judged already; otherwise like :func:`write_report`.

    Args:
        judged: the earliest first.
        path: the file.
    """
    return write_atomically(path or judged[-1].run.path / FILE_NAME, _rendered(judged))


def _rendered(judged: Sequence[JudgedRun]) -> str:
    template = _template()
    run, overview, points = judged[-1].run, judged[-1].overview, judged[-1].points
    style, script = _assets()
    data = page_data(run, points, overview.flagged)
    parts = {
        "results": _results_of_all_runs(run),
        "choices": front_choices(run),
        "comparisons": compared_runs(judged),
        "segments": segments(run),
    }
    moves = (key for key, one in data["series"].items() if key in _HEAT_COLUMNS and len(one["epochs"]) > 1)
    present = {"results": parts["results"], "front": parts["choices"], "comparison": parts["comparisons"],
               "depth": data["depth"]["names"], "epochs": any(moves),
               "graph": data["graph"]["ops"] or parts["segments"]}  # fmt: skip
    return template.render(
        **parts,
        run=run,
        overview=overview,
        sources=SOURCES,
        sections=[(name, title) for name, title in SECTIONS.items() if present.get(name, True)],
        most_names=_MOST_NAMES,
        point_places={name: place for place, name in enumerate(points.names)},
        static=_static_table(points),
        analysed=latest_model(max((*run.statistics.epochs, *run.sensitivity.epochs), default=None)),
        sensitivity=sensitivity_scale(run),
        place=overrides_place(run.provenance),
        places_in_float=float_places(run),
        gaps=find_gaps(run),
        evidence=_evidence(run, overview.answers),
        background=background(run),
        glossary=GLOSSARY,
        meanings=MEANINGS,
        anchors=ANCHORS,
        style=style,
        script=script,
        policy=f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        data=as_json_element(data),
    )


def _results_of_all_runs(run: RunFolder) -> tuple[Block, ...]:
    """The table over stages and runs; empty if no other run has these metrics: the first screen shows this run."""
    held = run.accuracy
    if held is None:
        return ()
    filled = [stage for stage in held.stages if any(stage in row.values for row in held.rows)]
    if len(filled) <= len(held.own):
        return ()
    return tuple(
        replace(block.only(["metric", "float", "target", *filled, "passed"]), note="") for block in held.full_blocks()
    )


def _static_table(points: PointTable) -> Block:
    """The first points, for readers without JavaScript."""
    visible = [index for index, column in enumerate(COLUMNS) if column.shown]
    return Block(
        columns=tuple(COLUMNS[index].label for index in visible),
        rows=tuple(tuple(_static_cell(row[i], COLUMNS[i]) for i in visible) for row in points.rows[:_STATIC_ROWS]),
    )


def _static_cell(value: Any, column: Column) -> Any:
    return f"{100 * value:.3g} %" if column.share and _is_number(value) else value


def _evidence(run: RunFolder, answers: Answers) -> list[tuple[str, tuple[Block, ...]]]:
    """The tables of the checks, as the txt files have them; what to do next stands in one place of the page."""
    checks: dict[str, Result[Any]] = {
        name: replace(ladder, note=with_verdict(ladder)) for name, ladder in run.ladders.items()
    }
    if (held := run.convergence) is not None:
        rows = (replace(row, next_step=answers(row.left_open, row.next_step), left_open="") for row in held.rows)
        note = f"{held.verdict}: {first_flag(held).evidence}" if held.is_bad else held.note
        checks["convergence"] = replace(held, rows=tuple(rows), note=note)
    found = [(SOURCES[name], _filled(result.full_blocks())) for name, result in checks.items()]
    if run.model_check is not None:
        found.append((f"{SOURCES['model_check']}: tables", run.model_check.full_blocks()[1:]))
    return found


def _filled(blocks: Sequence[Block]) -> tuple[Block, ...]:
    """Leave out columns without any cell."""
    kept = (
        [c for place, c in enumerate(b.columns) if any(row[place] not in (None, "", ()) for row in b.rows)]
        for b in blocks
    )
    return tuple(block.only(columns) if columns else block for block, columns in zip(blocks, kept, strict=True))


@cache
def _assets() -> tuple[str, str]:
    """The style and the script of the page."""
    script = "\n".join((_ASSETS / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    return (_ASSETS / "report.css").read_text(encoding="utf-8"), f'"use strict";\n(() => {{\n{script}\n}})();\n'


@cache
def _template() -> Template:
    return _environment().get_template("report.html.j2")


def require_jinja() -> None:
    """Check that pages can be rendered.

    Raises:
        ConfigurationError: Jinja2 is missing.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise ConfigurationError("the HTML report needs Jinja2: pip install 'lightning-qat[html]'.") from error


def _environment() -> Environment:
    require_jinja()
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        lstrip_blocks=True,
    )
    environment.filters.update(cell=_cell, shown=printable, line=one_line, prose=_prose, anchor=anchor)
    environment.tests["numeric"] = _is_number
    return environment


def _cell(value: Any) -> str:
    """A cell as the terminal and Markdown have it."""
    return one_line(cell_text(value, digits=4))


def _prose(text: str) -> Markup:
    """A text as HTML: what stands in backticks is code, and arrows are whole."""
    from markupsafe import Markup, escape

    html = _CODE.sub(r"<code>\1</code>", str(escape(printable(text))))
    return Markup(html.replace(_ARROW, f'<span class="arrow">{_ARROW}</span>'))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _hash(content: str) -> str:
    """The source of a security policy that allows one inline element."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
