"""Measures training steps, peak memory and analyses on one GPU, and runs the tests that need one. Under 8 minutes.

.venv/bin/python -m tests.benchmarks.gpu                                  # prints the tables, writes gpu.json
.venv/bin/python -m tests.benchmarks.gpu --device cpu --size tiny         # the same on a CPU: only that it runs
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightning_qat
from tests.benchmarks import variants
from tests.benchmarks.gpu_models import SIZES, models
from tests.benchmarks.training_step import training_step
from tests.benchmarks.variants import Prepared

ROOT = Path(__file__).parents[2]
TESTS = ("tests/quantization/test_cuda.py", "tests/callbacks/test_cuda.py", "tests/callbacks/test_trainer_features.py")
AIMS = {"eager": 1.40, "compiled": 1.15, "memory": 1.30}
"""Most of what our step may cost relative to that of the float model, run in the same way."""
WARM_UP = 3


@dataclass(frozen=True)
class Variant:
    """One row: how a model is prepared, and what it is compared with."""

    prepare: Callable[[nn.Module, Tensor], Prepared]
    reference: str
    aim: str = ""


VARIANTS = {
    "float": Variant(variants.unchanged, "float"),
    "lightning_qat": Variant(variants.ours, "float", "eager"),
    "lightning_qat, learned": Variant(variants.ours_learned, "float"),
    "torch.ao FX": Variant(variants.torch_ao_fx, "float"),
    "float, compiled": Variant(variants.float_compiled, "float, compiled"),
    "lightning_qat, compiled": Variant(variants.ours_compiled, "float, compiled", "compiled"),
    "lightning_qat, learned, compiled": Variant(variants.ours_learned_compiled, "float, compiled"),
}


@dataclass(frozen=True)
class Row:
    """What one variant of one model costs.

    Attributes:
        model: which model.
        variant: which variant, or which analysis.
        seconds: of a step, the median.
        peak_bytes: most memory of the device at a time, with nothing else on it; None on a CPU.
        ratio: seconds relative to the reference.
        memory_ratio: memory relative to the reference.
        first_seconds: until the first steps are done: preparing, and compiling.
        quantizers: how many there are.
        reason: why it could not be measured.
    """

    model: str
    variant: str
    seconds: float | None = None
    peak_bytes: int | None = None
    ratio: float | None = None
    memory_ratio: float | None = None
    first_seconds: float | None = None
    quantizers: int = 0
    reason: str = ""


class Device:
    """Where it runs, and how time and memory are taken there."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.is_cuda = self.device.type == "cuda"

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def clear(self) -> None:
        torch.compiler.reset()
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.is_cuda else None

    def seconds(self, function: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - start

    def environment(self) -> dict[str, str]:
        name = torch.cuda.get_device_name() if self.is_cuda else platform.processor() or platform.machine()
        versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
        return {"device": name, **versions, "lightning_qat": lightning_qat.__version__}


class Clock:
    """The time that is left: what does not fit into it is left out, and named."""

    def __init__(self, limit: float) -> None:
        self.end = time.monotonic() + limit

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def measure(model: nn.Module, name: str, variant: str, size: str, device: Device) -> Row:
    """Prepare a copy of a model and time its steps, with nothing else on the device."""
    device.clear()
    wanted = SIZES[size]
    torch.manual_seed(0)
    x = torch.randn(wanted.batch, 3, wanted.image, wanted.image).to(device.device)
    y = torch.randint(0, wanted.classes, (wanted.batch,)).to(device.device)
    start = time.perf_counter()
    try:
        prepared = VARIANTS[variant].prepare(copy.deepcopy(model).to(device.device), x)
        step = training_step(prepared.model.to(device.device), x, y)
        for _ in range(WARM_UP):
            step()
        device.wait()
    except Exception as error:  # another package, or a compiler, may raise anything
        return Row(name, variant, reason=f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}")
    first = time.perf_counter() - start
    if device.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(device.seconds(step) for _ in range(wanted.steps))
    return Row(name, variant, seconds, device.peak(), first_seconds=first, quantizers=prepared.quantizers)


def analyses(model: nn.Module, name: str, size: str, device: Device) -> list[Row]:
    """What inserting, calibrating and the analyses cost, on one batch of training."""
    device.clear()
    wanted = SIZES[size]
    x = torch.randn(wanted.batch, 3, wanted.image, wanted.image).to(device.device)
    net = copy.deepcopy(model).to(device.device)
    regions: list[Any] = []
    works: dict[str, Callable[[], object]] = {
        "insert": lambda: regions.append(lightning_qat.insert(net, (x[:2],))),
        "calibrate": lambda: lightning_qat.calibrate(regions[0], [x]),
        "check": lambda: lightning_qat.check(regions[0]),
        "sensitivity, as in every epoch": lambda: lightning_qat.sensitivity(regions[0], [x], probes=1, confirm=0),
        "sensitivity, as at the end": lambda: lightning_qat.sensitivity(regions[0], [x], probes=4),
        "compare": lambda: lightning_qat.compare(regions[0], [x]),
    }
    found = []
    for what, work in works.items():
        if device.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            found.append(Row(name, what, device.seconds(work), device.peak()))
        except Exception as error:
            found.append(Row(name, what, reason=f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}"))
            if not regions:
                break
    return found


def compared(rows: list[Row], references: dict[str, str]) -> list[Row]:
    """Put in what each row costs relative to its reference."""
    known = {(row.model, row.variant): row for row in rows}
    result = []
    for row in rows:
        base = known.get((row.model, references[row.variant]))
        if base is None or base.seconds is None or row.seconds is None:
            result.append(row)
            continue
        memory = row.peak_bytes / base.peak_bytes if row.peak_bytes and base.peak_bytes else None
        result.append(Row(**{**asdict(row), "ratio": row.seconds / base.seconds, "memory_ratio": memory}))
    return result


def aims(rows: list[Row]) -> list[dict[str, Any]]:
    """Each aim with what was measured; ``met`` is None where nothing was."""
    found: list[dict[str, Any]] = []
    for row in rows:
        aim = VARIANTS[row.variant].aim
        if aim:
            pairs = ((f"{aim} step", AIMS[aim], row.ratio), (f"{aim} memory", AIMS["memory"], row.memory_ratio))
            for what, most, value in pairs:
                met = None if value is None else value <= most
                found.append({"model": row.model, "aim": what, "most": most, "measured": value, "met": met})
    return found


def run_tests(clock: Clock) -> dict[str, Any]:
    """Run the tests that need a GPU, in a process of its own; the last lines of what they say."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, "-k", "cuda or precision"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=max(1.0, clock.left)
        )
    except subprocess.TimeoutExpired:
        return {"passed": None, "summary": "left out: no time was left"}
    return {"passed": done.returncode == 0, "summary": "\n".join(done.stdout.strip().splitlines()[-15:])}


def tables(result: dict[str, Any]) -> str:
    """The results as Markdown."""

    def shown(value: float | None, factor: float = 1.0, digits: int = 2) -> str:
        return "" if value is None else f"{value * factor:.{digits}f}"

    lines = [", ".join(f"{key} {value}" for key, value in result["environment"].items()), ""]
    lines += [
        "| model | variant | ms | ratio | peak MiB | ratio | first s | quantizers | |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in (Row(**r) for r in [*result["rows"], *result["analyses"]]):
        cells = [shown(row.seconds, 1e3), shown(row.ratio), shown(row.peak_bytes, 2**-20, 0), shown(row.memory_ratio)]
        lines.append(
            f"| {row.model} | {row.variant} | {' | '.join(cells)} | {shown(row.first_seconds, digits=1)} | "
            f"{row.quantizers or ''} | {row.reason} |"
        )
    lines += ["", "| model | aim | at most | measured | |", "|---|---|--:|--:|---|"]
    words = {True: "met", False: "missed", None: "not measured"}
    lines += [
        f"| {a['model']} | {a['aim']} | {a['most']} | {shown(a['measured'])} | {words[a['met']]} |"
        for a in result["aims"]
    ]
    return "\n".join([*lines, "", result["tests"]["summary"]])


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=tuple(SIZES), default="full")
    parser.add_argument("--only", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS), metavar="VARIANT")
    parser.add_argument("--limit", type=float, default=380.0, help="seconds after which nothing more is begun")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--no-tests", action="store_true", help="do not run the tests that need a GPU")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu --size tiny shows that the script runs")
    clock, device = Clock(options.limit), Device(options.device)
    tests = {"passed": None, "summary": "The tests were not run."} if options.no_tests else run_tests(clock)
    rows: list[Row] = []
    costs: list[Row] = []
    for name, model in models(options.size).items():
        for variant in options.only:
            late = clock.left < 0.05 * options.limit
            row = Row(name, variant, reason="no time was left")
            rows.append(row if late else measure(model, name, variant, options.size, device))
            print(f"{name}, {variant}: {rows[-1].seconds or rows[-1].reason}", flush=True)
        if clock.left > 0.05 * options.limit:
            costs += analyses(model, name, options.size, device)
    rows = compared(rows, {name: variant.reference for name, variant in VARIANTS.items()})
    steps = [row for row in rows if row.variant == "float"]
    costs = compared([*steps, *costs], dict.fromkeys({r.variant for r in [*steps, *costs]}, "float"))[len(steps) :]
    result = {
        "environment": device.environment(),
        "rows": [asdict(row) for row in rows],
        "analyses": [asdict(row) for row in costs],
        "aims": aims(rows),
        "tests": tests,
    }
    options.output.write_text(json.dumps(result, indent=1))
    print(tables(result))
    return result


if __name__ == "__main__":
    main()
