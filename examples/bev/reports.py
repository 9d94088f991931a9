"""What the reports of a run say, and what a person does about it.

Only the files that the callbacks and commands write are read. What they print as YAML is pasted. Where they advise to
change code, :data:`EDITS` has the change: an argument of the module stands for the edit, and it is made only if the
report points at the very lines that the argument switches.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from examples.bev.configuration import Rule
from examples.bev.model import PositionEmbedding, ViewTransformation


@dataclass(frozen=True)
class Edit:
    """A change of code that a report advises.

    Args:
        kind: of the finding.
        advice: words of the advice.
        code: the function that has to be changed.
        arguments: of the module, in place of the change.
    """

    kind: str
    advice: str
    code: Callable[..., Any]
    arguments: dict[str, Any]

    def is_meant(self, finding: dict[str, Any]) -> bool:
        """Whether a finding of the model check advises this, at this place."""
        if finding["kind"] != self.kind or self.advice not in finding["action"]:
            return False
        file, _, line = finding["location"].rpartition(":")
        lines, first = inspect.getsourcelines(self.code)
        return file.endswith("examples/bev/model.py") and first <= int(line) < first + len(lines)


EDITS = (
    Edit("varying code", "dynamic_block", ViewTransformation.process_input, {"annotate": True}),
    Edit("shared scale", "out of the dynamic block", PositionEmbedding.forward, {"force_sharing": False}),
)


@dataclass(frozen=True)
class Reports:
    """The reports in the folder of a run.

    Args:
        folder: where the files are.
    """

    folder: Path

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Rows of a report, the one about the calibrated model if there is one; nothing if there is no such report."""
        path = self.path(name, "json")
        rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
        return rows

    def path(self, name: str, ending: str) -> Path:
        """The file of a report, the one about the calibrated model if there is one."""
        calibrated = self.folder / f"calibrated_{name}.{ending}"
        return calibrated if calibrated.exists() else self.folder / f"{name}.{ending}"

    def content(self, name: str) -> dict[str, Any]:
        """All that a report holds."""
        found: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
        return found

    def points(self) -> list[dict[str, Any]]:
        """All points of the plan."""
        return [point for region in self.content("quant_plan")["regions"].values() for point in region["points"]]

    def number_of_wide_points(self) -> int:
        """How many points are at int16."""
        return sum(point["dtype"] == "int16" for point in self.points())

    @property
    def findings(self) -> list[dict[str, Any]]:
        """Findings of the model check that are more than worth knowing."""
        return [row for row in self.rows("model_check_result") if row["severity"] != "info"]

    def edits(self) -> list[tuple[dict[str, Any], Edit]]:
        """Findings that advise to change code, with the change."""
        return [(finding, edit) for finding in self.findings for edit in EDITS if edit.is_meant(finding)]

    def pasted_findings(self) -> list[dict[str, Any]]:
        """Findings with YAML; those about what code shares are left to the code."""
        return [finding for finding in self.findings if finding["yaml"] and finding["kind"] != "shared scale"]

    def pasted_diagnoses(self, verdicts: Iterable[str]) -> list[dict[str, Any]]:
        """Rows of the diagnosis with YAML, those with one of these verdicts; none whose code is going to be changed."""
        changed = {
            name for row in self.rows("model_check_result") for name in row["names"] if row["kind"] == "shared scale"
        }
        rows = (row for row in self.rows("diagnosis") if row["yaml"] and row["verdict"] in verdicts)
        return [row for row in rows if row["point"] not in changed]

    def blames_training_images(self) -> bool:
        """Whether the pipeline check says that 255 divides the images in one pipeline and not in the other."""
        found = self.content("pipeline_check")
        cause = str(found["cause"])
        asked = "model input (train), model.0" in cause and "scaled by 255" in cause
        return found["verdict"] == "pipeline misaligned" and asked


DIVISION = {"training_images": "shares"}
"""What the model is given where :meth:`Reports.blames_training_images`."""


def rules(rows: Iterable[dict[str, Any]]) -> list[Rule]:
    """The overrides that rows of a report print, in their order, each once."""
    found: list[Rule] = []
    for row in rows:
        found += [rule for rule in yaml.safe_load(row["yaml"])["overrides"] if rule not in found]
    return found
