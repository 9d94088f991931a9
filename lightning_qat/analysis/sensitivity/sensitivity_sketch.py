"""Estimating the sensitivity of all points at once, from a float forward and a few backward passes.

With ``d`` the error that quantizing a point adds to its tensor and ``J`` the Jacobian of the chosen output with respect
to that tensor, the output changes by about ``J d``. For a vector ``v`` of random signs on the output,
``E[<J^T v, d>^2] = |J d|^2`` (Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1990; the
variance with signs is the smallest), and ``J^T v`` of *every* point is what one backward pass computes. The mean over
several ``v`` (probes), and over samples where the samples of a batch are independent of each other, makes it exact
enough to rank hundreds of points in the time of some ten forwards.

It is a first-order estimate, at the float model's own decisions: indices (``topk``, ``argmax``), comparisons and
rounding inside the model stay what they are in float.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lightning_qat.analysis.captured_calls import RepeatableForward, analysis_mode
from lightning_qat.analysis.nan_origin import refuse_nan
from lightning_qat.analysis.outputs import OutputSelector
from lightning_qat.analysis.region_memory import RegionMemory
from lightning_qat.analysis.sensitivity.error_products import ErrorProducts, custom_functions
from lightning_qat.analysis.sensitivity.sample_axes import SampleAxis, fewer_samples, find_sample_axes
from lightning_qat.analysis.sensitivity.watched_forward import Key, WatchedForward
from lightning_qat.quantization import ranks
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.interception.transparent_gradients import TransparentGradients
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.modules.module_walk import modules_outside_regions
from lightning_qat.quantization.modules.tensor_leaves import call_leaves
from lightning_qat.quantization.region.region import Region


@dataclass
class Estimate:
    """The sums from which the score of one point is estimated.

    Args:
        squared: sum over batches, samples and probes of the squared products.
        fourth: sum of the squares of these squared products.
        products: number of products.
        reached: whether a batch ran the point.
        failed: how often no gradient arrived, or one that is not finite, or zero in spite of an error (rounding), or
            the tensor was written meanwhile.
    """

    squared: float = 0.0
    fourth: float = 0.0
    products: float = 0.0
    reached: bool = False
    failed: float = 0.0


class Sketch:
    """The estimates of all points, batch by batch.

    Args:
        region: a calibrated region.
        names: the points; of points that share a quantizer, only the owner.
        select: the chosen output.
        probes: backward passes per batch.
        seed: seed of the probes, and of the random numbers that the forward draws.
        max_samples: use this many samples of each batch, if they are independent of each other; None for all.
        memory: results of earlier analyses of this region and output.
        alternatives: fake-quants to estimate in place of those of the points, by point, each under a name of its own:
            one set of gradients serves the errors of several types.

    Attributes:
        estimates: by name of the point, or of the alternative.
        elements: number of finite elements of the chosen output, over all batches.
        batches: number of batches.
        left_torch: a tensor became Python numbers in the forward; how they act on the output is not known.
        unsplit: batches whose samples could not be told apart.
        failures: ranks on which no gradient could be computed.
        custom_backward: custom ``autograd.Function`` classes on the way to the chosen output.
    """

    def __init__(
        self,
        region: Region,
        names: list[str],
        select: OutputSelector,
        probes: int = 4,
        seed: int = 0,
        max_samples: int | None = None,
        memory: RegionMemory | None = None,
        alternatives: Mapping[str, Mapping[str, FakeQuantize]] | None = None,
    ) -> None:
        self.region = region
        self._quantizers: dict[str, dict[str, FakeQuantize | None]] = {
            name: {name: None} if alternatives is None else dict(alternatives[name]) for name in names
        }
        self.select = select
        self.probes = probes
        self.seed = seed
        self.max_samples = max_samples
        self.memory = memory or RegionMemory()
        self.estimates = {name: Estimate() for own in self._quantizers.values() for name in own}
        self.elements = 0
        self.batches = 0
        self.left_torch = False
        self.unsplit = 0
        self.failures = 0
        self.custom_backward: tuple[str, ...] = ()
        self._owner = {point.name: point.same_as or point.name for point in region.plan.points}
        operands = [o for op in region.graph.ops for o in op.operands if o.written]
        overwritten = {f"{s.name}.output" for o in operands for s in o.sources if s.kind in ("op", "mutated")}
        shared = {p.name for p in region.plan.points if p.role == "input" or region.graph.by_name[p.op].inplace}
        self._tensors = overwritten, shared

    def add(self, calls: Iterable[Call], across_ranks: bool) -> str:
        """Add batches, and the sums of the other ranks; return why that is impossible, or an empty text.

        Args:
            calls: this rank's batches.
            across_ranks: every rank calls this; all get the estimates over all batches.

        Raises:
            ConfigurationError: the chosen output does not exist or holds NaN.
        """
        problem = "a rank could not compute gradients"
        with ranks.failing_together(across_ranks), analysis_mode(self.region, buffers=False):
            try:
                for call in calls:
                    self.run(call)
            except ConfigurationError:
                raise
            except Exception as error:  # whatever an op without a derivative raises; a measurement meets real errors
                text = str(error).strip().splitlines() or [""]
                problem = f"gradients cannot be computed ({type(error).__name__}: {text[0]})"
                self.failures += 1
        if across_ranks:
            self._all_reduce()
        return problem if self.failures else ""

    def run(self, call: Call) -> None:
        """Add one batch; use it inside :func:`~lightning_qat.analysis.captured_calls.analysis_mode`.

        Raises:
            RuntimeError: an op of the model has no derivative, or memory does not suffice; and whatever the model and
                the selection of the output raise.
        """
        if not self._run_part(call):
            self._run(call)

    def _run_part(self, call: Call) -> bool:
        """Add a batch's first ``max_samples`` samples; return whether that was possible."""
        shapes, plan = _shapes(call), self.region.plan
        part = fewer_samples(call, self.max_samples) if self.max_samples is not None else None
        if part is None or part[1] <= (self.max_samples or 0):
            return False
        if not self.memory.find(plan, ("divisible", shapes), lambda: True):
            return False
        is_divisible = self._run(part[0], partial=True)
        if not is_divisible:
            self.memory.note(plan, ("divisible", shapes), False)
        return is_divisible

    def _run(self, call: Call, partial: bool = False) -> bool:
        """Add a batch. A partial one is not added, and False returned, if its samples are not independent."""
        target = self.region.target
        with (
            closing(ErrorProducts(self._owner, self._quantizers, self.probes, *self._tensors)) as watched,
            self.region.only(self._quantizers),
            _no_parameter_gradients(target),
            torch.enable_grad(),
            RepeatableForward(target, call, self.seed, copies=True) as forward,
        ):
            try:
                with WatchedForward(self.region, watched):
                    output = forward()
                with TransparentGradients():
                    chosen = self.select.differentiable(output)
            except Exception:
                if partial:  # a model of one batch size
                    return False
                raise
            del output
            refuse_nan(chosen, self.select.description, self.region, forward)
            split = self._sample_axes(call, watched, [t.detach() for t in chosen])
            if partial and split is None:
                return False
            self.custom_backward = self.memory.find(
                self.region.plan, "custom backward", lambda: custom_functions(chosen)
            )
            self.elements += sum(int(t.isfinite().sum()) for t in chosen)
            self._probe(watched, chosen, split)
        self.left_torch = self.left_torch or watched.left_torch
        self.unsplit += split is None
        self.batches += 1
        return True

    def mse(self, name: str) -> tuple[float, float]:
        """Return a point's estimated mean squared change of the output, and its standard error."""
        e = self.estimates[name]
        scale = 1.0 / (self.probes * max(1, self.elements))
        if e.products < 2:
            return e.squared * scale, math.nan
        mean = e.squared / e.products
        variance = max(0.0, e.fourth / e.products - mean**2) * e.products / (e.products - 1)
        return e.squared * scale, math.sqrt(e.products * variance) * scale

    def standard_error(self, name: str) -> float | None:
        """Return the standard error of a point's score, from that of its square; None if it is not known."""
        mse, error = self.mse(name)
        return None if math.isnan(error) else error / (2 * math.sqrt(mse)) if mse else 0.0

    def _all_reduce(self) -> None:
        """Add the sums of all ranks. Every rank has to call this, also one whose forward failed."""
        if ranks.count() == 1:
            return
        rows = [[e.squared, e.fourth, e.products, float(e.reached), e.failed] for e in self.estimates.values()]
        rows.append([self.elements, self.batches, self.left_torch, self.unsplit, self.failures])
        *rows, totals = ranks.summed(torch.tensor(rows, dtype=torch.float64)).tolist()
        for name, (squared, fourth, products, reached, failed) in zip(self.estimates, rows, strict=True):
            self.estimates[name] = Estimate(squared, fourth, products, bool(reached), failed)
        self.elements, self.batches, self.unsplit, self.failures = (int(totals[i]) for i in (0, 1, 3, 4))
        self.left_torch = bool(totals[2])

    def _sample_axes(self, call: Call, watched: ErrorProducts, chosen: list[Tensor]) -> dict[Key, SampleAxis] | None:
        """Where the samples are in every watched tensor, or None if they depend on each other."""
        key = _shapes(call), tuple((key, tuple(value.tensor.shape)) for key, value in watched.values.items())
        find = partial(find_sample_axes, self.region, call, self.select, watched.values, chosen, self.seed)
        return self.memory.find(self.region.plan, key, find)

    def _probe(self, watched: ErrorProducts, chosen: list[Tensor], axes: dict[Key, SampleAxis] | None) -> None:
        differentiable = [t for t in chosen if t.requires_grad]
        watched.axes = axes or {}
        batch = self.batches * ranks.count() + ranks.rank()  # so that ranks together draw what one process would
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + batch)
        moved: set[str] = set()
        for probe in range(self.probes if differentiable else 0):
            signs = [_signs(t, generator) for t in differentiable]
            torch.autograd.grad(
                differentiable, watched.leaves, signs, retain_graph=probe < self.probes - 1, allow_unused=True
            )
            moved |= self._add(watched.take())
        for name in watched.seen:
            estimate = self.estimates[name]
            estimate.reached = True
            lost = name in watched.failed or name not in watched.arrived
            estimate.failed += lost or (name not in moved and watched.has_error(name))

    def _add(self, products: dict[str, Tensor]) -> set[str]:
        """Add the products of one backward pass; return the points for which one is not zero."""
        moved: set[str] = set()
        by_length: dict[int, list[str]] = {}
        for name, tensor in products.items():
            by_length.setdefault(tensor.numel(), []).append(name)
        for length, names in by_length.items():
            squares = torch.stack([products[name].double() for name in names]).square()
            sums = torch.stack([squares.sum(1), squares.square().sum(1)], 1).tolist()
            for name, (squared, fourth) in zip(names, sums, strict=True):
                estimate = self.estimates[name]
                if squared:
                    moved.add(name)
                if not math.isfinite(squared):
                    estimate.failed += 1
                    continue
                estimate.squared += squared
                estimate.fourth += fourth
                estimate.products += length
        return moved


def _shapes(call: Call) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(t.shape) for t in call_leaves(call.args, call.kwargs))


@contextmanager
def _no_parameter_gradients(module: nn.Module) -> Iterator[None]:
    """Switch off the gradients of parameters: they are not needed, and double the cost."""
    parameters = (p for m in modules_outside_regions(module) for p in m._parameters.values() if p is not None)
    tracked = [p for p in parameters if p.requires_grad]
    try:
        for parameter in tracked:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in tracked:
            parameter.requires_grad_(True)


def _signs(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs where the output is finite, zero elsewhere."""
    signs = torch.randint(0, 2, tensor.shape, generator=generator).mul_(2).sub_(1).to(tensor.device, tensor.dtype)
    return torch.where(tensor.isfinite(), signs, 0.0)


def forwards_of_sketch(probes: int) -> int:
    """Return about how many forwards a sketch costs. With fewer points than that, isolation is as quick, and exact."""
    return 3 + 3 * probes
