"""Which scales training should find: learned ones in no optimizer, and narrow types whose scales are not learned."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_qat.analysis.model_check.checked_region import CheckedRegion
from lightning_qat.analysis.model_check.finding import Finding, shortened
from lightning_qat.analysis.model_check.model_check_result import Section
from lightning_qat.analysis.model_check.scale_check import points_with_scale
from lightning_qat.quantization.region.effective_dtypes import bits

LEARNED_WINS = 2
"""Bits of weights up to which learned scales reach more than those of statistics (tests/benchmarks/accuracy.md)."""
UNSTABLE_ALONE = 3
"""Bits of weights up to which learned scales of activations alone let some seeds collapse (the same table)."""
_LEARN_BOTH = (
    'Write QuantizationAwareTraining(activation_scales="learned", weight_scales="learned"), and build the optimizer '
    "from lightning_qat.parameter_groups(model)."
)


def check_learned_scales(checked: CheckedRegion) -> tuple[list[Finding], list[Section]]:
    """Look at what learns its scale, and at what should."""
    return [*_not_trained(checked), *_narrow_weights(checked)], []


def _not_trained(checked: CheckedRegion) -> Iterable[Finding]:
    if not checked.options.optimizers:
        return
    trained = {id(p) for o in checked.options.optimizers for group in o.param_groups for p in group["params"]}
    scales = checked.region.learned_scales
    names = tuple(name for name, scale in scales.items() if scale.requires_grad and id(scale) not in trained)
    if names:
        yield Finding(
            severity="warning",
            kind="scale not trained",
            names=names,
            what=f"The learned scales of {shortened(names)} are in no optimizer.",
            why="They keep the values of calibration while the model moves away from them.",
            action="Build the optimizer after the scales are learned, from lightning_qat.parameter_groups(model) or "
            "model.parameters().",
        )


def _narrow_weights(checked: CheckedRegion) -> Iterable[Finding]:
    """Advise what won at these widths. A scale that is fixed or frozen is so on purpose."""
    learns_activations, narrow = False, {}
    for name, plan in points_with_scale(checked):
        point = checked.points[name]
        if not plan.is_weight:
            learns_activations = learns_activations or point.learned
        elif not (point.learned or point.frozen or point.fixed_scale is not None):
            narrow[name] = bits(point.dtype)
    if not narrow:
        return
    width = min(narrow.values())
    names = tuple(name for name, number in narrow.items() if number == width)
    if learns_activations and width <= UNSTABLE_ALONE:
        yield Finding(
            severity="warning",
            kind="activation scales learned alone",
            names=names,
            what=f"The scales of activations are learned, and those of {len(names)} weights of {width} bits "
            f"({shortened(names)}) are not.",
            why="Some seeds collapse then: on MNIST, one of five ended at 72 % with 3 bits, and another at 70 % with "
            "2-bit weights, where none did with both kinds learned (95 to 96 %).",
            action=_LEARN_BOTH,
        )
    elif width <= LEARNED_WINS:
        yield Finding(
            severity="info",
            kind="scales not learned",
            names=names,
            what=f"{len(names)} weights ({shortened(names)}) have {width} bits, and their scales follow the weights.",
            why="With 2-bit weights, scales that training finds reach more: on MNIST 95.3 % against 93.6 %, the mean "
            "of five seeds, with a quarter of the spread (LSQ, arXiv:1902.08153).",
            action=_LEARN_BOTH,
        )
