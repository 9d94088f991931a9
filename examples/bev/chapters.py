"""How the story is told: a table like the source document's, and for each step its command and what the tool said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

METRICS = ("dynamic", "static")
ALLOWED_LOSS = 0.01
BEGIN, END = "<!-- written by story.py: begin -->", "<!-- written by story.py: end -->"


@dataclass
class Chapter:
    """One step.

    Args:
        title: of the step.
        command: what was run.
        columns: values of the metrics by the name of a column of the table.
        said: what the reports said.
        done: what was done about it.
    """

    title: str
    command: str = ""
    columns: dict[str, dict[str, float]] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)


def target(float_value: float) -> float:
    """The least value that is good enough."""
    return (1 - ALLOWED_LOSS) * float_value


def meets(values: dict[str, float], floats: dict[str, float], metrics: Sequence[str] = METRICS) -> bool:
    """Whether tasks are within the allowed loss of float."""
    return all(values[name] >= target(floats[name]) for name in metrics)


def columns(chapters: Sequence[Chapter]) -> dict[str, dict[str, float]]:
    """The values of all columns, by the column's name."""
    return {name: values for chapter in chapters for name, values in chapter.columns.items()}


def table(chapters: Sequence[Chapter], floats: dict[str, float]) -> str:
    """The table of all columns, as Markdown; what meets the target is bold."""
    found = columns(chapters)
    head = ["", "float", "target (loss < 1 %)", *found]
    lines = [head, ["---", *("---:" for _ in head[1:])]]
    for metric in METRICS:
        least = target(floats[metric])
        cells = [f"**{v[metric]:.1f}**" if v[metric] >= least else f"{v[metric]:.1f}" for v in found.values()]
        lines.append([metric, f"{floats[metric]:.1f}", f"{least:.1f}", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text(chapters: Sequence[Chapter], floats: dict[str, float]) -> str:
    """The table and the chapters, as Markdown."""
    parts = [table(chapters, floats)]
    for number, chapter in enumerate(chapters, 1):
        parts.append(f"### {number}. {chapter.title}")
        if chapter.command:
            parts.append(f"```bash\n{chapter.command}\n```")
        if chapter.columns:
            values = (
                f"{name}: " + ", ".join(f"{metric} {v[metric]:.1f}" for metric in METRICS)
                for name, v in chapter.columns.items()
            )
            parts.append("; ".join(values) + ".")
        if chapter.said:
            parts.append("The tool says:\n\n" + "\n".join(f"- {line}" for line in chapter.said))
        if chapter.done:
            parts.append("So:\n\n" + "\n".join(f"- {line}" for line in chapter.done))
    return "\n\n".join(parts)


def write_into(path: Path, story: str) -> None:
    """Replace what stands between the marks in a file; at its end if there are none."""
    before, begin, rest = path.read_text().partition(BEGIN) if path.exists() else ("", "", "")
    after = rest.partition(END)[2] if begin else ""
    path.write_text(f"{before.rstrip()}\n\n{BEGIN}\n\n{story}\n\n{END}\n{after.lstrip()}".lstrip())
