"""The source document's story, told by the tool: from everything that is wrong to both tasks within 1 % of float.

    python examples/bev/story.py            # resumable: what is done is not done again
    python examples/bev/story.py --quick    # a few minutes: the same steps on less data, without the table of README.md

Every step is a command that a person could type. What is changed between two steps is what the reports of the step
before say: YAML is pasted, advised changes of code are made (see ``reports.py``).
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script: find examples.bev

from examples.bev.chapters import columns, table, text, write_into
from examples.bev.configuration import Settings, at_int8, callback, read, with_model, with_overrides
from examples.bev.reports import DIVISION, Reports, rules
from examples.bev.steps import HERE, QUICK, ROOT, Size, Story

SHARES = {"1%": 1, "2%": 1, "4.5%": 2}
"""Shares of the points to try at int16, from the smallest on, and how many times longer they train."""
MOST_POINTS = 10
"""More points at int16 than that are no small share."""
OUTPUTS = {"dynamic": "obstacles.1.places", "static": "map.3.points"}
"""What a task is judged by, behind a sigmoid."""


def quoted(rows: list[dict[str, Any]], most: int = 6) -> list[str]:
    """What rows of a report say, without the YAML."""
    lines = [
        f"{row.get('kind') or row['verdict']}: {row.get('what') or row['point'] + ': ' + row['evidence']}"
        for row in rows
    ]
    return lines[:most] + ([f"and {len(lines) - most} more"] if len(lines) > most else [])


def pasted(story: Story, settings: Settings, rows: list[dict[str, Any]], report: str) -> Settings:
    """Settings with what rows of a report print; the chapter says so."""
    new = rules(rows)
    story.last.said += [f"{report}: {line}" for line in quoted(rows)]
    shown = [f"`{yaml.safe_dump(rule, default_flow_style=True, width=1000, sort_keys=False).strip()}`" for rule in new]
    if new:
        more = f" and {len(new) - 4} more" if len(new) > 4 else ""
        story.last.done.append(f"pasted {', '.join(shown[:4])}{more}")
    return with_overrides(settings, new)


def at_int16(story: Story) -> Settings:
    """From everything that is wrong to a model that reaches the target at int16."""
    settings = read(HERE / "configs" / "faults.yaml")
    first = story.calibrated("int16 calibration, first", settings)
    for finding, edit in first.edits():
        story.last.said += [f"model check: {line}" for line in quoted([finding])]
        story.last.done.append(f"changed the code at {finding['location']}: `{edit.arguments}`")
        settings = with_model(settings, **edit.arguments)
    settings = pasted(story, settings, first.pasted_diagnoses(("bad scale",)), "diagnosis")
    for attempt in ("model check", "model check, again"):
        rows = story.checked(attempt, settings).pasted_findings()
        if not rows:
            story.last.said.append("no error and no warning with something to paste")
            break
        settings = pasted(story, settings, rows, "model check")
    fixed = story.calibrated("int16 calibration, fixed inputs", settings)
    settings = pasted(story, settings, fixed.pasted_diagnoses(("bad scale", "clipping")), "diagnosis")
    story.trained("int16 QAT, first", settings)
    blamed = story.pipeline("pipeline check", settings)
    settings = pasted(story, settings, fixed.pasted_diagnoses(("non-uniform",)), "diagnosis of the calibration")
    story.calibrated("int16 calibration, split dim_t", settings)
    if blamed.blames_training_images():
        settings = with_model(settings, **DIVISION)
        story.last.done.append(f"aligned the training script with the float one: `{DIVISION}`")
    story.trained("int16 QAT, pipeline fixed", settings)
    return settings


def at_int8_and_int16(story: Story, settings: Settings) -> None:
    """From int16 to the smallest share of int16 points that reaches the target."""
    narrow = at_int8(settings)
    collapsed = story.calibrated("int8 calibration", narrow)
    story.last.said += [most_sensitive(collapsed), *quoted(collapsed.findings)]
    story.trained("int8 QAT", narrow)
    leaders = raised(narrow, collapsed, "leaders")
    story.calibrated("int8 + leaders int16, calibration", leaders)
    story.trained("int8 + leaders int16, QAT", leaders)
    for share, longer in SHARES.items():
        if not story.missed:
            return
        wider = raised(narrow, collapsed, share)
        story.calibrated(f"int8 + top {share} int16, calibration", wider)
        story.trained(f"int8 + top {share} int16, QAT", wider, longer)
    if len(story.missed) == 1:  # look at the output of that task alone
        output = OUTPUTS[story.missed[0]]
        looking = copy.deepcopy(leaders)
        callback(looking, "SensitivityAnalysis").update(output=output, post_process="torch.sigmoid")
        seen = story.calibrated(f"int8 + leaders int16, sensitivity of {output}", looking, column=False)
        story.last.said.append(most_sensitive(seen))
        chosen = raised(leaders, seen, MOST_POINTS - seen.number_of_wide_points())
        story.calibrated(f"int8 + leaders + top of {output} int16, calibration", chosen)
        story.trained(f"int8 + leaders + top of {output} int16, QAT", chosen, 2)


def raised(settings: Settings, reports: Reports, top: str | int) -> Settings:
    """Settings with the most sensitive points of a run at int16."""
    path = str(reports.path("sensitivity", "csv"))
    return with_overrides(settings, [{"sensitivity": path, "top": top, "activation": {"dtype": "int16"}}])


def most_sensitive(reports: Reports) -> str:
    """The first points of a sensitivity table."""
    rows = reports.rows("sensitivity")[:9]
    return "most sensitive: " + ", ".join(f"{row['point']} ({row['score']:.3g})" for row in rows)


def main() -> None:
    """Tell the story."""
    parser = argparse.ArgumentParser(description="The source document's story.")
    parser.add_argument("--quick", action="store_true", help="a few minutes, on less data; README.md is left alone")
    parser.add_argument(
        "--root", type=Path, help="where everything goes; logs/bev/story or logs/bev/quick if not given"
    )
    parser.add_argument("--without-tune", action="store_true", help="leave out the last step")
    options = parser.parse_args()
    root = options.root or Path("logs/bev", "quick" if options.quick else "story")
    os.chdir(ROOT)
    story = Story(root, QUICK if options.quick else Size())
    story.float_model()
    settings = at_int16(story)
    at_int8_and_int16(story, settings)
    if not options.without_tune:
        story.tuned("tune", at_int8(settings))
    print(table(story.chapters, story.floats))
    (root / "columns.json").write_text(json.dumps({"float": story.floats, **columns(story.chapters)}, indent=1))
    write_into(root / "story.md" if options.quick else HERE / "README.md", text(story.chapters, story.floats))


if __name__ == "__main__":
    main()
