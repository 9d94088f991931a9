"""Fake-quantization alone, forward and backward, against torch's operators and against an earlier version of ours.

.venv/bin/python tests/benchmarks/fake_quantize.py --before FILE        # prints the table of README.md

FILE is ``fake_quantize_function.py`` of an earlier commit, such as d8fafd6, which multiplied by the scale's inverse.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_qat.quantization.fake_quant.fake_quantize_function import fake_quantize
from tests.benchmarks.run import environment
from tests.benchmarks.timing import Timing, cpu_once, interleaved, one_thread

LIMITS = {"int8": (-128, 127), "int16": (-32768, 32767)}
SHAPES = {
    "per tensor": (None, (512, 1024)),
    "per channel, axis 0": (0, (512, 1024)),
    "per channel, axis 1": (1, (8, 64, 32, 32)),
}
"""Axis and shape: half a million values each."""

Function = Callable[[Tensor, Tensor, Tensor | int, int, int, int | None], Tensor]


def main() -> None:
    """Measure every type with every granularity; ratios are to the first function, in the same turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="fake_quantize_function.py of another commit")
    parser.add_argument("--rounds", type=int, default=101, help="turns of each function (default: %(default)s)")
    arguments = parser.parse_args()
    functions: dict[str, Function] = {"now": fake_quantize, "torch's operator": _torchs}
    if arguments.before is not None:
        functions = {"before": _load(arguments.before), **functions}
    print(environment(threads=1))
    reference, *others = functions
    header = [f"{name}, ratio (quartiles)" for name in others]
    print(f"| type | granularity | {reference}, ms | {' | '.join(header)} |")
    print("|---|---|---|" + "---|" * len(others))
    with one_thread():
        for dtype, limits in LIMITS.items():
            for granularity, (axis, shape) in SHAPES.items():
                timings = measure(functions, shape, axis, limits, arguments.rounds)
                cells = [f"{t.ratio:.2f} ({t.ratio_low:.2f}-{t.ratio_high:.2f})" for t in map(timings.get, others) if t]
                milliseconds = timings[reference].seconds * 1e3
                print(f"| {dtype} | {granularity} | {milliseconds:.2f} | {' | '.join(cells)} |", flush=True)


def measure(
    functions: Mapping[str, Function], shape: tuple[int, ...], axis: int | None, limits: tuple[int, int], rounds: int
) -> dict[str, Timing]:
    """Processor time of forward and backward of normal data, of which one value in a hundred is clipped."""
    torch.manual_seed(0)
    x = torch.randn(shape).requires_grad_()
    upstream = torch.randn(shape)
    scale = torch.tensor(2.5 / limits[1])
    if axis is not None:
        scale = scale * torch.linspace(0.5, 1.5, shape[axis])

    def step(function: Function) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(x, scale, 0, *limits, axis), x, upstream)

    steps = {name: step(function) for name, function in functions.items()}
    return interleaved(steps, next(iter(functions)), rounds, 5, cpu_once)


def _torchs(x: Tensor, scale: Tensor, zero_point: Tensor | int, low: int, high: int, axis: int | None) -> Tensor:
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, torch.zeros((), dtype=torch.int32), low, high)
    return torch.fake_quantize_per_channel_affine(x, scale, torch.zeros_like(scale).int(), axis, low, high)


def _load(path: Path) -> Function:
    spec = importlib.util.spec_from_file_location("fake_quantize_before", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Function = module.fake_quantize
    return function


if __name__ == "__main__":
    main()
