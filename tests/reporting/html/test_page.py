"""The page as a file: what it says is what the files say, names are text, and the security policy fits it."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
import sys
from pathlib import Path

import pytest

from lightning_qat.analysis.open_question import RAISE_POINTS
from lightning_qat.analysis.runs.accuracy import ResultTable
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.reporting import html
from lightning_qat.reporting.console import console_text
from lightning_qat.reporting.files import write_json
from lightning_qat.reporting.html.judged_run import JudgedRun
from lightning_qat.reporting.html.overview import Overview
from lightning_qat.reporting.html.page import SECTIONS, require_jinja, write_report
from lightning_qat.reporting.html.page_data import as_json_element
from lightning_qat.reporting.html.point_table import COLUMNS
from lightning_qat.reporting.html.run_folder import read_run
from lightning_qat.reporting.plain_text import one_line
from lightning_qat.reporting.reports import text_report
from lightning_qat.reporting.tables import cell_text
from tests.harness import run_folder
from tests.harness.parsed_page import ParsedPage
from tests.reporting.test_hostile_names import HOSTILE, is_harmless

EVENTS = re.compile(r"on[a-z]+")


def page_of(run: Path) -> ParsedPage:
    return ParsedPage(write_report([run]).read_text(encoding="utf-8"))


def judged(run: Path) -> Overview:
    return JudgedRun.of(read_run(run)).overview


def full_run(tmp_path: Path, *names: str) -> Path:
    run = run_folder.write_run(tmp_path / "run", names or 12)
    points = list(names) or run_folder.point_names(12)
    run_folder.write_accuracy(run, passed=False)
    run_folder.write_ladder(run, cause=points[0])
    run_folder.write_convergence(run, names=tuple(points[:2]))
    run_folder.write_diagnosis(run, *points[:3])
    run_folder.write_diagnosis(run, points[0], name="calibrated_diagnosis")
    run_folder.write_model_check(run, *points[:3])
    return run


def test_the_policy_allows_exactly_the_one_script_and_the_one_style(tmp_path: Path) -> None:
    page = page_of(full_run(tmp_path))
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for content in (*page.scripts[""], *page.styles):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert len(page.scripts[""]) == len(page.styles) == 1


def test_nothing_on_the_page_needs_another_file_or_an_inline_handler(tmp_path: Path) -> None:
    page = page_of(full_run(tmp_path))
    names = {name for _, attributes in page.elements for name in attributes}
    assert not [name for name in names if EVENTS.fullmatch(name)]
    assert "style" not in names
    assert not page.attributes("src")
    assert all(link.startswith(("#", "data:")) for link in page.attributes("href"))
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page.scripts[""][0])
    assert not re.search(r"\burl\(|@import", page.styles[0])


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_names_are_text_everywhere(tmp_path: Path, name: str) -> None:
    """Names of points, metrics, runs, checks; causes, notes, evidence, YAML, configuration, command line."""
    run = full_run(tmp_path, f"{name}.weight", "fc.output", "fc.weight")
    folder = run / "lightning_qat"
    table = json.loads((folder / "accuracy.json").read_text())
    table |= {"run": name, "note": name, "stages": [name], "own": [], "rows": [
        {"metric": name, "float": 1.0, "target": None, name: 0.5, "passed": None}]}  # fmt: skip
    (folder / "accuracy.json").write_text(json.dumps(table))
    provenance = {"command": ["fit", name, "--config", name], "checkpoint": name, "versions": {name: name}}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    (run / "config.yaml").write_text(f"model: {name}\n", encoding="utf-8", errors="backslashreplace")
    page = page_of(run)
    clean = page_of(full_run(tmp_path / "clean", "x.weight", "fc.output", "fc.weight"))
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in clean.elements} | {"dd", "dt", "p", "ul", "li"}
    assert {n for _, a in page.elements for n in a} <= {n for _, a in clean.elements for n in a}
    assert all(is_harmless(data) for _, data in page.texts)
    assert page.data["points"]["rows"][0][0] == one_line(f"{name}.weight")


def test_a_name_of_500_characters_is_whole(tmp_path: Path) -> None:
    name = "very_long." * 50
    page = page_of(full_run(tmp_path, f"{name}weight", "fc.output", "fc.weight"))
    assert f"{name}weight" in page.text


def test_no_text_ends_the_data_element() -> None:
    hostile = {"a": "</script><script>alert(1)</script>", "b": "<!--", "c": "\u2028\u2029", "d": "\ud800", "e": "&lt;"}
    text = as_json_element(hostile)
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text) == hostile


def test_the_table_of_points_holds_the_numbers_of_the_csv_files(tmp_path: Path) -> None:
    run = full_run(tmp_path)
    columns = [column.key for column in COLUMNS]
    rows = {row[0]: dict(zip(columns, row, strict=True)) for row in page_of(run).data["points"]["rows"]}
    for name, wanted in (
        ("layer_statistics", ("min", "max", "clipped_share", "rounding_energy", "sqnr", "scale_drift", "flip_rate")),
        ("sensitivity", ("score", "standard_error", "flops_share")),
    ):
        with open(run / "lightning_qat" / f"{name}.csv", newline="") as file:
            lines = [line for line in csv.DictReader(file) if line["epoch"] == "2"]
        assert len(lines) == len(rows)
        for line in lines:
            for column in wanted:
                assert rows[line["point"]][column] == float(line[column])


def test_terminal_text_csv_and_page_say_the_same(tmp_path: Path) -> None:
    """One source: the accuracy, the findings of the model check and the diagnosis, cell by cell."""
    run = full_run(tmp_path)
    found = read_run(run)
    page = page_of(run)
    assert found.accuracy is not None
    assert found.model_check is not None
    shown = {data.strip() for _, data in page.texts}
    for row in found.accuracy.to_dicts():
        for value in row.values():
            assert cell_text(value, 4) in shown
            assert cell_text(value, 4) in console_text(found.accuracy, 200)
            assert cell_text(value) in text_report(found.accuracy)
    for result in (found.model_check, found.diagnosis):
        assert result is not None
        terminal = " ".join(console_text(result, 400).split())
        txt = " ".join(text_report(result).split())
        for item in result.to_dicts():
            for part in ("what", "evidence", "action"):
                if part in item:
                    assert item[part] in page.text
                    assert item[part] in terminal
                    assert item[part] in txt
    with open(run / "lightning_qat" / "diagnosis.csv", newline="") as file:
        for line in csv.DictReader(file):
            assert line["evidence"] in page.text
            assert " ".join(line["yaml"].split()) in page.text


def test_a_page_is_replaced_at_once_and_ends_where_it_should(tmp_path: Path) -> None:
    run = full_run(tmp_path)
    first = write_report([run])
    again = write_report([run])
    assert first == again == run / "lightning_qat" / "report.html"
    assert again.read_text().endswith("</html>\n")
    assert not list(first.parent.glob(".lightning_qat*"))


def test_a_missing_jinja_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigurationError, match=r"needs Jinja2: pip install 'lightning-qat\[html\]'"):
        require_jinja()


def test_code_is_code_and_shares_are_percent(tmp_path: Path) -> None:
    run = run_folder.write_run(tmp_path, 3)
    run_folder.write_accuracy(run, passed=True)
    page = page_of(run)
    code = [text for tags, text in page.texts if "code" in tags]
    assert "python -m lightning_qat export train.py --config fit.yaml --ckpt_path best.ckpt" in code
    assert "`" not in page.text
    shares = [row["clipped_share"] for row in read_run(run).statistics.latest.values()]
    assert {f"{100 * float(str(share)):.3g} %" for share in shares} <= {text for _, text in page.texts}


def test_words_of_the_tables_are_explained_where_they_stand(tmp_path: Path) -> None:
    page = page_of(full_run(tmp_path))
    explained = {text for tags, text in page.texts if "abbr" in tags}
    assert {"rung", "rung 2", "breaks", "Own", "scopes"} <= explained
    assert all(attributes.get("title") for tag, attributes in page.elements if tag == "abbr")


def test_every_explained_word_links_to_the_glossary(tmp_path: Path) -> None:
    page = page_of(full_run(tmp_path))
    ids = [a["id"] for _, a in page.elements if a.get("id")]
    assert len(ids) == len(set(ids))
    links = {text: tags for tags, text in page.texts if "abbr" in tags}
    assert all(tags[-1] == "a" for tags in links.values())
    targets = [a["href"] for tag, a in page.elements if tag == "a" and str(a.get("href")).startswith("#term-")]
    assert len(targets) >= len(links) > 4
    assert {str(target)[1:] for target in targets} <= set(ids)
    assert {column["anchor"] for column in page.data["points"]["columns"]} <= set(ids)


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_list_of_sections_leads_to_what_is_there(tmp_path: Path, epochs: int) -> None:
    """Also where no script runs: nothing waits for one to be shown but tools, and a chart says that it needs one."""
    run = run_folder.write_run(tmp_path, 3, epochs=epochs)
    page = page_of(run)
    sections = [a["id"] for tag, a in page.elements if tag == "section"]
    assert [link[1:] for link in page.attributes("href") if link[1:] in SECTIONS] == sections
    assert ("epochs" in sections) == (epochs > 1)
    assert {"depth", "graph"} < set(sections)
    assert {tag for tag, a in page.elements if "hidden" in a} <= {"button", "div"}
    assert page.text.count("This chart needs JavaScript.") == 2 + (epochs > 1)


def test_a_run_without_points_has_no_charts(tmp_path: Path) -> None:
    run = tmp_path / "lightning_qat"
    run.mkdir()
    run_folder.write_convergence(tmp_path)
    assert not {"#depth", "#epochs", "#graph"} & set(page_of(tmp_path).attributes("href"))


COLOURS = re.compile(r"--(\w+): (#[0-9a-f]{6})")


def test_texts_stand_out_from_what_is_behind_them() -> None:
    """WCAG 2.1, 1.4.3: 4.5 to 1, in light and dark, for every colour of a text on page and panel."""
    style = (Path(html.__file__).parent / "assets" / "report.css").read_text()
    light, dark, by_system = (dict(COLOURS.findall(part)) for part in re.split(r"\n\s+color-scheme:", style)[:3])
    assert dark == by_system

    def luminance(colour: str) -> float:
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for theme in (light, dark):
        for text in ("text", "soft", "link", "good", "bad", "warning", "unknown", "info"):
            for behind in ("page", "panel"):
                high, low = sorted((luminance(theme[text]), luminance(theme[behind])), reverse=True)
                assert (high + 0.05) / (low + 0.05) >= 4.5, (text, behind)


def test_the_result_table_is_there_only_beside_other_runs(tmp_path: Path) -> None:
    """The first screen has the stages of the run itself. A run that has none of its metrics is not beside it."""
    run = full_run(tmp_path)
    assert "#results" not in page_of(run).attributes("href")
    table = ResultTable()
    table.record("test", "QAT", {"test_acc": 0.7})
    table.record("run", "QAT", {"val_acc": 0.8})
    write_json(table.result("run", ["val_acc"], "1%"), run / "lightning_qat" / "accuracy.json")
    assert "#results" not in page_of(run).attributes("href")
    for name in ("earlier", "run"):
        table.record(name, "float", {"val_acc": 0.9})
        table.record(name, "QAT", {"val_acc": 0.8 if name == "run" else 0.7})
    write_json(table.result("run", ["val_acc"], "1%"), run / "lightning_qat" / "accuracy.json")
    page = page_of(run)
    assert "#results" in page.attributes("href")
    assert {"earlier QAT", "run QAT", "0.7"} <= {text for _, text in page.texts}
    assert "test QAT" not in page.text


def test_a_check_that_decides_is_not_repeated_below_the_first_screen(tmp_path: Path) -> None:
    run = full_run(tmp_path)
    said = judged(run).sentence
    assert said
    assert page_of(run).text.count(said) == 1


@pytest.mark.parametrize(
    ("command", "place"),
    [
        (["python", "fit.py", "fit", "--config", "a.yaml", "-c=b.yaml"], "in a.yaml or b.yaml, behind"),
        (["python", "/home/me/fit.py"], "QuantizationAwareTraining(overrides=[...]) in fit.py, behind"),
        (["pytest"], "in the configuration, behind"),
        (None, "in the configuration, behind"),
    ],
)
def test_the_page_says_where_overrides_go(tmp_path: Path, command: list[str] | None, place: str) -> None:
    run = full_run(tmp_path)
    (run / "lightning_qat" / "provenance.json").write_text(json.dumps({"command": command}))
    page = page_of(run)
    assert place in page.text
    assert place in page.data["place"]


def test_the_page_says_which_run_it_is_about_and_on_how_many_samples(tmp_path: Path) -> None:
    """A run may be called "broken" or "good": its name is not read as what the page says about it."""
    run = full_run(tmp_path)
    text = page_of(run).text
    assert "Accuracy of run run on 4321 samples" in text
    assert f"Quantization report of run {read_run(run).name}" in text
    path = run / "lightning_qat" / "accuracy.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "samples"}))
    assert "samples" not in page_of(run).text.partition("Accuracy of run run")[2].partition("Findings")[0]


def test_no_table_advises_beside_the_first_screen(tmp_path: Path) -> None:
    run = full_run(tmp_path)
    accuracy = read_run(run).accuracy
    assert accuracy is not None
    assert RAISE_POINTS in accuracy.note
    text = page_of(run).text
    assert accuracy.finding in text
    assert RAISE_POINTS not in text
