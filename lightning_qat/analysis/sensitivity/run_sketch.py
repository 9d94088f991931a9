"""Running a sketch over batches, on one rank or several."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_qat.analysis.captured_calls import analysis_mode
from lightning_qat.analysis.sensitivity.sensitivity_sketch import Sketch
from lightning_qat.quantization import ranks
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.modules.call import Call


def run_sketch(sketch: Sketch, calls: Iterable[Call], across_ranks: bool) -> str:
    """Add batches to a sketch, and the sums of the other ranks; return why that is impossible, or an empty text.

    Args:
        sketch: the estimates.
        calls: this rank's batches.
        across_ranks: every rank calls this; all get the estimates over all batches.

    Raises:
        ConfigurationError: the chosen output does not exist or holds NaN.
    """
    problem = "a rank could not compute gradients"
    with ranks.failing_together(across_ranks), analysis_mode(sketch.region, buffers=False):
        try:
            for call in calls:
                sketch.run(call)
        except ConfigurationError:
            raise
        except Exception as error:  # whatever an op without a derivative raises; a measurement meets real errors again
            text = str(error).strip().splitlines() or [""]
            problem = f"gradients cannot be computed ({type(error).__name__}: {text[0]})"
            sketch.failures += 1
    if across_ranks:
        sketch.all_reduce()
    return problem if sketch.failures else ""
