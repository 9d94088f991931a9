"""What ``HTMLReport`` costs the example with the digits, in processor time of one thread.

    OMP_NUM_THREADS=1 .venv/bin/python -m tests.benchmarks.report_cost

The float model is trained first, then int8 as in ``make demo``, with all analyses.
"""

from __future__ import annotations

import os
import runpy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_qat import HTMLReport

ROOT = Path(__file__).parents[2]
EPOCHS = 10
WRITE, PROVENANCE = "_write", "_note_provenance"


def main() -> None:
    """Print the table."""
    spent: dict[str, list[float]] = {WRITE: [], PROVENANCE: []}
    for name, times in spent.items():
        setattr(HTMLReport, name, _timed(getattr(HTMLReport, name), times))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        _fit("digits_float.yaml")
        start = time.process_time()
        _fit("digits_int8.yaml")
        whole = time.process_time() - start
        os.chdir(ROOT)
    first, *others = spent[WRITE]
    report = sum(map(sum, spent.values()))
    epoch = (whole - report) / EPOCHS
    print("| epoch, s | first page, ms | another page, ms | of an epoch | HTMLReport in all, ms | of the run |")
    print("|---|---|---|---|---|---|")
    page = statistics.median(others)
    numbers = f"{epoch:.2f} | {1000 * first:.0f} | {1000 * page:.0f} | {100 * page / epoch:.1f} %"
    print(f"| {numbers} | {1000 * report:.0f} | {100 * report / whole:.2f} % |")


def _fit(config: str) -> None:
    sys.argv = ["digits.py", "fit", "--config", str(ROOT / "configs" / config)]
    runpy.run_path(str(ROOT / "examples" / "digits.py"), run_name="__main__")


def _timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent.append(time.process_time() - start)

    return timed


if __name__ == "__main__":
    main()
