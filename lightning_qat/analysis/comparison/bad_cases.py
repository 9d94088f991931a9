"""The samples of a loader that come out worst, to run other analyses on: ``find_bad_cases(region, batches)``."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from lightning_qat.analysis.captured_calls import RepeatableForward, analysis_mode
from lightning_qat.analysis.metric_direction import higher_is_better
from lightning_qat.analysis.metrics import MetricName, check_metric, error_sums, metric_of_sums
from lightning_qat.analysis.outputs import OutputSelector
from lightning_qat.analysis.results import Result
from lightning_qat.analysis.sensitivity.sample_axes import fewer_samples
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.modules.preservation import preserved
from lightning_qat.quantization.modules.tensor_leaves import call_leaves, is_float, map_call_leaves, named_leaves
from lightning_qat.quantization.region.region import Region, find_regions

SampleMetric: TypeAlias = MetricName | Callable[[Any, Any], Any]


@dataclass(frozen=True)
class BadCase:
    """One sample.

    Args:
        output: path of the output, or a description of the chosen output.
        rank: 1 is the worst.
        position: number of the sample in the loader, from 0.
        batch: number of its batch.
        sample: its number in the batch.
        value: the metric.
    """

    output: str
    rank: int
    position: int
    batch: int
    sample: int
    value: float


@dataclass(frozen=True)
class BadCasesResult(Result[BadCase]):
    """The worst samples per output, the worst first.

    Args:
        metric: its name.
        samples: number of samples that were evaluated.
        batches: the samples themselves, one call each, in the order of ``positions``: pass them to ``sensitivity``,
            ``compare`` or ``layer_statistics``. Not written to files.
        positions: which samples these are; one that is bad in several outputs is there once.
    """

    title: ClassVar[str] = "Worst samples"

    metric: str = ""
    samples: int = 0
    positions: tuple[int, ...] = ()
    batches: tuple[Call, ...] = field(default=(), repr=False, compare=False)

    def columns(self) -> tuple[str, ...]:
        """Names of all columns, also without rows."""
        return tuple(BadCase.__dataclass_fields__)

    @property
    def note(self) -> str:
        """Say which metric was used, and how many samples were evaluated."""
        return f"{self.metric}, {len(self.positions)} of {self.samples} samples"

    def about(self) -> dict[str, Any]:
        """Return the facts beside the rows, without the samples themselves."""
        return {**super().about(), "batches": ()}


def find_bad_cases(
    model: Region | nn.Module,
    batches: Iterable[object],
    metric: SampleMetric = "MSE",
    k: int = 8,
    *,
    output: str | Callable[[Any], Any] | None = None,
    post_process: Callable[[Any], Any] | None = None,
    inputs: Callable[[Any], object] | None = None,
    seed: int = 0,
) -> BadCasesResult:
    """Find the samples whose outputs change most by quantization, or are worst by a metric of your own.

    The model runs in evaluation mode; nothing is changed. Each output (tensor) has its own list: a sample that is bad
    for one task may be fine for another. Memory: only the samples that are among the worst so far are kept.

    Args:
        model: a calibrated region, or a module that contains one. With a metric of your own, any module.
        batches: of the loader; see :meth:`~lightning_qat.quantization.modules.call.Call.of`.
        metric: ``L1``, ``MSE``, ``Cosine``, ``SQNR`` or ``KL`` of each sample's output against that of the float model;
            or a function ``(output, batch) -> (samples,)``, such as a loss, of the chosen output as the model returns
            it. A larger value means a worse sample, unless its attribute ``higher_is_better`` is true.
        k: how many samples per output.
        output: path into the output such as ``map.layer_3``, or a callable on it; None: every tensor of it.
        post_process: applied to the chosen output in float.
        inputs: function from a batch to the model's input, such as ``lambda batch: batch[0]``; the whole batch if not
            given.
        seed: of the random numbers that the forward draws.

    Raises:
        ConfigurationError: the region is not calibrated, there is no batch, no output has an entry per sample, or the
            metric does not return one number per sample.

    Example:
        >>> from lightning_qat.quantization.region.calibration import calibrate
        >>> from lightning_qat.quantization.region.insertion import insert
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> region = insert(model, (torch.ones(2, 4),))
        >>> _ = calibrate(region, torch.rand(3, 8, 4))
        >>> loader = torch.rand(3, 8, 4)
        >>> loader[1, 5] = 50.0  # far outside the range
        >>> found = find_bad_cases(region, loader, k=2)
        >>> found.rows[0].position, found.rows[0].batch, found.rows[0].sample, found.batches[0].args[0].shape
        (13, 1, 5, torch.Size([1, 4]))
    """
    if k < 1:
        raise ConfigurationError(f"k must be at least 1 sample, not {k}.")
    region = model if isinstance(model, Region) else find_regions(model).get("")
    target = region.target if region is not None else model
    by_name = isinstance(metric, str)
    if isinstance(metric, str):
        check_metric(metric)
        if region is None:
            raise ConfigurationError(
                f"{metric} compares the quantized with the float model: give a module with fake-quant inserted, or a "
                "function (output, batch) -> (samples,) as metric."
            )
    if region is not None and not any(p.scale_source is not None for p in region.points.values()):
        raise ConfigurationError("no point has a scale: calibrate the region before looking for its bad cases.")
    search = _Search(target, region, metric, k, OutputSelector(output, post_process), seed)
    with analysis_mode(region) if region is not None else _evaluated(target):
        for number, batch in enumerate(batches):
            search.add(number, batch, Call.of(inputs(batch) if inputs is not None else batch))
    if not search.samples:
        raise ConfigurationError("there was no sample to evaluate: the batches are empty.")
    return search.result(metric if by_name else getattr(metric, "__name__", type(metric).__name__))  # type: ignore[arg-type]


class _Search:
    def __init__(
        self,
        target: nn.Module,
        region: Region | None,
        metric: SampleMetric,
        k: int,
        select: OutputSelector,
        seed: int,
    ) -> None:
        self.target = target
        self.region = region
        self.metric = metric
        self.k = k
        self.select = select
        self.seed = seed
        self.samples = 0
        self.sign = -1.0 if higher_is_better(metric) else 1.0
        # per output the worst so far; the first of a heap is the least bad one
        self.worst: dict[str, list[tuple[float, int, int, int, float]]] = {}
        self.kept: dict[int, Call] = {}

    def add(self, number: int, batch: object, call: Call) -> None:
        """Look at one batch."""
        counted = fewer_samples(call)
        count = counted[1] if counted is not None else 1
        with RepeatableForward(self.target, call, self.seed) as forward:
            values = self._by_name(forward, count) if isinstance(self.metric, str) else self._own(forward, batch, count)
        for output, of_samples in values.items():
            heap = self.worst.setdefault(output, [])
            for sample, value in enumerate(of_samples):
                badness = math.inf if math.isnan(value) else self.sign * value
                entry = (badness, -(self.samples + sample), number, sample, value)
                if len(heap) < self.k:
                    heapq.heappush(heap, entry)
                else:
                    heapq.heappushpop(heap, entry)
        self._keep(call, count)
        self.samples += count

    def _by_name(self, forward: RepeatableForward, count: int) -> dict[str, list[float]]:
        assert self.region is not None
        assert isinstance(self.metric, str)
        with self.region.only(()):
            base = {name: tensor.clone() for name, tensor in self._outputs(forward()).items()}
        analysed = self._outputs(forward())
        found = {}
        for name, b in base.items():
            a = analysed.get(name)
            if b.dim() and b.shape[0] == count and a is not None and a.shape == b.shape:
                with_kl = self.metric == "KL"
                sums = [error_sums(x[None], y[None], with_kl) for x, y in zip(b, a, strict=True)]
                found[name] = [float(metric_of_sums(self.metric, s)) for s in sums]
        if not found:
            shapes = ", ".join(f"{name or 'output'} {tuple(b.shape)}" for name, b in base.items())
            raise ConfigurationError(
                f"no output has an entry for each of the {count} samples along its first axis ({shapes}): choose or "
                "reshape one with output=... (a callable)."
            )
        return found

    def _own(self, forward: RepeatableForward, batch: object, count: int) -> dict[str, list[float]]:
        assert not isinstance(self.metric, str)
        values = torch.as_tensor(self.metric(self.select.chosen(forward()), batch)).detach().double()
        if values.shape != (count,):
            raise ConfigurationError(
                f"the metric has to return one number for each of the {count} samples, not {tuple(values.shape)}: "
                "leave out its mean (reduction='none')."
            )
        return {self.select.description: values.tolist()}

    def _outputs(self, value: Any) -> dict[str, Tensor]:
        if self.select.output is None and self.select.post_process is None:
            return {path: tensor.detach() for path, tensor in named_leaves(value) if is_float(tensor)}
        chosen = self.select(value)
        name = self.select.description
        return {name if len(chosen) == 1 else f"{name} [{i}]": tensor for i, tensor in enumerate(chosen)}

    def _keep(self, call: Call, count: int) -> None:
        """Keep the samples that are among the worst now, and drop the others."""
        places = {-entry[1]: entry[3] for heap in self.worst.values() for entry in heap}
        self.kept = {position: sample for position, sample in self.kept.items() if position in places}
        for position, sample in places.items():
            if position not in self.kept and position >= self.samples:
                self.kept[position] = one_sample(call, sample, count)

    def result(self, metric: str) -> BadCasesResult:
        """Return the lists."""
        rows = []
        for output, heap in self.worst.items():
            for rank, (_, position, batch, sample, value) in enumerate(sorted(heap, reverse=True), 1):
                rows.append(BadCase(output, rank, -position, batch, sample, value))
        positions = tuple(dict.fromkeys(row.position for row in sorted(rows, key=lambda row: row.rank)))
        return BadCasesResult(
            tuple(rows), metric, self.samples, positions, tuple(self.kept[position] for position in positions)
        )


def one_sample(call: Call, sample: int, count: int) -> Call:
    """Return a call with one sample, copied: of every tensor with ``count`` entries along its first axis.

    Example:
        >>> one_sample(Call.of(torch.arange(6).reshape(3, 2)), 1, 3).args
        (tensor([[2, 3]]),)
    """
    if count == 1 and not any(t.dim() and t.shape[0] == 1 for t in call_leaves(call.args, call.kwargs)):
        return call

    def part(_: int, tensor: Tensor) -> Tensor:
        return tensor[sample : sample + 1].detach().clone() if tensor.dim() and tensor.shape[0] == count else tensor

    return Call(*map_call_leaves(call.args, call.kwargs, part))


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    with preserved(module), torch.inference_mode(False), torch.no_grad():
        module.eval()
        yield
