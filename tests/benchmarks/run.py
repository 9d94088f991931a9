"""Measures training steps, insertion and calibration, and prints the tables of this folder's README.

Needs an editable install of this repository; other packages are measured if they are installed. About ten minutes.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import warnings
from collections.abc import Sequence
from importlib import metadata

import torch

from tests.benchmarks.insertion import CalibrationRow, InsertionRow, calibration, insertion
from tests.benchmarks.models import MobileNet, ResNet, VisionTransformer
from tests.benchmarks.timing import cpu_once, once
from tests.benchmarks.training_step import Row, compare
from tests.benchmarks.variants import FLOAT, VARIANTS

MODELS = {"ResNet": ResNet, "ViT": VisionTransformer, "MobileNet": MobileNet}
PACKAGES = ("lightning-qat", "torch", "torchao", "nncf", "brevitas", "nvidia-modelopt")


def main() -> None:
    """Measure everything; each table is printed, as markdown, when it is complete."""
    arguments = _parser().parse_args()
    warnings.simplefilter("ignore")  # the other packages' deprecations
    torch.set_num_threads(arguments.threads)
    _section("Measured with", environment(arguments.threads))
    variants = [v for v in VARIANTS if v is FLOAT or any(word in v.name for word in arguments.only or [""])]
    models = {name: MODELS[name] for name in arguments.models}
    for name, model_class in {} if arguments.no_steps else models.items():
        torch.manual_seed(0)
        clock = cpu_once if arguments.processor_time else once
        rows = compare(model_class(), variants, arguments.rounds, arguments.repeats, clock)
        _section(f"Training step: {name}", step_table(rows))
    _section("Insertion (processor time, one thread)", insertion_table([insertion(ops) for ops in arguments.ops]))
    rows_by_model = {}
    for name, model_class in models.items():
        torch.manual_seed(0)
        model = model_class()
        rows_by_model[name] = calibration(model, copy.deepcopy(model), arguments.rounds)
    _section("Calibration (processor time, one thread)", calibration_table(rows_by_model))
    print(f"Load average at the end: {_load()}.")


def environment(threads: int) -> str:
    """Describe where the numbers come from, with the load before the run if called first."""
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    return (
        f"Python {platform.python_version()}, {', '.join(versions)}; {_cpu()}, {os.cpu_count()} cores, {threads} "
        f"threads; load average at the start {_load()}."
    )


def step_table(rows: Sequence[Row]) -> str:
    """One row per variant."""
    lines = [
        "| | moving scales | ms | ratio to float (quartiles) | quantizers | us per quantizer |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        timing = row.timing
        if timing is None:
            lines.append(f"| {row.variant.name} | | {row.reason} | | | |")
            continue
        per_quantizer = "" if row.us_per_quantizer is None else f"{row.us_per_quantizer:.0f}"
        lines.append(
            f"| {row.variant.name} | {row.variant.moving_scales} | {timing.seconds * 1e3:.1f} "
            f"| {timing.ratio:.2f} ({timing.ratio_low:.2f}-{timing.ratio_high:.2f}) | {row.quantizers or ''} "
            f"| {per_quantizer} |"
        )
    return "\n".join(lines)


def insertion_table(rows: Sequence[InsertionRow]) -> str:
    """One row per number of ops; milliseconds, and microseconds per op."""
    lines = [
        "| ops | points | trace ms | plan ms | attach ms | together, us per op | float forward, us per op "
        "| observing forward, us per op | minmax scales, us per point | quantizing forward, us per op |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines.extend(
        f"| {row.ops} | {row.points} | {row.trace * 1e3:.0f} | {row.plan * 1e3:.0f} | {row.attach * 1e3:.0f} "
        f"| {row.insertion / row.ops * 1e6:.0f} | {row.float_forward / row.ops * 1e6:.0f} "
        f"| {row.observe / row.ops * 1e6:.0f} | {row.compute_scales / row.points * 1e6:.0f} "
        f"| {row.quantized_forward / row.ops * 1e6:.0f} |"
        for row in rows
    )
    return "\n".join(lines)


def calibration_table(rows: dict[str, CalibrationRow]) -> str:
    """One row per model."""
    observers = next(iter(rows.values())).seconds_by_observer
    header = [f"scales by {name}, ms" for name in observers]
    lines = [
        "| | points | pass over a batch, ms | ratio to a float forward | us per point | " + " | ".join(header) + " |",
        "|---|---|---|---|---|" + "---|" * len(header),
    ]
    for name, row in rows.items():
        seconds = " | ".join(f"{s * 1e3:.0f}" for s in row.seconds_by_observer.values())
        lines.append(
            f"| {name} | {row.points} | {row.timing.seconds * 1e3:.0f} | {row.timing.ratio:.2f} "
            f"| {row.timing.extra / row.points * 1e6:.0f} | {seconds} |"
        )
    return "\n".join(lines)


def _section(title: str, text: str) -> None:
    print(f"\n### {title}\n\n{text}\n", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21, help="turns of each variant (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="training steps per turn (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument("--only", nargs="*", help="words: only variants with one of them in their name")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS), help="only these models")
    parser.add_argument("--processor-time", action="store_true", help="for a busy machine; with --threads 1")
    parser.add_argument("--no-steps", action="store_true", help="insertion and calibration only")
    parser.add_argument("--ops", type=int, nargs="*", default=[100, 1_000, 10_000], help="sizes of the insertion test")
    return parser


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


if __name__ == "__main__":
    main()
