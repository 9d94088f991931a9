"""Names are data: whatever a name is made of, every rendering shows it, and nothing obeys it.

The siblings: names of points, regions, metrics, columns, runs and types; in tables, titles, notes, advice and YAML; on
the terminal, in txt, csv, json, Markdown, tags, figures and the names of files.
"""

from __future__ import annotations

import csv
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.markdown import Markdown

from lightning_qat.analysis.diagnosis.diagnosis_result import DiagnosisResult
from lightning_qat.analysis.diagnosis.remedy import override
from lightning_qat.analysis.model_check.finding import overrides_yaml
from lightning_qat.analysis.results import Advice, Block, Result
from lightning_qat.analysis.runs.accuracy import AccuracyResult, ResultTable
from lightning_qat.analysis.sensitivity.sensitivity_result import SensitivityResult, SensitivityRow
from lightning_qat.quantization.overrides import glob_covers, yaml_name
from lightning_qat.quantization.planning.target_paths import with_target_path
from lightning_qat.reporting.accuracy_table_files import write_accuracy
from lightning_qat.reporting.console import console_text, print_advice, print_note, print_text
from lightning_qat.reporting.files import write_result
from lightning_qat.reporting.growing_table import GrowingTable
from lightning_qat.reporting.plain_text import file_name, literal, one_line, printable
from lightning_qat.reporting.reports import markdown_report, text_report
from lightning_qat.reporting.tables import escape_markdown
from lightning_qat.reporting.tensorboard_tags import sensitivity_tags

HOSTILE = {
    "markup": "[bold]x[/bold]",
    "closing markup": "[/red]",
    "link": "[link=file:///etc/passwd]x[/link]",
    "emoji code": "conv:bug:x",
    "mathematics": "$x_1$ \\frac{",
    "html": "<script>alert(1)</script>",
    "table": "a|b||c",
    "escape code": "a\x1b[2J\x1b[31mb",
    "title of the terminal": "\x1b]0;owned\x07",
    "eight-bit control": "a\x9b31mb",
    "bell and backspace": "a\x07\x08\x08b",
    "null": "a\x00b",
    "carriage return": "a\rb",
    "both returns": "a\r\nb",
    "line": "a\nb",
    "vertical": "a\x0b\x0cb",
    "separators": "a\x1c\x1d\x1eb",
    "next line": "a\x85b",
    "line separator": "a\u2028b\u2029c",
    "right to left": "a\u202etxt.exe",
    "isolate": "\u2066a\u2069",
    "invisible": "a\u200b\ufeff\u00adb",
    "tag letters": "a\U000e0041b",
    "half a character": "a\ud800b",
    "comma and quote": 'a,"b"\'c',
    "formula": "=1+1",
    "letters": "漢字_ü_क्\u200dष",
    "long": "block." * 60,
    "blank": "",
    "parent": "../../x",
}
"""By what they try."""
NAMES = pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE.keys())
ANY = st.text(st.characters(), max_size=12)


def is_harmless(text: str) -> bool:
    """Whether a terminal obeys nothing in it, and shows all of it, in this order."""
    joiners = "\u200c\u200d"
    return all(c in "\n" + joiners or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in text)


def sensitivity_of(name: str) -> SensitivityResult:
    rows = tuple(
        SensitivityRow(name, "weight", name, 0.5, name, f"{name}.weight{n}", 1.0 + n, True, region=name) for n in (0, 1)
    )
    return SensitivityResult(rows, metric=name or "MSE", output=f"output {name!s}", points=3, left_out=(name,))


def accuracy_of(name: str) -> AccuracyResult:
    table = ResultTable()
    for stage, value in (("float", 0.9), ("calibrated", 0.8), ("QAT", 0.85)):
        table.record(name, stage, {name: value, "acc": value})
    return table.result(name, table.metrics(), "1%")


