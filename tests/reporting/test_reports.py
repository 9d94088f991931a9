"""One model check, three renderings that agree (A1)."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from rich.markdown import Markdown
from rich.text import Text
from torch import Tensor, nn

from lightning_qat.analysis.model_check.findings import Finding
from lightning_qat.analysis.model_check.model_check import check
from lightning_qat.analysis.model_check.model_check_result import ModelCheckResult, Section
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.planning.hardware_profile_files import hardware_profile
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.reporting import files
from lightning_qat.reporting.advice import TerminalAdvice
from lightning_qat.reporting.console import console_text
from lightning_qat.reporting.files import write_result
from lightning_qat.reporting.model_check_file import read_model_check
from lightning_qat.reporting.reports import markdown_report, text_report

LONG = "map_head.sparse_head.decoder.gen_sineembed_for_position@7.div.mul_31[0].output"
CONVS = tuple(f"view_transformation.input_proj.{i}.0" for i in range(40))
RULE = f'overrides:\n  - {{match: "{CONVS[0]}", activation: {{dtype: float32}}}}'
FINDINGS = (
    Finding(
        "error",
        "wide integer output",
        (CONVS[0],),
        f"{CONVS[0]} leaves as int32.",
        "W0.",
        "Do 0.",
        requirement="A10",
        yaml=RULE,
    ),
    Finding(
        "warning",
        "unfused",
        CONVS,
        "40 convs do not fuse.",
        "Why [bold]1[/bold].",
        "Do 1.",
        "bev.py:88",
        requirement="A2",
    ),
    Finding(
        "warning", "called twice", (LONG, "b"), "It is called 8 times.", "W2.", "Do 2.", region="map", requirement="A4"
    ),
    *(
        Finding("info", f"info {i}", (f"op{i}",), f"Fact {i}.", f"W{3 + i}.", f"Do {3 + i}.", requirement="A11")
        for i in range(6)
    ),
)
SECTIONS = (
    Section("Fusable modules are listed below:", ("name", "type"), tuple((c, "Conv2d") for c in CONVS), "A2", "cause"),
    Section("", ("name", "type"), ((LONG, "mul"), ("add_0", "add")), "A2"),
    Section("input dtype statistics:", ("module type", "float32", "int8"), (("Conv2d", 0, 40), ("total", 3, 41)), "A7"),
    Section("called times:", ("name", "scale"), (("a", 0.0446799), ("b", None)), "A5", region="map"),
    Section("ranges:", ("name",), (), "A5", "There are no ranges before calibration."),
)
RESULT = ModelCheckResult(FINDINGS, SECTIONS)


def words(text: str) -> str:
    return " ".join(text.split())


def rendered_markdown(text: str) -> str:
    """What a reader of the Markdown sees, by an independent parser (markdown-it)."""
    return "\n".join(
        token.content if token.type == "fence" else "".join(child.content for child in token.children or ())
        for token in Markdown(text).parsed
    )


def unshortened(result: ModelCheckResult, width: int) -> str:
    """What the terminal shows where nothing is left out."""
    (block,) = result.blocks()
    console = Console(file=StringIO(), width=width, color_system=None, force_terminal=False)
    console.print(Text(block.title), TerminalAdvice(block.advice, limit=99, infos=9), sep="\n", crop=False)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_renderings_hold_the_same_findings() -> None:
    """A1: counts, and of each finding what, why and what to do, in the same order."""
    views = {
        "txt": text_report(RESULT),
        "markdown": rendered_markdown(markdown_report(RESULT.full_blocks(), rows=100)),
        "terminal": unshortened(RESULT, 300),
    }
    for name, view in views.items():
        text, place = words(view), 0
        assert text.startswith("Model check: 1 error, 2 warnings, 6 infos"), name
        for finding in FINDINGS:
            place = text.index(f"{finding.severity}: {finding.kind} ({finding.requirement})", place)
            for part in (finding.what, finding.location, finding.why, finding.action):
                place = text.index(part, place)
            assert words(finding.yaml) in text
            assert all(n in text for n in finding.names), name


def test_text_and_markdown_hold_the_same_numbers() -> None:
    """A7: the tables."""
    text, seen = text_report(RESULT), words(rendered_markdown(markdown_report(RESULT.full_blocks(), rows=100)))
    lines = [line.split() for line in text.splitlines()]
    for section in SECTIONS:
        for row in section.rows:
            cells = [f"{v:.7g}" if isinstance(v, float) else str(v) for v in row if v is not None]
            assert cells in lines
            assert " ".join(cells).replace("0.0446799", "0.04468") in seen  # Markdown is shorter
    titles = ["Fusable", "input dtype", "called times in map:", "ranges:"]
    assert sorted(titles, key=text.index) == titles
    assert "There are no ranges before calibration." in text


def test_text_cuts_no_name_and_keeps_the_yaml_ready_to_paste() -> None:
    text = text_report(RESULT)
    assert text.index("info 5") < text.index("Fusable modules")  # findings first
    for name in (*CONVS, LONG):
        assert name in text
    block = re.search(r"^    overrides:\n(      .*\n)+", text, flags=re.M)
    assert block is not None
    assert yaml.safe_load(block.group()) == yaml.safe_load(RULE)


def test_json_reads_back_equal(tmp_path: Path) -> None:
    """A1: JSON with the same content."""
    text, data = write_result(RESULT, tmp_path, "model_check_result", formats=("txt", "json"))
    assert read_model_check(data) == RESULT
    assert text.read_text() == text_report(RESULT)
    assert json.loads(data.read_text())["rows"][0]["yaml"] == RULE
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ConfigurationError, match="is not the JSON file of a model check"):
        read_model_check(tmp_path / "other.json")


@pytest.mark.parametrize("width", [80, 120])
def test_summary_can_be_read_at_usual_widths(width: int) -> None:
    text = console_text(RESULT, width, "logs/model_check_result.txt")
    too_wide = [line for line in text.splitlines() if len(line) > width]
    assert all("match:" in line for line in too_wide)  # YAML stays whole, to be copied
    assert RULE.splitlines()[1].strip() in text
    assert "…" not in text
    assert LONG in "".join(text.split())  # folded, not cut
    assert "Why [bold]1[/bold]." in words(text)  # names and sentences are no markup
    assert "and 34 more, in the file" in text
    assert "Fact 2." in text
    assert "Fact 3." not in text
    assert "and 3 more, in the file (severity info)" in text
    assert words(text).endswith("logs/model_check_result.txt")


def test_long_yaml_is_shortened_on_the_terminal_only() -> None:
    rules = "overrides:\n" + "\n".join(f"  - {{match: {name}}}" for name in CONVS)
    result = ModelCheckResult((replace(FINDINGS[0], yaml=rules),))
    shown = console_text(result, 120)
    assert CONVS[5] in shown
    assert CONVS[6] not in shown
    assert "# and 34 more" in shown
    assert CONVS[39] in text_report(result)
    one_more = ModelCheckResult((replace(FINDINGS[0], yaml="\n".join(rules.splitlines()[:8])),))
    assert "more" not in console_text(one_more, 120)  # a line that says so would be as long


def test_markdown_of_a_large_check_is_short_and_names_the_file() -> None:
    """A1: TensorBoard text; long sections are truncated with a pointer to the file."""
    text = markdown_report(RESULT.full_blocks(), rows=5, file="model_check_result.txt")
    assert CONVS[4].replace("_", "\\_") in text
    assert CONVS[5].replace("_", "\\_") not in text
    assert CONVS[4] in text  # the rows of a table, which are not escaped
    assert CONVS[5] not in text
    assert rendered_markdown(text).count("35 more rows in model_check_result.txt") == 1
    assert rendered_markdown(text).count("35 more names in model_check_result.txt") == 1


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated:DeprecationWarning")
@pytest.mark.parametrize("text", ["<script>", "a|b", "__init__", "*x*", "$x$", "~~x~~", "`c`", "a & b", "[a](b)"])
def test_tensorboard_shows_names_as_they_are(text: str) -> None:
    from html import unescape

    from tensorboard.plugin_util import markdown_to_safe_html

    report = markdown_report(ModelCheckResult((replace(FINDINGS[0], what=text),)).full_blocks())
    assert f"<p>{text}</p>" in unescape(markdown_to_safe_html(report))


def test_check_without_findings_says_so() -> None:
    empty = ModelCheckResult(())
    assert text_report(empty) == "Model check: 0 errors, 0 warnings, 0 infos\n"
    assert console_text(empty, 80).strip() == "Model check: 0 errors, 0 warnings, 0 infos"


class Shared(nn.Module):
    """Has something for most tables: a shared module, an unfused add, an op without a quantized form."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        h = torch.cat([y + 1.0, y * 2.0]).mean((2, 3))
        h = torch.special.i0(self.fc(self.fc(h)))
        out: Tensor = torch.sigmoid(h)
        return out


def test_readme_documents_every_table_and_column() -> None:
    """Foundation: documented column by column."""
    region = insert(Shared(), (torch.randn(2, 3, 4, 4),))
    calibrate(region, [torch.randn(2, 3, 4, 4)])
    result = check(region, profile=hardware_profile("generic_int8_int16"))
    readme = (Path(files.__file__).parent / "README.md").read_text()
    text = readme.split("## `model_check_result.txt|json`")[1].split("\n## ")[0]
    for section in result.sections:
        title = section.title.removesuffix(":")
        if title.startswith("Violations"):
            title = "Violations of profile"
        line = next(line for line in text.splitlines() if title in line)
        documented = set(re.findall(r"`([^`]+)`", line)) | {"ch_axis", "observer", "Module Name", "Module Type"}
        columns = {"module type"} if "dtype statistics" in title else set(section.columns)  # the others are types
        assert columns <= documented, (title, columns - documented)
    for part in Finding.__dataclass_fields__:
        assert f"`{part}`" in text
