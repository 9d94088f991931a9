"""The rungs of the pipeline check are named once."""

from __future__ import annotations

import re
from pathlib import Path

import lightning_qat
from lightning_qat.analysis.ladder.rungs import RUNG_NAMES
from lightning_qat.callbacks.pipeline_check import PipelineCheck

README = Path(lightning_qat.__file__).parent / "reporting" / "README.md"


def test_readme_names_the_rungs_as_the_results_do() -> None:
    rows = re.findall(r"^\| (\d) \| `([^`]+)` \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert {int(number): name for number, name in rows} == RUNG_NAMES


def test_docstring_of_the_callback_lists_every_rung() -> None:
    text = " ".join((PipelineCheck.__doc__ or "").split())
    assert re.findall(r"- (\d): [a-zA-Z]", text) == [str(number) for number in RUNG_NAMES]
