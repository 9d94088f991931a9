"""The page in a real browser: nothing is loaded, nothing complains, and everything that can be used works."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_qat.analysis.statistics.statistics import LayerStatisticsResult
from lightning_qat.reporting.files import write_csv
from lightning_qat.reporting.growing_table import GrowingTable
from lightning_qat.reporting.html.page import write_report
from lightning_qat.reporting.plain_text import one_line
from lightning_qat.reporting.tables import cell_text
from tests.harness import chromium, run_folder
from tests.harness.chromium import Chromium, Page
from tests.reporting.html.test_page import full_run
from tests.reporting.test_hostile_names import HOSTILE

pytestmark = pytest.mark.skipif(chromium.EXECUTABLE is None, reason=chromium.MISSING)
NAMES = "[...document.querySelectorAll('#grid tbody a')].map((a) => a.textContent)"
COLUMN = "[...document.querySelectorAll('#grid tbody tr:not(.spacer) td:nth-child({})')].map((c) => c.textContent)"
TYPE = """(() => {{ const field = document.querySelector('#tools input');
field.value = {}; field.dispatchEvent(new Event('input')); }})()"""

INJECTED = """document.body.insertAdjacentHTML('beforeend', `<img src=x onerror="window.hacked = 1">
<a id=bad href="javascript:window.hacked = 1" onclick="window.hacked = 1">x</a>`);
document.getElementById('bad').click();
const script = document.createElement('script');
script.textContent = 'window.hacked = 1';
document.body.append(script);"""

Opened = Callable[..., Page]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([full_run(tmp_path_factory.mktemp("run"))])


@pytest.fixture
def opened(browser: Chromium) -> Iterator[Opened]:
    pages: list[Page] = []

    def open_page(path: Path, anchor: str = "", **options: Any) -> Page:
        pages.append(browser.page(**options))
        pages[-1].open(path, anchor)
        return pages[-1]

    yield open_page
    for page in pages:
        page.close()


def test_page_loads_without_a_request_or_a_complaint(opened: Opened, report: Path) -> None:
    page = opened(report)
    assert page.complaints == []
    assert page.requests == [report.as_uri()]


def test_sorting_filtering_and_columns_are_in_the_url(opened: Opened, report: Path) -> None:
    page = opened(report)
    page.click("#grid th:nth-child(4) button")
    clipped = page.run(COLUMN.format(4))
    shares = [float(text.removesuffix(" %")) for text in clipped]
    assert shares == sorted(shares, reverse=True)
    assert all(text.endswith(" %") for text in clipped)
    page.run(TYPE.format("'conv1 WEI'"))
    assert page.run(NAMES) == ["stage0.block0.conv1.weight"]
    assert page.run("document.querySelector('#tools .count').textContent") == "1 of 12 points"
    page.run(TYPE.format("''"))
    page.run(
        "(() => { const s = document.querySelector('#tools select'); s.value = 'output';"
        "s.dispatchEvent(new Event('change')); })()"
    )
    page.run("document.querySelector('#tools input[value=max]').click()")
    rows, url = page.run(NAMES), page.run("location.href")
    assert len(rows) == 4
    assert set(dict(part.split("=") for part in url.partition("#")[2].split("&"))) == {"sort", "role", "cols"}
    again = opened(report, "#" + url.partition("#")[2])
    assert again.run(NAMES) == rows
    head = again.run("[...document.querySelectorAll('#grid th')].map((h) => h.textContent)")
    assert "max" in head
    assert again.run("document.querySelector('#grid th[aria-sort=descending]').textContent").startswith("clipped")
    again.click("#tools > button")
    assert len(again.run(NAMES)) == 12
    assert again.run("location.hash") in ("", "#")


def test_a_link_to_a_point_opens_it_and_escape_closes_it(opened: Opened, report: Path) -> None:
    name = "stage0.block0.conv1.output"
    page = opened(report, f"#point={name}&sort=-score")
    assert page.run("document.getElementById('point').open")
    assert page.run("document.getElementById('point-name').textContent") == name
    assert "stage0.block0.conv0" in page.run("document.getElementById('point').textContent")  # its producer
    page.press("Escape")
    page.until("!document.getElementById('point').open")
    page.until("location.hash === '#sort=-score'")
    page.click("#grid tbody a")
    page.until("document.getElementById('point').open")
    page.run("history.back()")
    page.until("!document.getElementById('point').open")
    assert page.complaints == []


def test_the_histogram_of_a_point_names_its_codes_and_what_is_clipped(opened: Opened, tmp_path: Path) -> None:
    """A narrow type: the last bin is not full, and the last code is that of the plan."""
    run = run_folder.write_run(tmp_path, ["a.weight", "a.output"])
    plan = run_folder.plan(["a.weight", "a.output"])
    plan["regions"][""]["points"][0] |= {"quant_min": -127, "scale": 0.5}
    (run / "lightning_qat" / "quant_plan.json").write_text(json.dumps(plan))
    one = {"point": "a.weight", "first_code": -127, "codes_per_bin": 8, "counts": [2] * 32, "below": 0, "above": 7}
    (run / "lightning_qat" / "layer_statistics.json").write_text(json.dumps({"histograms": [one], "rows": []}))
    page = opened(write_report([run]), "#point=a.weight")
    texts = page.run("[...document.querySelectorAll('#point figure svg > text')].map((t) => t.textContent)")
    assert {"code -127", "-63.5", "code 127", "63.5", "7 clipped above"} <= set(texts)
    tips = page.run("[...document.querySelectorAll('#point rect.bar title')].map((t) => t.textContent)")
    assert tips[-1] == "codes 121 to 127: 2 values"
    assert page.run("document.querySelectorAll('#point rect.clipped').length") == 2


def test_the_keyboard_moves_through_the_table_and_opens_points(opened: Opened, report: Path) -> None:
    page = opened(report)
    page.run("document.getElementById('grid').focus()")
    for key in ("ArrowDown", "ArrowDown", "ArrowUp", "Enter"):
        page.press(key)
    assert page.run("document.getElementById('point-name').textContent") == page.run(NAMES)[1]


def test_copying_puts_the_yaml_on_the_clipboard(opened: Opened, report: Path) -> None:
    page = opened(report)
    page.browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.call("Page.bringToFront")
    page.click("#findings .warning button.copy")
    page.until("document.getElementById('said').textContent === 'Copied.'")
    assert page.run("navigator.clipboard.readText()") == page.run(
        "document.querySelector('#findings .warning code').textContent"
    )


def test_colours_follow_the_reader_and_the_button(opened: Opened, report: Path) -> None:
    def background(page: Page) -> int:
        colour: str = page.run("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour.strip("rgb()").split(","))

    light, dark = opened(report), opened(report, dark=True)
    assert background(light) > 600
    assert background(dark) < 150
    dark.click("#theme")
    assert background(dark) > 600


def test_print_has_all_rows_and_no_tools(opened: Opened, tmp_path: Path) -> None:
    page = opened(write_report([run_folder.write_run(tmp_path, 200)]), height=500)
    assert len(page.run(NAMES)) < 100
    page.run("window.dispatchEvent(new Event('beforeprint'))")
    page.emulate(media="print")
    assert len(page.run(NAMES)) == 200
    assert page.run("getComputedStyle(document.getElementById('tools')).display") == "none"
    assert page.run("document.querySelector('#grid table').scrollWidth <= document.getElementById('grid').clientWidth")
    page.run("window.dispatchEvent(new Event('afterprint'))")
    assert len(page.call("Page.printToPDF")["data"]) > 10_000


@pytest.mark.parametrize("width", [1280, 380])
def test_nothing_is_wider_than_the_window(opened: Opened, report: Path, width: int) -> None:
    page = opened(report, width=width)
    assert page.run("document.documentElement.scrollWidth") <= width
    page.run("location.hash = '#point=stage0.block0.conv1.output'")
    page.until("document.getElementById('point').open")
    assert page.run("document.getElementById('point').scrollWidth") <= width


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.full)])
def test_many_points_scroll_with_few_rows_in_the_document(opened: Opened, tmp_path: Path, count: int) -> None:
    page = opened(write_report([run_folder.write_run(tmp_path, count, epochs=1)]))
    assert len(page.run(NAMES)) < 100
    page.run("document.getElementById('grid').scrollTop = 1e9")
    page.until(f"{NAMES}.at(-1) === {json.dumps(run_folder.point_names(count)[-1])}")
    assert len(page.run(NAMES)) < 100
    page.run(TYPE.format("'stage10.block2 weight'"))
    assert len(page.run(NAMES)) == 4
    assert page.complaints == []


def test_hostile_names_are_shown_and_do_nothing(opened: Opened, tmp_path: Path) -> None:
    names = [f"{name}.{number}.weight" for number, name in enumerate(HOSTILE.values())]
    page = opened(write_report([full_run(tmp_path, *names)]), height=2000)
    assert page.run(NAMES) == [one_line(name) for name in names]
    page.run("document.querySelectorAll('#scope-tree details').forEach((d) => { d.open = true; })")
    page.run("document.querySelectorAll('#grid tbody a')[5].click()")
    assert page.run("document.getElementById('point-name').textContent") == one_line(names[5])
    assert page.run("document.querySelectorAll('script').length") == 2
    assert page.complaints == []
    assert len(page.requests) == 1


def test_a_dot_of_the_front_opens_its_overrides(opened: Opened, tmp_path: Path) -> None:
    run = run_folder.write_run(tmp_path, 3)
    rows = [{"raised": n, "cost": 1 + n / 60, "sqnr": 20.0 + n} for n in range(60)]
    overrides = [[{"match": f"point{i}", "activation": {"dtype": "int16"}} for i in range(n)] for n in range(60)]
    document = {"cost_name": "bops", "overrides": overrides, "rows": rows}
    (run / "lightning_qat" / "front.json").write_text(json.dumps(document))
    page = opened(write_report([run]))
    page.run("document.querySelectorAll('#front-chart .dot')[28].dispatchEvent(new Event('click'))")
    raised = page.run("[...document.querySelectorAll('.choice[open]')].map((c) => Number(c.dataset.raised))")
    assert len(raised) == 1
    assert abs(raised[0] - 28) <= 2
    assert page.run("document.querySelector('.choice[open] code').textContent").count("match") == raised[0]
    assert page.complaints == []


def test_the_policy_stops_what_would_be_injected(opened: Opened, report: Path) -> None:
    page = opened(report)
    page.run(INJECTED)
    page.until("document.querySelector('img').complete")
    assert page.run("window.hacked") is None
    assert page.complaints  # of the policy: this test would see one


def test_numbers_are_written_as_on_the_terminal_and_missing_ones_come_last(opened: Opened, tmp_path: Path) -> None:
    """The same four digits, ties included, as ``cell_text`` has for every other rendering."""
    numbers = [0.0, -0.0, 1.0, 0.71875, 0.90625, 2.5e-5, 1e22, -123456.0, 0.00012345, 9999.5, 99995.0, 1024.5, 1025.5,
               12345.0, 1 / 3, 5e-324, 1.7e308, float("inf"), -float("inf"), float("nan"), None]  # fmt: skip
    draw = random.Random(0)
    numbers += [draw.choice((1, -1)) * draw.randrange(1, 1 << 20) / (1 << draw.randrange(24)) for _ in range(150)]
    run = run_folder.write_run(tmp_path, len(numbers))
    names = run_folder.point_names(len(numbers))
    rows = [
        replace(run_folder.statistics_row(name, draw), max=number) for name, number in zip(names, numbers, strict=True)
    ]
    result = LayerStatisticsResult(tuple(rows))
    (run / "lightning_qat" / "layer_statistics.csv").unlink()
    GrowingTable(run / "lightning_qat" / "layer_statistics.csv").write(result, 0)
    write_csv(result, tmp_path / "statistics.csv")
    page = opened(write_report([run]), "#cols=max", height=9000)
    page.run("document.getElementById('grid').style.maxHeight = 'none'; window.dispatchEvent(new Event('resize'))")
    assert page.run(COLUMN.format(2)) == [cell_text(number, 4) for number in numbers]
    for sort in ("max", "-max"):
        page.run(f"location.hash = '#cols=max&sort={sort}'")
        page.until(f"new URLSearchParams(location.hash.slice(1)).get('sort') === '{sort}'")
        page.until(f"{COLUMN.format(2)}.at(-1) === ''")


def test_no_row_looks_selected_until_the_table_has_the_focus(opened: Opened, report: Path) -> None:
    page = opened(report)
    colour = "getComputedStyle(document.querySelectorAll('#grid tbody tr')[{}].cells[1]).backgroundColor"
    assert page.run(colour.format(0)) == page.run(colour.format(1))


def test_a_word_leads_to_the_glossary_and_the_filter_stays(opened: Opened, report: Path) -> None:
    """Siblings: a link of the list of sections, a column on the page of a point, a page that is opened at a word."""
    page = opened(report, "#q=conv1&sort=-score")
    rows = page.run(NAMES)
    for selector, target in (
        ("#depth abbr a", "term-sqnr"), ("nav a[href='#provenance']", "provenance"), ("h2 abbr a", "term-point")
    ):  # fmt: skip
        page.run(f"document.querySelector({json.dumps(selector)}).click()")
        assert page.run("new URLSearchParams(location.hash.slice(1)).get('at')") == target
        assert page.run("document.querySelector('.pointed').id") == target
        assert page.run(NAMES) == rows
        box = page.run(f"(({{ top, bottom }}) => [top, bottom])({target_of(target)}.getBoundingClientRect())")
        assert 0 <= box[0] < 900
    page.click("#grid tbody a")
    page.until("document.getElementById('point').open")
    page.run("document.querySelector('#point dt a[href*=scale]').click()")
    page.until("!document.getElementById('point').open")
    assert page.run("document.querySelector('.pointed').id") == "term-column-scale"
    again = opened(report, "#q=conv1&at=term-rung")
    assert again.run("document.querySelector('.pointed').textContent") == "rung"
    assert again.run("window.scrollY") > 0
    assert page.complaints == again.complaints == []


def target_of(name: str) -> str:
    return f"document.getElementById({json.dumps(name)})"


def moving_run(tmp_path: Path, *flagged: str, **columns: dict[str, float]) -> Path:
    """Two points whose columns are 0 but for those that are given, by column and point."""
    names = ["a.output", "b.weight"]
    run = run_folder.write_run(tmp_path, names)
    (run / "lightning_qat" / "layer_statistics.csv").unlink()
    table = GrowingTable(run / "lightning_qat" / "layer_statistics.csv")
    still = {"scale_drift": 0.0, "flip_rate": 0.0, "clipped_share": 0.0}
    for epoch in range(3):
        rows = [
            replace(
                run_folder.statistics_row(name, random.Random(0)),
                **(still | {column: values[name] for column, values in columns.items() if name in values}),
            )
            for name in names
        ]
        table.write(LayerStatisticsResult(tuple(rows)), epoch)
    if flagged:
        run_folder.write_diagnosis(run, *flagged)
    return run


@pytest.mark.parametrize(
    ("flagged", "columns", "shown"),
    [
        ((), {"flip_rate": {"b.weight": 0.1}}, "flip_rate"),
        ((), {"scale_drift": {"b.weight": 0.1}, "flip_rate": {"b.weight": 0.1}}, "scale_drift"),
        (("a.output",), {"scale_drift": {"b.weight": 0.1}, "clipped_share": {"a.output": 0.4}}, "clipped_share"),
        ((), {}, "score"),
    ],
)
def test_the_heat_map_opens_on_what_has_something_to_show(
    opened: Opened, tmp_path: Path, flagged: tuple[str, ...], columns: dict[str, dict[str, float]], shown: str
) -> None:
    page = opened(write_report([moving_run(tmp_path, *flagged, **columns)]))
    assert page.run("document.querySelector('#heat-tools select').value") == shown
    offered = page.run("[...document.querySelectorAll('#heat-tools option')].map((option) => option.text)")
    assert len([text for text in offered if text.endswith("(all 0)")]) == 3 - len(columns)
    cells = "[...document.querySelectorAll('#heat-chart .heat')]"
    assert max(page.run(f"{cells}.map((cell) => Number(cell.getAttribute('fill-opacity')))")) == 1
    page.run("document.querySelector('#heat-chart a').focus()")
    page.press("Enter")
    page.until("document.getElementById('point').open")


def test_the_first_screen_has_every_number_on_a_narrow_one(opened: Opened, report: Path) -> None:
    page = opened(report, width=380)
    cells = "[...document.querySelectorAll('#verdict td')].filter((c) => c.textContent)"
    assert page.run(f"{cells}.map((c) => c.textContent).includes('FAIL')")
    assert page.run(f"{cells}.every((c) => c.getBoundingClientRect().right <= 380)")
    label = "getComputedStyle({}, '::before').content"
    assert page.run(label.format("document.querySelector('#verdict td:last-child')")) == '"passed"'
    tools = "[...document.querySelectorAll('#tools > *')]"
    assert page.run(f"{tools}.every((tool) => tool.getBoundingClientRect().right <= 380)")


def test_on_paper_findings_are_open_and_closed_again_behind_it(opened: Opened, tmp_path: Path) -> None:
    run = run_folder.write_run(tmp_path, 3)
    run_folder.write_model_check(run, "a", severity="info")
    page = opened(write_report([run]))
    closed = "document.querySelectorAll('#findings details:not([open])').length"
    assert page.run(closed) == 1
    page.run("window.dispatchEvent(new Event('beforeprint'))")
    assert page.run(closed) == 0
    page.run("window.dispatchEvent(new Event('afterprint'))")
    assert page.run(closed) == 1


def compared_run(tmp_path: Path, *flagged: str) -> Path:
    """Two points; the error jumps at the second one."""
    run = run_folder.write_run(tmp_path, ["a.output", "b.output"])
    rows = [
        {"mod_name": n, "point": n, "SQNR": s, "own_SQNR": 40.0} for n, s in (("a.output", 47.3), ("b.output", 31.1))
    ]
    (run / "lightning_qat" / "layer_comparison.json").write_text(json.dumps({"rows": rows}))
    run_folder.write_diagnosis(run, *flagged)
    return run


def test_the_depth_chart_has_round_numbers_with_a_unit_and_names_the_jump(opened: Opened, tmp_path: Path) -> None:
    page = opened(write_report([compared_run(tmp_path, "b.output")]))
    texts = page.run("[...document.querySelectorAll('#depth svg > text')].map((t) => t.textContent)")
    assert {"35 dB", "40 dB", "45 dB", "first jump: b.output"} <= set(texts)
    assert page.run("document.querySelectorAll('#depth line.mark:not(.calm)').length") == 1
    assert "No finding warns of a point" not in page.run("document.getElementById('depth').textContent")


def test_the_first_jump_always_has_its_label_on_the_axis(opened: Opened, tmp_path: Path) -> None:
    """Of many places as many as fit are labelled, wide and narrow, and no label lies on another or outside."""
    names = [f"block{n}.conv{n}.output" for n in range(30)]
    run = run_folder.write_run(tmp_path, names)
    rows = [
        {"mod_name": n, "point": n, "SQNR": 50.0 if k < 17 else 30.0, "own_SQNR": 48.0, "quant_dtype": "int8"}
        for k, n in enumerate(names)
    ]
    rows[3]["own_SQNR"] = 20.0
    rows.append({"mod_name": "<output>", "SQNR": 29.0})
    (run / "lightning_qat" / "layer_comparison.json").write_text(json.dumps({"rows": rows}))
    path = write_report([run])
    for width in (1280, 380):
        page = opened(path, width=width)
        texts = page.run(
            "[...document.querySelectorAll('#depth svg > text[text-anchor=middle]')].map((t) => {"
            "const box = t.getBBox(); return [t.textContent, box.x, box.x + box.width]; })"
        )
        shown = sorted(texts, key=lambda text: text[1])
        assert names[17][-14:] in [text[-14:] for text, *_ in shown]
        assert len(shown) >= 2
        assert all(one[2] <= other[1] for one, other in itertools.pairwise(shown))
        right = page.run("document.querySelector('#depth svg').viewBox.baseVal.width")
        assert shown[0][1] >= -1
        assert shown[-1][2] <= right + 1
    said = page.run("document.getElementById('depth').textContent")
    assert f"calls fine for the type: {names[3]} (20 dB)" in said  # and none of those that are as the others
    assert 'without a value of "own": <output>.' in said


def test_no_value_lies_beyond_the_last_tick(opened: Opened, tmp_path: Path) -> None:
    page = opened(write_report([compared_run(tmp_path, "b.output")]))
    ticks = page.run("[...document.querySelectorAll('#depth svg > text[text-anchor=end]')].map((t) => t.textContent)")
    numbers = [float(text.removesuffix(" dB")) for text in ticks if text.endswith(" dB")]
    assert min(numbers) <= 31.1
    assert max(numbers) >= 47.3


def test_a_heat_map_says_what_its_colours_mean(opened: Opened, report: Path) -> None:
    page = opened(report)
    largest = page.run("document.querySelector('#heat-chart .largest').textContent")
    tips = page.run("[...document.querySelectorAll('#heat-chart rect title')].map((t) => t.textContent)")
    values = [abs(float(tip.rpartition(": ")[2].removesuffix(" %"))) for tip in tips]
    assert float(largest.removesuffix(" %")) == max(values)


def test_a_narrow_screen_shows_the_verdicts_and_says_that_a_table_scrolls(opened: Opened, tmp_path: Path) -> None:
    """Siblings: the table of points, the heat map, tables that are shown only when their section is opened."""
    run = compared_run(tmp_path, "b.output")
    run_folder.write_ladder(run, cause="a cause")
    path = write_report([run])
    page = opened(path, width=380)
    head = "[...document.querySelectorAll('#grid th')].map((h) => h.textContent)"
    assert page.run(head)[:2] == ["point", "verdict"]
    right = "[...document.querySelectorAll('#grid tbody tr')].map((row) => row.cells[1].getBoundingClientRect().right)"
    assert max(page.run(right)) <= 380
    hint = "getComputedStyle(document.querySelector('{}'), '::before').content"
    page.until(f"{hint.format('#grid')}.includes('Scroll sideways')")
    page.run("document.querySelectorAll('#checks details').forEach((one) => { one.open = true; })")
    page.until(f"{hint.format('#checks .scroll')}.includes('Scroll sideways')")
    wide = opened(path, width=1600)
    assert wide.run(head)[-1] == "verdict"
    assert wide.run(hint.format("#grid")) == "none"


def test_the_first_jump_is_no_alarm_where_every_point_is_fine(opened: Opened, tmp_path: Path) -> None:
    page = opened(write_report([compared_run(tmp_path)]))
    assert page.run("document.querySelectorAll('#depth line.mark.calm').length") == 1
    assert "No finding warns of a point" in page.run("document.getElementById('depth').textContent")


@pytest.mark.parametrize(("passed", "marked"), [(False, ["", "! clipping"]), (True, ["", "clipping"])])
def test_a_row_that_something_is_said_against_is_marked(
    opened: Opened, tmp_path: Path, passed: bool, marked: list[str]
) -> None:
    """By text and colour, for people who are colour-blind; and not where the target is reached all the same."""
    run = compared_run(tmp_path, "b.output")
    run_folder.write_accuracy(run, passed=passed)
    page = opened(write_report([run]))
    cells = "[...document.querySelectorAll('#grid tbody tr')].map((row) => row.cells[row.cells.length - 1])"
    assert page.run(f"{cells}.map((cell) => cell.textContent)") == marked
    assert page.run(f"{cells}.map((cell) => cell.className)")[1] == ("" if passed else "bad")
