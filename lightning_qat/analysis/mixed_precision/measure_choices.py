"""Measuring what choices of types do to the output: ``measure_choices(region, batches, choices)``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from typing_extensions import override

from lightning_qat.analysis.mixed_precision.balanced_outputs import balanced
from lightning_qat.analysis.mixed_precision.called_regions import (
    CalledRegions,
    called_regions,
    regions_that_ran,
    selectors_of,
)
from lightning_qat.analysis.mixed_precision.measured_forwards import Chosen, measure_forwards
from lightning_qat.analysis.mixed_precision.merged_errors import naming
from lightning_qat.analysis.mixed_precision.point_errors import error_text, finite_error
from lightning_qat.analysis.mixed_precision.point_quantizers import (
    Quantizers,
    at_dtype,
    ordered_dtypes,
    plans_by_dtype,
    quantizers_of_regions,
)
from lightning_qat.analysis.mixed_precision.precision_choice import PrecisionChoice, PrecisionFront
from lightning_qat.analysis.mixed_precision.region_effects import region_effects
from lightning_qat.analysis.results import Result
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.planning.hardware_profile import HardwareProfile
from lightning_qat.quantization.planning.hardware_profile_files import hardware_profile, planned_profile
from lightning_qat.quantization.region.region import Region


def measure_choices(
    region: Region | nn.Module,
    batches: Iterable[object],
    choices: PrecisionChoice | PrecisionFront | Iterable[PrecisionChoice],
    dtypes: Sequence[str] = ("int8", "int16"),
    output: str | Callable[[Any], Any] | None = None,
    post_process: Callable[[Any], Any] | None = None,
    *,
    profile: HardwareProfile | str | Path | None = None,
    seed: int = 0,
    across_ranks: bool = False,
) -> MeasuredChoices:
    """Measure the output error of choices: one forward for each of them and each batch.

    :meth:`~lightning_qat.analysis.mixed_precision.precision_errors.PrecisionErrors.choose` adds up errors that were
    measured one by one. Where they do not add up, or the output has collapsed, this tells what choices really give,
    without planning and calibrating for each of them. Nothing of the region is changed.

    Args:
        region: the calibrated region, or the module with calibrated regions, that the errors were measured of.
        batches: those of the region's target, or of the module's forward. Other ones than the errors were measured
            with tell more.
        choices: one; several; or a front, of which all are measured.
        dtypes: the types that the errors were measured for. Points that a choice does not raise have the narrowest.
        output: as for the errors: path into the output, or a callable on it; None: all its tensors.
        post_process: applied to the chosen output in float.
        profile: the hardware that the region was planned for; needed only if it is not a shipped one.
        seed: of the random numbers that the forward draws.
        across_ranks: every rank calls this with its own batches; the result is that of all batches, on all ranks.

    Raises:
        ConfigurationError: there is no choice or no batch, nothing is calibrated, a choice is of another model or of
            other types, the output does not exist, or quantization changes its shape.

    Example:
        >>> import torch
        >>> from lightning_qat.analysis.mixed_precision.measure_errors import measure_errors
        >>> from lightning_qat.quantization.region.calibration import calibrate
        >>> from lightning_qat.quantization.region.insertion import insert
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> x = torch.randn(32, 8)
        >>> region = insert(model, (x,))
        >>> _ = calibrate(region, [x])
        >>> errors = measure_errors(region, [x])
        >>> measured = measure_choices(region, [x], [errors.choose(top=1), errors.choose(top=3)])
        >>> [row.raised for row in measured.rows], measured.rows[1].measured < measured.narrowest
        ([1, 3], True)
    """
    given = _several(choices)
    types = ordered_dtypes(dtypes)
    with called_regions(region, batches, seed) as called:
        hardware = hardware_profile(profile) or planned_profile(next(iter(called.regions.values())).plan)
        quantizers = quantizers_of_regions(called.regions, plans_by_dtype(called.regions, types, hardware))
        whole: dict[Hashable, dict[str, Chosen]] = {
            "narrowest": {path: at_dtype(own, types[0]) for path, own in quantizers.items()},
            "widest": {path: at_dtype(own, types[-1]) for path, own in quantizers.items()},
        }
        chosen: dict[Hashable, dict[str, Chosen]] = {
            number: _chosen(choice, called.regions, quantizers) for number, choice in enumerate(given)
        }
        errors, power = _measured(called, {**whole, **chosen}, output, post_process, seed, across_ranks)
    errors = {key: finite_error(error) for key, error in errors.items()}
    narrowest, widest = errors["narrowest"], errors["widest"]
    rows = []
    for number, choice in enumerate(given):
        found = replace(choice, predicted=errors[number], narrowest=narrowest, widest=widest, power=power)
        raised, share = len(choice.rows), len(choice.rows) / max(1, choice.points)
        quality = found.predicted, found.predicted_sqnr, found.recovered
        rows.append(MeasuredChoice(raised, share, choice.cost, choice.predicted, *quality))
    return MeasuredChoices(tuple(rows), given, narrowest, widest, power, types, given[0].cost_name)


@dataclass(frozen=True)
class MeasuredChoice:
    """What was measured of a choice.

    Args:
        raised: number of raised points.
        share: their share of all points.
        cost: what the choice costs.
        predicted: predicted mean squared error of the output.
        measured: the measured one.
        sqnr: the measured signal to noise ratio, in dB.
        recovered: share of the error that the widest types take away which the choice takes away, as measured; below
            zero if it adds error.
    """

    raised: int
    share: float
    cost: float
    predicted: float
    measured: float
    sqnr: float
    recovered: float


@dataclass(frozen=True)
class MeasuredChoices(Result[MeasuredChoice]):
    """Choices beside what was measured of each.

    Args:
        rows: one for each choice, in their order.
        choices: the choices, with their overrides.
        narrowest: measured mean squared error with all points at their narrowest types.
        widest: the same with all points at their widest types.
        power: mean square of the float output.
        dtypes: the types, the narrowest first.
        cost_name: what the cost is.
    """

    choices: tuple[PrecisionChoice, ...] = ()
    narrowest: float = 0.0
    widest: float = 0.0
    power: float = 0.0
    dtypes: tuple[str, ...] = ()
    cost_name: str = "points"
    title: ClassVar[str] = "Measured error of choices"
    shown: ClassVar[tuple[str, ...]] = ("raised", "share", "cost", "predicted", "measured", "sqnr", "recovered")

    @property
    @override
    def note(self) -> str:
        """Say between which errors the choices lie, and which of them has the least."""
        best = min(range(len(self.rows)), key=lambda number: self.rows[number].measured)
        least = f" The least error is that of choices[{best}]." if len(self.rows) > 1 else ""
        return (
            f"Mean square of the output {self.power:.3g}. Measured with all points at {self.dtypes[0]}: "
            f"{error_text(self.narrowest)}, at {self.dtypes[-1]}: {error_text(self.widest)}.{least}"
        )

    @override
    def about(self) -> dict[str, Any]:
        """Return the facts beside the rows, with the overrides of every choice."""
        facts = {name: value for name, value in super().about().items() if name != "choices"}
        return {**facts, "overrides": [choice.overrides for choice in self.choices]}


def _several(choices: PrecisionChoice | PrecisionFront | Iterable[PrecisionChoice]) -> tuple[PrecisionChoice, ...]:
    if isinstance(choices, PrecisionChoice):
        return (choices,)
    found = tuple(choices.choices if isinstance(choices, PrecisionFront) else choices)
    for choice in found:
        if not isinstance(choice, PrecisionChoice):
            raise ConfigurationError(
                f"choices must be what errors.choose(...) returns, or some of errors.front().choices, not {choice!r}."
            )
    if not found:
        raise ConfigurationError("there is no choice to measure: give some, such as errors.front().choices[::10].")
    return found


def _chosen(
    choice: PrecisionChoice, regions: Mapping[str, Region], quantizers: Mapping[str, Quantizers]
) -> dict[str, Chosen]:
    """All points of all regions at their narrowest types, and those of the choice at theirs."""
    raised = {row.point: row.dtype for row in choice.rows}
    found: dict[str, Chosen] = {}
    for path, name in naming(regions).items():
        own = {point: fake_quants for point, fake_quants in quantizers[path].items() if fake_quants}
        dtypes = {point: raised.pop(name(point), next(iter(fake_quants))) for point, fake_quants in own.items()}
        for point, dtype in dtypes.items():
            if dtype not in own[point]:
                raise ConfigurationError(
                    f"the choice raises {name(point)} to {dtype}, which it does not have here, but "
                    f"{', '.join(own[point])}: give the dtypes that the errors were measured for."
                )
        found[path] = {point: own[point][dtype] for point, dtype in dtypes.items()}
        for point in regions[path].points:  # one without a scale rounds nothing
            raised.pop(name(point), None)
    if raised:
        raise ConfigurationError(
            f"the choice raises {', '.join(raised)}, which is not here: it is of another model. Measure the errors of "
            "this one, and choose again."
        )
    return found


def _measured(
    called: CalledRegions,
    chosen: Mapping[Hashable, Mapping[str, Chosen]],
    output: str | Callable[[Any], Any] | None,
    post_process: Callable[[Any], Any] | None,
    seed: int,
    across_ranks: bool,
) -> tuple[Mapping[Hashable, float], float]:
    """Return the errors by key and the mean square of the output, which is 1 where errors are relative to it."""
    selectors, final = selectors_of(list(called.regions), output, post_process)
    ran = regions_that_ran(called.calls, final, across_ranks)
    if not ran:
        raise ConfigurationError("there was no batch to measure choices on.")
    if len(called.regions) == 1:
        ((path, region),) = called.regions.items()
        calls = called.calls[path]
        select = balanced(region, calls, selectors[path], seed, across_ranks)
        of_region = {key: own[path] for key, own in chosen.items()}
        return measure_forwards(region, calls, select, of_region, seed, across_ranks=across_ranks)
    running = {path: called.regions[path] for path in ran}
    effects = region_effects(
        running, called.steps, chosen["narrowest"], chosen, selectors, final, seed, across_ranks=across_ranks
    )
    if not effects.compared:
        raise ConfigurationError(
            "quantization changes the shape of the outputs: choose an output before the selection."
        )
    return effects.chosen, 1.0
