"""Size of the HTML report, and how long it takes to write and to open, at 100, 1,000 and 10,000 points.

    .venv/bin/python -m tests.benchmarks.report [--points 100 1000 10000] [--epochs 20]

The run is drawn at random. Writing is processor time. The browser's times are of the clock; it is Debian's chromium,
without a window.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from lightning_qat.reporting.html.page import write_report
from tests.harness import chromium
from tests.harness.chromium import Chromium
from tests.harness.run_folder import point_names, write_convergence, write_diagnosis, write_model_check, write_run

PAINTED = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
READY = "performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"
SCROLLED = """(async () => {
  const grid = document.getElementById('grid');
  const times = [];
  for (let step = 1; step <= 20; step += 1) {
    const start = performance.now();
    grid.scrollTop = (grid.scrollHeight * step) / 20;
    await new Promise(requestAnimationFrame);
    times.push(performance.now() - start);
  }
  return Math.max(...times);
})()"""
SORTED = """(() => {
  const start = performance.now();
  document.querySelector('#grid th:nth-child(6) button').click();
  return performance.now() - start;
})()"""
SEARCHED = """(() => {
  const start = performance.now();
  const field = document.querySelector('#tools input');
  field.value = 'block1 weight';
  field.dispatchEvent(new Event('input'));
  return performance.now() - start;
})()"""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, nargs="*", default=[100, 1_000, 10_000])
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    print("| points | epochs | MB | written, s | first paint, ms | ready, ms | sort, ms | search, ms | scroll, ms |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, Chromium(Path(folder) / "profile") as browser:
        for count in arguments.points:
            print(_row(Path(folder), browser, count, arguments.epochs), flush=True)


def _row(folder: Path, browser: Chromium, count: int, epochs: int) -> str:
    run = write_run(folder / str(count), count, epochs)
    worst = point_names(count)[:50]
    write_convergence(run, "healthy")
    write_diagnosis(run, *worst)
    write_model_check(run, *worst)
    write_report([run])  # the first one also reads the template
    start = time.process_time()
    path = write_report([run])
    written = time.process_time() - start
    page = browser.page()
    page.open(path)
    painted = page.until(PAINTED)
    ready = page.run(READY)
    scrolled, sorted_, searched = (page.run(script) for script in (SCROLLED, SORTED, SEARCHED))
    assert page.complaints == []
    page.close()
    times = " | ".join(f"{value:.0f}" for value in (painted, ready, sorted_, searched, scrolled))
    return f"| {count:,} | {epochs} | {path.stat().st_size / 1e6:.2f} | {written:.2f} | {times} |"


if __name__ == "__main__":
    assert chromium.EXECUTABLE, chromium.MISSING
    main()
