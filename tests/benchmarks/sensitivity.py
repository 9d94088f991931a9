"""The sensitivity sketch against isolation: agreement on trained models, and cost.

.venv/bin/pip install scikit-image                      # photographs for EfficientNet-Lite0
.venv/bin/python tests/benchmarks/sensitivity.py        # prints the tables of README.md
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_qat.analysis.sensitivity.sensitivity import TOP_SHARE, sensitivity
from lightning_qat.analysis.sensitivity.sensitivity_result import SensitivityResult
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region
from tests.benchmarks.models import EncoderBlock, VisionTransformer
from tests.benchmarks.trained_models import TRAINED, Trained


@dataclass(frozen=True)
class Agreement:
    """How a sketch agrees with isolation, over several seeds.

    Attributes:
        points: number of points.
        correlations: Spearman's, over all points, without confirmation.
        recalls: share of isolation's top tenth that is in the top tenth by estimated score.
        confirmed: the same of the reported rows, after confirmation.
        single: Spearman's with one probe, as at the end of an epoch.
        quick: the same on 26 of the samples, the default for epochs of 16 batches of 64.
    """

    points: int
    correlations: list[float]
    recalls: list[float]
    confirmed: list[float]
    single: list[float]
    quick: list[float]


@dataclass(frozen=True)
class Cost:
    """What a sketch costs without confirmation.

    Attributes:
        points: number of points.
        forward: seconds of a float forward, outside of any region.
        sketch: seconds of a sketch, by number of probes.
        isolation: seconds of an isolation of all points; None if not measured.
    """

    points: int
    forward: float
    sketch: dict[int, float]
    isolation: float | None


def agreement(trained: Trained, dtype: str, probes: int = 4, seeds: int = 5) -> Agreement:
    """Compare the ranking of a sketch with that of isolation."""
    region = _region(trained.model, trained.calibration, dtype)
    batches = [trained.inputs]
    exact = _scores(sensitivity(region, batches, method="isolation"))
    names = list(exact)
    size = math.ceil(TOP_SHARE * len(names))
    top = set(sorted(names, key=lambda name: -exact[name])[:size])
    found = Agreement(len(names), [], [], [], [], [])
    for seed in range(seeds):
        plain = sensitivity(region, batches, method="sketch", probes=probes, confirm=0, seed=seed)
        scores = _scores(plain)
        found.correlations.append(spearmanr([exact[n] for n in names], [scores[n] for n in names]).statistic)
        found.recalls.append(len(top & {row.point for row in plain.rows[:size]}) / size)
        result = sensitivity(region, batches, method="sketch", probes=probes, seed=seed)
        found.confirmed.append(len(top & {row.point for row in result.rows[:size]}) / size)
        for samples, correlations in ((None, found.single), (26, found.quick)):
            scores = _scores(
                sensitivity(region, batches, method="sketch", probes=1, confirm=0, max_samples=samples, seed=seed)
            )
            correlations.append(spearmanr([exact[n] for n in names], [scores[n] for n in names]).statistic)
    region.remove()
    return found


def cost(blocks: int, batch: int = 8, isolate: bool = True, rounds: int = 3) -> Cost:
    """Time a sketch of a ViT of width 192 on 32 x 32 pictures; the fastest of some rounds."""
    torch.manual_seed(0)
    model, x = VisionTransformer(), torch.randn(batch, 3, 32, 32)
    model.blocks = nn.Sequential(*(EncoderBlock(192, 3) for _ in range(blocks)))
    model.eval()
    with torch.no_grad():
        model(x)
        forward = _fastest(lambda: model(x), rounds)
    region = _region(model, x, "int8")

    def sketch(probes: int) -> float:
        return _fastest(lambda: sensitivity(region, [x], method="sketch", probes=probes, confirm=0), rounds)

    sketches = {probes: sketch(probes) for probes in (1, 4)}
    isolation = _fastest(lambda: sensitivity(region, [x], method="isolation"), 1) if isolate else None
    return Cost(len(region.points), forward, sketches, isolation)


def main() -> None:
    """Print all tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(TRAINED), choices=list(TRAINED))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--no-cost", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| model | dtype | points | Spearman, median (worst) | recall of the top tenth | after confirmation |"
        " Spearman, R = 1 | R = 1, 26 samples |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in arguments.models:
        trained = TRAINED[name]()
        label = name if trained.accuracy is None else f"{name} ({trained.accuracy:.1%})"
        for dtype in ("int8", "int4"):
            row = agreement(trained, dtype, seeds=arguments.seeds)
            cells = [
                f"{statistics.median(v):.3f} ({min(v):.3f})"
                for v in (row.correlations, row.recalls, row.confirmed, row.single, row.quick)
            ]
            print(f"| {label} | {dtype} | {row.points} | {' | '.join(cells)} |", flush=True)
    if arguments.no_cost:
        return
    print("\n| points | float forward, ms | sketch, R = 1 | sketch, R = 4 | isolation | isolation by sketch, R = 4 |")
    print("|---|---|---|---|---|---|")
    for blocks, isolate in ((13, True), (67, False)):
        c = cost(blocks, isolate=isolate)
        ratios = [f"{c.sketch[probes] / c.forward:.1f} forwards" for probes in (1, 4)]
        isolation = "" if c.isolation is None else f"{c.isolation / c.forward:.0f} forwards"
        ratio = "" if c.isolation is None else f"{c.isolation / c.sketch[4]:.1f}"
        print(f"| {c.points} | {c.forward * 1e3:.0f} | {' | '.join(ratios)} | {isolation} | {ratio} |", flush=True)


def _region(model: nn.Module, calibration: Tensor, dtype: str) -> Region:
    region = insert(model, (calibration[:4],), qconfig={"activation": {"dtype": dtype}, "weight": {"dtype": dtype}})
    calibrate(region, [calibration])
    return region


def _scores(result: SensitivityResult) -> dict[str, float]:
    return {row.point: row.score for row in result.rows}


def _fastest(function: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