class Advised(Result[Any]):
    """A result with everything a block may have."""

    def __init__(self, name: str) -> None:
        super().__init__(())
        object.__setattr__(self, "name", name)

    def blocks(self) -> tuple[Block, ...]:
        name: str = self.name  # type: ignore[attr-defined]
        yaml = f'overrides:\n  - {{match: "{name}"}}'
        advice = Advice(name, "warning", f"{name} is {name}.", (name, "b"), (("why", name), (name, "x")), yaml)
        return (
            Block(name, (name, "b"), ((name, 1), ("x", 2)), name, (advice,)),
            Block(name, note=name, advice=(advice,)),
        )

    full_blocks = blocks


RESULTS = (sensitivity_of, accuracy_of, Advised)


@NAMES
@pytest.mark.parametrize("of", RESULTS)
def test_terminal_and_text_obey_nothing(of: Any, name: str) -> None:
    result = of(name)
    for text in (console_text(result, 200, file=f"logs/{name}/x.txt"), text_report(result, 3)):
        assert is_harmless(text), text
    shown = one_line(name).strip()
    assert shown in text_report(result)
    flat = "".join(console_text(result, 200).split())
    assert "".join(shown[:20].split()) in flat  # long names fold


@NAMES
def test_sentences_and_notes_obey_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The list of what to do, notes and paths; what rich might make a link, an emoji or a colour of stays."""
    print_advice([f"1. {name}: clipping.", f"     - {name}"])
    print_text(name)
    print_note(name)
    text = capsys.readouterr().out
    assert is_harmless(text)
    shown = printable(name)
    assert "".join(text.split()).count("".join(shown.split())) == 4 or not shown.strip()


@NAMES
@pytest.mark.parametrize("of", [sensitivity_of, accuracy_of])
def test_csv_has_a_row_for_each_row_and_holds_the_name_exactly(tmp_path: Path, of: Any, name: str) -> None:
    """For Python's reader, and for whoever splits the text at line breaks."""
    result = of(name)
    path = write_result(result, tmp_path, "t", formats=("csv",))[0]
    table = GrowingTable(tmp_path / "grows.csv")
    for epoch in (0, 1):
        table.write(result, epoch)
    GrowingTable(tmp_path / "grows.csv").write(result, 1)  # reads it back
    for place, times in ((path, 1), (table.path, 2)):
        with open(place, newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        assert len(rows) == times * len(result.rows)
        assert {len(row) for row in rows} == {len(header)}
        expected = [row[column] for row in result.to_dicts() for column in result.columns()]
        names = [cell for cell in expected if isinstance(cell, str)]
        escaped = [cell.replace("\0", r"\x00") for cell in names]
        on_disk = [cell.encode("utf-8", "backslashreplace").decode() for cell in escaped] * times
        found = [cell for row in rows for cell in row if cell in on_disk and cell]
        assert found == [cell for cell in on_disk if cell]
        text = place.read_bytes().decode()
        *_, last = csv.reader(text.splitlines())
        assert len(last) == len(header)
        assert len(list(csv.reader(text.splitlines()))) == len(rows) + 1


@NAMES
def test_json_holds_the_name_exactly(tmp_path: Path, name: str) -> None:
    path = write_result(sensitivity_of(name), tmp_path, "t", formats=("json",))[0]
    data = json.loads(path.read_text())
    assert [row["point"] for row in data["rows"]] == [f"{name}.weight0", f"{name}.weight1"]
    assert data["left_out"] == [name]


@NAMES
@pytest.mark.parametrize("of", RESULTS)
def test_markdown_shows_the_name_and_has_no_more_cells_for_it(tmp_path: Path, of: Any, name: str) -> None:
    """TensorBoard, and result_table.md."""
    report = markdown_report(of(name).full_blocks())
    assert is_harmless(report)
    parsed = Markdown(escape_markdown(name)).parsed
    content = "".join(child.content for token in parsed for child in token.children or ())
    assert content == one_line(name).strip()
    result = accuracy_of(name)
    write_accuracy(result, tmp_path / "t", "note")
    lines = (tmp_path / "t.md").read_text().split("\n\n")[0].splitlines()
    assert {line.replace("\\|", "").count("|") for line in lines} == {len(result.columns()) + 1}


@NAMES
def test_tags_are_one_line_of_text(name: str) -> None:
    numbers = sensitivity_tags("MSE").numbers(
        SensitivityResult((SensitivityRow(name, "weight", "linear", 0.5, "int8", name, 0.7, True, region=name),))
    )
    assert len(numbers) == 2
    for tag in numbers:
        assert is_harmless(tag)
        assert "\n" not in tag
        tag.encode()


@NAMES
@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
def test_figures_draw_the_name(name: str, tmp_path: Path) -> None:
    """A glyph that the font lacks is a box; nothing else may go wrong."""
    pytest.importorskip("matplotlib")
    from lightning_qat.reporting.sensitivity_figures import sensitivity_bars, sensitivity_over_epochs, write_figure

    result = sensitivity_of(name)
    for number, figure in enumerate((sensitivity_bars(result), sensitivity_over_epochs({0: result, 1: result}))):
        texts = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert all(is_harmless(text) and "\n" not in text for text in texts)
        assert write_figure(figure, tmp_path / f"{number}.png").stat().st_size > 1000


@NAMES
def test_file_names_fit_every_file_system(name: str, tmp_path: Path) -> None:
    """257 characters were too long; 50 foreign letters are as many bytes."""
    for whole in (name, name * 40, f"{name}{'漢' * 300}", f"values_{name}.output"):
        found = file_name(whole)
        assert len(found.encode()) <= 200
        (tmp_path / f"{found}.png").write_text("x")
        assert (tmp_path / f"{found}.png").resolve().parent == tmp_path.resolve()
    assert file_name("a." * 200 + "x") != file_name("a." * 200 + "y")
    assert file_name("layers.0.conv1.weight") == "layers.0.conv1.weight"


@given(ANY)
@settings(max_examples=300, deadline=None)
def test_any_text_becomes_harmless_and_stays_if_it_was(text: str) -> None:
    found = printable(text)
    assert is_harmless(found.replace("\t", ""))
    assert literal(text).plain == found
    assert printable(found) == found
    assert is_harmless(one_line(text))
    assert "\n" not in one_line(text)
    if text.isprintable():
        assert found == text == one_line(text)


@given(st.lists(ANY, min_size=2, max_size=3), ANY)
@settings(max_examples=100, deadline=None)
def test_any_names_make_whole_reports(names: list[str], column: str) -> None:
    """Of any names in any place; widths and rows as for other names."""
    rows = tuple(tuple(names) for _ in range(2))
    block = Block(column, tuple(f"{column}{n}" for n in range(len(names))), rows, column)

    class One(Result[Any]):
        def blocks(self) -> tuple[Block, ...]:
            return (block,)

        full_blocks = blocks

    for text in (console_text(One(()), 100), text_report(One(())), markdown_report([block])):
        assert is_harmless(text.replace("\t", ""))


@NAMES
def test_diagnosis_lines_stay_lines(name: str) -> None:
    """What to do is a list of sentences, and YAML whose lines begin with blanks."""
    lines = DiagnosisResult((), remark=name).lines()
    print_advice(lines)
    assert all(is_harmless(printable(line)) for line in lines)


@NAMES
def test_yaml_to_paste_names_exactly_this_point_after_it_was_shown(name: str) -> None:
    """Remedies and findings; with the path of a target in front; as copied from a terminal or a txt file."""
    point = f"{name}.weight"
    remedy = override(point, True, dtype="int16")
    for text, expected in (
        (remedy, point),
        (overrides_yaml([f"match: {yaml_name(point)}, weight: {{dtype: int16}}"]), point),
        (with_target_path(remedy, name), f"{name}.{point}" if name else point),
        (with_target_path("overrides:\n  - {match: 'x', weight: {}}", "a\"b'c"), "a\"b'c.x"),
    ):
        (rule,) = yaml.safe_load(printable(text))["overrides"]
        assert rule["match"] == expected
    assert glob_covers(point, point)
