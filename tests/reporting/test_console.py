"""What the terminal shows of a result."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from lightning_qat.analysis.ladder.pipeline_result import PipelineResult
from lightning_qat.analysis.ladder.rows import PipelineRow
from lightning_qat.reporting.console import print_advice, show

ROW = PipelineRow(0, "float model", "val_acc", 0.98, 0.1, 0.03, "breaks")
NOTE = "pipeline misaligned (rung 0, float model): the model [x] does not reproduce its own accuracy here."


def shown(result: PipelineResult, note: bool, color: bool = False) -> str:
    console = Console(file=StringIO(), width=80, color_system="standard" if color else None, force_terminal=color)
    show(result, console, note=note, file="logs/pipeline_check.txt")
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_verdict_stands_below_the_table_also_if_the_note_is_a_warning() -> None:
    """C6: whoever filters warnings, or sends them elsewhere, still sees the verdict."""
    result = PipelineResult((ROW,), "pipeline misaligned", NOTE)
    *_, verdict, file = shown(result, note=False).rstrip().splitlines()
    assert verdict == "pipeline misaligned (rung 0, float model)"
    assert file == "Everything: logs/pipeline_check.txt"
    assert NOTE in " ".join(shown(result, note=True).split())


@pytest.mark.parametrize(
    ("verdict", "code"), [("pipeline misaligned", "1;31"), ("healthy", "1;32"), ("cannot tell", "1;33")]
)
def test_only_the_verdict_is_coloured(verdict: str, code: str) -> None:
    result = PipelineResult((), verdict, f"{verdict}: because.")  # type: ignore[arg-type]
    assert f"\x1b[{code}m{verdict}\x1b[0m: because." in shown(result, note=True, color=True)


def test_advice_wraps_at_words_and_yaml_stays_whole() -> None:
    """B4: the list of what to do; what is pasted from the terminal has no line break in it."""
    sentence = "1. a.output: clipping. Relative error 23 % at int8; 99.7 % of its energy is clipping, of 0.53 % of all."
    code = '     - {match: "vit.layers.1.intermediate.activation_fn.output", activation: {fixed_scale: 2.41/127}}'
    console = Console(file=StringIO(), width=60)
    print_advice((sentence, code), console)
    assert isinstance(console.file, StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines[-1] == code
    assert " ".join(" ".join(lines[:-1]).split()) == sentence
    assert all(len(line) <= 60 for line in lines[:-1])
