"""Measures how long a choice of types takes once the errors are there, and prints the table of this folder's README.

No model is run: errors are drawn at random, with the shape of those of a model of so many points. Some seconds.
"""

from __future__ import annotations

import argparse
import random

from lightning_qat.analysis.mixed_precision.op_costs import CostName, OpCost
from lightning_qat.analysis.mixed_precision.point_errors import PointError
from lightning_qat.analysis.mixed_precision.precision_choice import PrecisionFront
from lightning_qat.analysis.mixed_precision.precision_errors import PrecisionErrors
from tests.benchmarks.timing import cpu_once

TYPES = ("int8", "int12", "int16")
COSTS: tuple[CostName, ...] = ("points", "bops")


def table_of(points: int, seed: int = 0) -> PrecisionErrors:
    """Errors that spread over six orders of magnitude, of linear layers in a row with a weight and a result each."""
    drawn = random.Random(seed)
    rows: list[PointError] = []
    ops: list[OpCost] = []
    before: tuple[str, ...] = ()
    for number in range(points // 2):
        op = f"layers.{number}"
        weight, output = f"{op}.weight", f"{op}.output"
        for point, role in ((weight, "weight"), (output, "activation")):
            mse = 10 ** drawn.uniform(-8, -2)
            for dtype, steps in zip(TYPES, (1, 16, 256), strict=True):
                error = mse / steps**2
                rows.append(PointError(point, op, "linear", role, dtype, error, 0.0, True))  # type: ignore[arg-type]
        ops.append(OpCost(op, "linear", drawn.randint(10**3, 10**7), True, (before, (weight,)), (weight, output)))
        before = (output,)
    alone = {row.point: (row.point,) for row in rows}
    return PrecisionErrors(tuple(rows), TYPES, power=1e3, together=alone, ops=tuple(ops))


def solved(errors: PrecisionErrors, cost: CostName) -> tuple[list[float], int]:
    """Processor time for a bound, a budget and the front, and the number of choices on the front."""
    bound = errors.choose(points=()).narrowest / 100
    fronts: list[PrecisionFront] = []
    seconds = [
        cpu_once(lambda: errors.choose(max_error=bound, cost=cost)),
        cpu_once(lambda: errors.choose(budget=0.1 if cost == "points" else 1.2, cost=cost)),
        cpu_once(lambda: fronts.append(errors.front(cost=cost))),
    ]
    return seconds, len(fronts[0].rows)


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--points", type=int, nargs="*", default=[1000, 10000])
    print("| points | cost | max_error, s | budget, s | front, s | choices on the front |\n|---|---|---|---|---|---|")
    for points in arguments.parse_args().points:
        errors = table_of(points)
        for cost in COSTS:
            seconds, choices = solved(errors, cost)
            cells = " | ".join(f"{s:.2f}" for s in seconds)
            print(f"| {points:,} | {cost} | {cells} | {choices:,} |", flush=True)


if __name__ == "__main__":
    main()
