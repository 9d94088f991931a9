"""Tables as text, Markdown and on the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from html.parser import HTMLParser
from io import StringIO
from typing import ClassVar

import pytest
from rich.console import Console

from lightning_qat.analysis.results import Result
from lightning_qat.reporting.console import console_text
from lightning_qat.reporting.tables import escape_markdown, fixed_width, markdown, panel, terminal_tables

LONG = "decoder.layers.11.cross_attention.sine_embed@12.gen_sineembed_for_position.div.mul_31.output"


@dataclass(frozen=True)
class Row:
    point: str
    dtype: str
    scale: float | None
    count: int


@dataclass(frozen=True)
class Table(Result[Row]):
    title: ClassVar[str] = "Points"


TABLE = Table((Row(LONG, "int8", 0.2642754, 3), Row("a|b_c*.weight", "int16", None, 123456)))


def test_text_is_as_wide_as_it_needs_to_be_and_cuts_no_name() -> None:
    """E: the txt files."""
    lines = fixed_width(TABLE.columns(), TABLE.to_dicts(), title="Points").splitlines()
    assert lines[0] == "Points"
    assert LONG in lines[3]
    assert lines[3].split() == [LONG, "int8", "0.2642754", "3"]
    assert lines[4].split() == ["a|b_c*.weight", "int16", "123456"]
    assert lines[3].index("int8") == lines[4].index("int16") == lines[1].index("dtype")
    assert len(lines[3]) == len(lines[4]) == len(lines[2])  # numbers end in the same column


def test_text_without_rows_has_its_header() -> None:
    assert fixed_width(["point", "MSE"], []).splitlines() == ["point MSE", "---------"]


def test_cells_stay_on_one_line() -> None:
    assert "a b" in fixed_width(["x"], [{"x": "a\nb"}])
    assert len(markdown(["x"], [{"x": "a\nb"}]).splitlines()) == 3


SENTENCE = "Calibration saw only -0.17 to 0.9988: give it more, or more representative, batches."
YAML = 'overrides:\n  - {match: "*.add_0.output", activation: {dtype: int16}}'


def tensorboard_text(text: str) -> list[tuple[str, str]]:
    """What TensorBoard makes of Markdown, by its own renderer: the texts and the tags they are in."""
    plugin_util = pytest.importorskip("tensorboard.plugin_util")

    class Parser(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags: list[str] = []
            self.texts: list[tuple[str, str]] = []

        def handle_starttag(self, tag: str, attrs: object) -> None:
            self.tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            while self.tags and self.tags.pop() != tag:
                pass

        def handle_data(self, data: str) -> None:
            if data.strip():
                self.texts.append(("/".join(self.tags), data.strip()))

    parser = Parser()
    parser.feed(plugin_util.markdown_to_safe_html(text))
    return parser.texts


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated:DeprecationWarning")
def test_numbers_and_names_stay_whole_in_tensorboard() -> None:
    """E: TensorBoard breaks the cells of a Markdown table anywhere ("0.00296", "5"); fixed-width text it scrolls."""
    assert tensorboard_text(panel(TABLE.columns(), TABLE.to_dicts())) == [
        ("pre/code", fixed_width(TABLE.columns(), TABLE.to_dicts(), digits=4))
    ]


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated:DeprecationWarning")
def test_rows_with_sentences_are_paragraphs_and_yaml_can_be_copied_in_tensorboard() -> None:
    """E: sentences wrap at words, no name is interpreted, lines of YAML stay lines."""
    rows = [("a*b_c_.output", "clipping", 0.25, SENTENCE, YAML), ("fc", "rounding", None, SENTENCE, "")]
    assert tensorboard_text(panel(("point", "verdict", "score", "action", "yaml"), rows)) == [
        ("p/strong", "a*b_c_.output"),
        ("p", ", verdict: clipping, score: 0.25"),
        ("p", SENTENCE),
        ("pre/code", YAML),
        ("p/strong", "fc"),
        ("p", ", verdict: rounding"),
        ("p", SENTENCE),
    ]


@pytest.mark.parametrize("text", ["a|b", "__init__", "*x*", "<script>", "`c`", "[a](b)", "$x$", "a\\b", "# x", "~~x~~"])
def test_markdown_takes_names_literally(text: str) -> None:
    """E: TensorBoard text."""
    from rich.markdown import Markdown  # an independent parser (markdown-it)

    parsed = "".join(
        child.content for token in Markdown(escape_markdown(text)).parsed for child in token.children or ()
    )
    assert parsed == text
    assert "|" not in escape_markdown(text).replace("\\|", "")


def test_markdown_has_as_many_cells_in_every_line() -> None:
    lines = markdown(TABLE.columns(), TABLE.to_dicts()).splitlines()
    assert {line.replace("\\|", "").count("|") for line in lines} == {5}


@pytest.mark.parametrize("width", [80, 120])
def test_terminal_shows_whole_names_and_numbers_at_usual_widths(width: int) -> None:
    """E: rich tables; names fold, nothing is replaced by dots."""
    text = console_text(TABLE, width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    first_words = [words[0] for line in text.splitlines() if (words := line.strip(" │|").split())]
    assert "".join(word for word in first_words if word in LONG) == LONG
    assert "0.2643" in text
    assert "123456" in text


def numbers_of(text: str) -> list[list[str]]:
    """The words behind the names of the rows, table by table."""
    return [line.split()[1:] for line in text.splitlines() if line.split()[:1] in (["first"], ["second"])]


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("metrics", [1, 4, 5, 6, 12])
def test_every_column_is_on_the_terminal_whatever_the_number_and_length_of_the_headings(
    width: int, metrics: int
) -> None:
    """Metrics with long names took the whole width, and the column that says what a row is was gone.

    Headings fold as entries do, and what has no room follows below, again with the first column.
    """
    names = [f"val/accuracy_of_class_{number}/dataloader_idx_1" for number in range(metrics)]
    rows = [(stage, *(0.1234 + i for i in range(metrics)), "chosen") for stage in ("first", "second")]
    rows.append(("narrow calibrated", *([0.5] * metrics), ""))
    with StringIO() as file:
        console = Console(file=file, width=width, color_system=None)
        for table in terminal_tables("Stages", ("stage", *names, "what"), rows, width):
            console.print(table)
        text = file.getvalue()
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    found = numbers_of(text)
    for place in (0, 1):  # both rows, in every part
        whole = [word for part in found[place::2] for word in part]
        assert whole == [*(f"{0.1234 + number:.4g}" for number in range(metrics)), "chosen"]
    assert text.count("stage") == len(found) // 2
    assert text.count("Stages") == 1
