"""What the error of a region does to the final outputs of a model that has several regions."""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_qat.analysis.captured_calls import seed_generators, watch_calls
from lightning_qat.analysis.mixed_precision.balanced_outputs import count_and_squares, counted
from lightning_qat.analysis.mixed_precision.called_regions import Step
from lightning_qat.analysis.mixed_precision.measured_forwards import Chosen, quantized_by
from lightning_qat.analysis.mixed_precision.point_errors import finite_error
from lightning_qat.analysis.outputs import OutputSelector
from lightning_qat.quantization import ranks
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.modules.tensor_leaves import call_leaves
from lightning_qat.quantization.region.region import Region


@dataclass(frozen=True)
class RegionEffects:
    """Errors of the final outputs, relative to their mean square in float.

    A final output is one of a region that no other region reads from. The relative errors of several outputs, and of
    several tensors of an output, are averaged, so that all tasks count alike.

    Args:
        alone: by region, if it alone is quantized at the narrowest type.
        chosen: of each choice of points and types, by its key.
        finals: the regions that give the final outputs.
        compared: False if outputs had other shapes than in float, as behind a selection of boxes: then ``alone`` is
            about each region's own output, and ``chosen`` is empty.
    """

    alone: Mapping[str, float]
    chosen: Mapping[Hashable, float]
    finals: tuple[str, ...]
    compared: bool = True


def region_effects(
    regions: Mapping[str, Region],
    steps: Iterable[Step],
    narrowest: Mapping[str, Chosen],
    chosen: Mapping[Hashable, Mapping[str, Chosen]],
    selectors: Mapping[str, OutputSelector],
    final: str | None = None,
    seed: int = 0,
    *,
    across_ranks: bool = False,
) -> RegionEffects:
    """Measure what regions and choices of points do to the final outputs: a step for each of them and each batch.

    Args:
        regions: calibrated regions by the path of their target.
        steps: one for each batch.
        narrowest: by region, its points at their narrowest types.
        chosen: what is quantized, by any key; of each region what is quantized there.
        selectors: the chosen output of each region; those of other regions than the final ones are not used.
        final: the region whose output alone counts; None for all that no other region reads from.
        seed: of the random numbers that the steps draw.
        across_ranks: add up what all ranks measure.
    """
    sums = _Sums(list(regions), list(chosen))
    rows = [{path: narrowest[path]} for path in regions] + list(chosen.values())
    for step in steps:
        run = _Recording(regions, selectors, step, seed)
        with _quantized(regions, {}):
            reference = run()
        for row, quantized in enumerate(rows):
            with _quantized(regions, quantized):
                sums.add(row, reference, run())
    if across_ranks:
        sums.add_ranks()
    return sums.effects(final)


@contextmanager
def _quantized(regions: Mapping[str, Region], chosen: Mapping[str, Chosen]) -> Iterator[None]:
    """Quantize the chosen points of the regions with the chosen quantizers inside the block, and no others."""
    with ExitStack() as stack, torch.no_grad():
        for path, region in regions.items():
            own = chosen.get(path, {})
            stack.enter_context(region.state("quantize", updates=()))
            stack.enter_context(quantized_by(region, own))
            stack.enter_context(region.only(own))
        yield


@dataclass
class _Recorded:
    """What one region received and returned in a step."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


class _Recording:
    """Runs a step and records what the regions receive and return."""

    def __init__(
        self, regions: Mapping[str, Region], selectors: Mapping[str, OutputSelector], step: Step, seed: int
    ) -> None:
        self._regions, self._selectors, self._step, self._seed = regions, selectors, step, seed

    def __call__(self) -> dict[str, _Recorded]:
        found = {path: _Recorded() for path in self._regions}

        def note(path: str, call: Call, result: Any) -> None:
            found[path].inputs += [t.detach().clone() for t in call_leaves(call.args, call.kwargs)]
            found[path].outputs += [t.clone() for t in self._selectors[path](result)]

        seed_generators(self._seed)
        watch_calls(self._regions, self._step, note)
        return found


class _Sums:
    """Sums over steps, from which the effects follow; a row for each region and choice, a column per region."""

    def __init__(self, paths: list[str], keys: list[Hashable]) -> None:
        self._paths, self._keys = paths, keys
        self._relative = torch.zeros(len(paths) + len(keys), len(paths), dtype=torch.float64)
        self._compared = torch.zeros_like(self._relative)
        self._reads = torch.zeros(len(paths), len(paths), dtype=torch.float64)
        self._ran = torch.zeros(len(paths), dtype=torch.float64)

    def add(self, row: int, reference: Mapping[str, _Recorded], found: Mapping[str, _Recorded]) -> None:
        """Add the errors of a step with the region or the choice of a row."""
        for column, path in enumerate(self._paths):
            base, other = reference[path], found[path]
            if row < len(self._paths):
                self._reads[row, column] += not _same(base.inputs, other.inputs)
                self._ran[column] += bool(base.outputs)
            error = _relative_error(base.outputs, other.outputs)
            if error is not None:
                self._relative[row, column] += error
                self._compared[row, column] += 1

    def add_ranks(self) -> None:
        """Add the sums of all ranks."""
        for name in ("_relative", "_compared", "_reads", "_ran"):
            setattr(self, name, ranks.summed(getattr(self, name)))

    def effects(self, final: str | None) -> RegionEffects:
        """Return what follows from the sums."""
        ran = [i for i in range(len(self._paths)) if self._ran[i]]
        last = [i for i in ran if not any(self._reads[i, j] for j in ran if i != j)] or ran
        if final is not None:
            last = [self._paths.index(final)]
        finals = tuple(self._paths[i] for i in last)
        steps = self._ran[last] / len(self._paths)
        compared = bool((self._compared[:, last] == steps).all())
        own = torch.where(self._compared > 0, self._relative / self._compared, 0.0)
        if not compared:
            return RegionEffects({self._paths[i]: float(own[i, i]) for i in ran}, {}, finals, compared)
        errors = own[:, last].mean(1).tolist()
        chosen = dict(zip(self._keys, errors[len(self._paths) :], strict=True))
        return RegionEffects({self._paths[i]: errors[i] for i in ran}, chosen, finals)


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _relative_error(reference: list[Tensor], found: list[Tensor]) -> float | None:
    """Return the mean over tensors of the squared error relative to the square; None if they cannot be compared."""
    if not reference or [t.shape for t in reference] != [t.shape for t in found]:
        return None
    ratios = []
    for base, other, counts in zip(reference, found, counted(reference), strict=True):
        finite = base.isfinite()
        _, power = count_and_squares(base)
        if power > 0 and counts:
            error = (base[finite].double() - other[finite].double()).square().sum()
            ratios.append(finite_error(float(error) / float(power)))
    return statistics.fmean(ratios) if ratios else 0.0
