"""Measuring what every point at every type does to the output: ``measure_errors(region, batches)``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lightning_qat.analysis.mixed_precision.called_regions import (
    Step,
    called_regions,
    regions_that_ran,
    selectors_of,
)
from lightning_qat.analysis.mixed_precision.measured_forwards import Chosen
from lightning_qat.analysis.mixed_precision.merged_errors import merged_errors, naming
from lightning_qat.analysis.mixed_precision.model_hashes import hash_of_tensors, hashes_of
from lightning_qat.analysis.mixed_precision.point_quantizers import (
    at_dtype,
    ordered_dtypes,
    plans_by_dtype,
    quantizers_of_regions,
    types_without_scale,
)
from lightning_qat.analysis.mixed_precision.precision_errors import PrecisionErrors
from lightning_qat.analysis.mixed_precision.region_effects import region_effects
from lightning_qat.analysis.mixed_precision.region_errors import MeasuringOptions, region_errors, unknown_errors
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.modules.tensor_leaves import call_leaves
from lightning_qat.quantization.planning.hardware_profile import HardwareProfile
from lightning_qat.quantization.planning.hardware_profile_files import hardware_profile, planned_profile
from lightning_qat.quantization.region.region import Region


def measure_errors(
    region: Region | nn.Module,
    batches: Iterable[object],
    dtypes: Sequence[str] = ("int8", "int16"),
    output: str | Callable[[Any], Any] | None = None,
    post_process: Callable[[Any], Any] | None = None,
    *,
    profile: HardwareProfile | str | Path | None = None,
    probes: int = 4,
    confirm: int | None = None,
    seed: int = 0,
    across_ranks: bool = False,
) -> PrecisionErrors:
    """Measure the output error of every point at every type, from one calibration and one set of gradients.

    All errors are estimated by one sketch (see :mod:`~lightning_qat.analysis.sensitivity.sensitivity_sketch`): the
    gradients are the same for all types, only the error of the tensor differs. Points that act on the output without a
    gradient are measured, one forward for each of them, type and batch; so are the points with the largest estimates,
    at the narrowest type, as the choice rests on them. Errors of several points add up as long as the
    output has not collapsed, so the result answers which points to raise without any more data:
    :meth:`~lightning_qat.analysis.mixed_precision.precision_errors.PrecisionErrors.choose`. One forward per type with
    all points quantized tells how good that sum is. Nothing of the region is changed.

    If several tensors are chosen, their squared errors count relative to the mean square of each: a task is not lost
    beside one of larger numbers. Of a module with several regions, the errors of each are estimated at its own output
    and weighted by what the region as a whole does to the outputs that no other region reads from; the largest of each
    are measured there. A tensor that is quantized at the end of one region and again at the start of the next counts
    twice.

    Args:
        region: a calibrated region; or a module that contains calibrated regions.
        batches: those of the region's target, or of the module's forward; see
            :meth:`~lightning_qat.quantization.modules.call.Call.of`.
        dtypes: at least two types; points are raised from the narrowest. Overrides that give a point a type stay. The
            type that the region has at present does not matter: scales for each type are derived from the statistics
            that calibration kept.
        output: path into the output such as ``map.layer_3``, or a callable on it; None: all its tensors. With several
            regions the path begins with that of a region (``head.map``).
        post_process: applied to the chosen output in float, such as ``torch.sigmoid``.
        profile: the hardware that the region was planned for; needed only if it is not a shipped one.
        probes: backward passes per batch.
        confirm: how many of the largest estimates are measured; as many as cost what the sketch costs if not given.
        seed: of the probes, and of the random numbers that the forward draws.
        across_ranks: every rank calls this with its own batches; the result is that of all batches, on all ranks.

    Raises:
        ConfigurationError: nothing is calibrated, a type does not exist, no point has more than one of the types, there
            is no batch, the output does not exist, or no gradient reaches the points.

    Example:
        >>> import torch
        >>> from lightning_qat.quantization.region.calibration import calibrate
        >>> from lightning_qat.quantization.region.insertion import insert
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> x = torch.randn(32, 8)
        >>> region = insert(model, (x,))
        >>> _ = calibrate(region, [x])
        >>> errors = measure_errors(region, [x])
        >>> choice = errors.choose(top=1)
        >>> len(choice.overrides), choice.predicted < choice.narrowest
        (1, True)
    """
    options = MeasuringOptions(hardware_profile(profile), probes, confirm, seed, across_ranks)
    with called_regions(region, batches, seed) as called:
        return measure_regions(called.regions, called.calls, called.steps, dtypes, output, post_process, options)


def measure_regions(
    regions: Mapping[str, Region],
    calls: Mapping[str, Sequence[Call]],
    steps: Iterable[Step],
    dtypes: Sequence[str],
    output: str | Callable[[Any], Any] | None = None,
    post_process: Callable[[Any], Any] | None = None,
    options: MeasuringOptions | None = None,
) -> PrecisionErrors:
    """Measure all regions of a model together; see :func:`measure_errors`.

    Args:
        regions: all regions of the model, calibrated, by the path of their target.
        calls: what each target is called with.
        steps: functions that run the whole model on a batch, in evaluation mode; of one region they are not needed.
        dtypes: at least two types.
        output: path into the output of a region, which begins with the region's path if there are several.
        post_process: applied to the chosen output.
        options: how errors are measured; without a profile, it is that of the plan, if that is a shipped one.
    """
    options = options or MeasuringOptions()
    types = ordered_dtypes(dtypes)
    options = replace(options, profile=options.profile or planned_profile(next(iter(regions.values())).plan))
    plans = plans_by_dtype(regions, types, options.profile)
    quantizers = quantizers_of_regions(regions, plans)
    if all(len(own) < 2 for points in quantizers.values() for own in points.values()):
        raise ConfigurationError(
            f"there is nothing to raise: the hardware and the overrides leave every point one of {', '.join(types)}. "
            "Name other dtypes, or take out overrides that fix the type."
        )
    selectors, final = selectors_of(list(regions), output, post_process)
    ran = regions_that_ran(calls, final, options.across_ranks) or list(regions)
    own = options if len(regions) == 1 else replace(options, confirm=0)  # several are confirmed at the final outputs
    without_scale = {path: types_without_scale(region, plans[path]) for path, region in regions.items()}
    results = {
        path: region_errors(regions[path], quantizers[path], calls[path], selectors[path], own, without_scale[path])
        for path in ran
    }
    if len(regions) == 1:
        merged = results[ran[0]]
    else:
        chosen: dict[Hashable, dict[str, Chosen]] = {
            (path, point): {path: {point: next(iter(quantizers[path][point].values()))}}
            for path in ran
            for point in _largest(results[path], types[0], options)
            if point in quantizers[path]  # others have no scale, and no error
        }
        at: dict[Hashable, dict[str, Chosen]] = {
            dtype: {path: at_dtype(quantizers[path], dtype) for path in ran} for dtype in types
        }
        effects = region_effects(
            {path: regions[path] for path in ran},
            steps,
            at[types[0]],
            {**chosen, **at},
            selectors,
            final,
            options.seed,
            across_ranks=options.across_ranks,
        )
        for path in (path for path in regions if path not in ran):
            results[path] = unknown_errors(regions[path], quantizers[path], options, without_scale[path])
        merged = merged_errors(results, effects, naming(regions), types)
    data = hash_of_tensors(t for path in regions for c in calls[path] for t in call_leaves(c.args, c.kwargs))
    return replace(merged, dtypes=types, hashes={**hashes_of(regions), "data": data})


def _largest(errors: PrecisionErrors, dtype: str, options: MeasuringOptions) -> list[str]:
    """Return the points of a region whose errors at a type are the largest, as many as are measured."""
    rows = sorted((row for row in errors.rows if row.dtype == dtype), key=lambda row: -row.mse)
    return [row.point for row in rows[: options.measured]]
