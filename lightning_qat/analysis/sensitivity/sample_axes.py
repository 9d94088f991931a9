"""Which axis of a tensor holds the samples of a batch, found by running the same forward with fewer samples.

A product of gradient and error may be squared per sample only along an axis that really holds the samples. So an axis
counts if its length follows the number of samples *and* the values of the first samples stay what they were. An axis
where samples are folded with something else (``batch * cameras``, windows) is split by true samples, never along its
own entries: those of one sample reach the same outputs, and squaring them apart is biased.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_qat.analysis.captured_calls import RepeatableForward
from lightning_qat.analysis.outputs import OutputSelector
from lightning_qat.analysis.sensitivity.watched_forward import Key, WatchedForward, WatchedTensor, WeightUse
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.modules.tensor_leaves import call_leaves, map_call_leaves
from lightning_qat.quantization.region.bound_points import BoundPoint
from lightning_qat.quantization.region.region import Region

_TOLERANCE = 1e-3
"""Other batch sizes take other kernels: results differ in the last digits."""
_COMPARED = 1024
"""Number of values of each entry that are compared."""


@dataclass(frozen=True)
class SampleAxis:
    """The place of the samples in a tensor.

    Args:
        axis: the axis.
        samples: how many there are; a divisor of the axis' length.
        inner: only for a folded axis: the samples are its fast index (``cameras * batch``).

    Example:
        >>> SampleAxis(axis=0, samples=2).sums(torch.tensor([[1.0], [2.0], [30.0], [40.0]]))
        tensor([ 3., 70.])
        >>> SampleAxis(axis=0, samples=2, inner=True).sums(torch.tensor([[1.0], [2.0], [30.0], [40.0]]))
        tensor([31., 42.])
    """

    axis: int
    samples: int
    inner: bool = False

    def products(self, a: Tensor, b: Tensor) -> Tensor:
        """Scalar product of two tensors for each sample, ``(samples,)``."""
        if self.axis == 0 and not self.inner and a.is_contiguous() and b.is_contiguous() and a.dtype == b.dtype:
            return (a.view(self.samples, 1, -1) @ b.view(self.samples, -1, 1)).view(self.samples)
        return self.sums(a.mul(b))

    def sums(self, tensor: Tensor) -> Tensor:
        """Sum of the entries of each sample, ``(samples,)``."""
        others = [axis for axis in range(tensor.dim()) if axis != self.axis]
        entries = tensor.sum(dim=others) if others else tensor
        if entries.numel() == self.samples:
            return entries
        return entries.view(-1, self.samples).sum(0) if self.inner else entries.view(self.samples, -1).sum(1)


def number_of_samples(call: Call) -> int | None:
    """Return the length that most of a call's tensors have along their first axis; None without such a tensor.

    Example:
        >>> number_of_samples(Call.of((torch.zeros(8, 3), torch.zeros(8), torch.tensor(2.0))))
        8
    """
    lengths = Counter(t.shape[0] for t in call_leaves(call.args, call.kwargs) if t.dim())
    return max(lengths, key=lambda length: (lengths[length], length)) if lengths else None


def fewer_samples(call: Call, at_most: int = 2) -> tuple[Call, int, int] | None:
    """Return a call with the first samples only, the number of samples of ``call``, and that of the new one.

    None if no sample can be left out. If the call has ``at_most`` samples or fewer, one of them is left out.

    Example:
        >>> part, samples, fewer = fewer_samples(Call.of(torch.zeros(8, 3)))
        >>> part.args[0].shape, samples, fewer
        (torch.Size([2, 3]), 8, 2)
    """
    samples = number_of_samples(call)
    if samples is None or samples < 2:
        return None
    fewer = min(at_most, samples - 1)

    def shorter(index: int, tensor: Tensor) -> Tensor:
        return tensor[:fewer] if tensor.dim() and tensor.shape[0] == samples else tensor

    return Call(*map_call_leaves(call.args, call.kwargs, shorter)), samples, fewer


def first_samples(call: Call, at_most: int | None) -> Call:
    """Return a call with the first samples only; the call itself if it has no more, or may hold something else.

    Only a call whose tensors all have the same length along their first axis is shortened.

    Example:
        >>> first_samples(Call.of(torch.zeros(8, 3)), 2).args[0].shape
        torch.Size([2, 3])
        >>> first_samples(Call.of((torch.zeros(8, 3), torch.zeros(2, 8))), 2).args[0].shape  # edges of a graph
        torch.Size([8, 3])
    """
    lengths = {t.shape[0] for t in call_leaves(call.args, call.kwargs) if t.dim()}
    if at_most is None or len(lengths) != 1 or max(lengths) <= at_most:
        return call
    shorter = fewer_samples(call, at_most)
    return call if shorter is None else shorter[0]


def find_sample_axes(
    region: Region,
    call: Call,
    select: OutputSelector,
    values: Mapping[Key, WatchedTensor],
    chosen: Sequence[Tensor],
    seed: int,
) -> dict[Key, SampleAxis] | None:
    """Return the sample axis of every watched tensor; None if the samples of a call depend on each other.

    Args:
        region: a calibrated region.
        call: the inputs.
        select: the chosen output.
        values: the tensors of a forward with these inputs.
        chosen: the chosen output of that forward.
        seed: of the random numbers that the forward draws.
    """
    shorter = fewer_samples(call)
    if shorter is None:
        return None
    part, samples, fewer = shorter
    comparison = SampleComparison(values, samples, fewer)
    try:
        with (
            torch.no_grad(),
            WatchedForward(region, comparison),
            RepeatableForward(region.target, part, seed, copies=True) as forward,
        ):
            outputs = select(forward())
    except Exception:  # a model of one batch size: its samples cannot be told apart
        return None
    if len(outputs) != len(chosen) or any(
        sample_axis(a, b, samples, fewer) is None for a, b in zip(chosen, outputs, strict=True)
    ):
        return None
    return comparison.axes


class SampleComparison:
    """Compares the tensors at the points with those of a run with more samples.

    Args:
        whole: the tensors of the run with all samples.
        samples: number of samples of that run.
        fewer: number of samples of this run.

    Attributes:
        axes: the sample axis of each tensor.
    """

    transparent = False
    left_torch = False

    def __init__(self, whole: Mapping[Key, WatchedTensor], samples: int, fewer: int) -> None:
        self._whole = whole
        self._samples = samples
        self._fewer = fewer
        self.axes: dict[Key, SampleAxis] = {}

    def quantizers(self, point: BoundPoint) -> list[tuple[str, FakeQuantize]]:
        """Return one fake-quant: the samples are at the same place whatever the type."""
        return [(point.name, point.fake_quant)]

    def on_tensor(self, point: BoundPoint, use: int, tensor: Tensor) -> Tensor:
        """Compare an activation."""
        self._compare((point.name, use, 0), tensor)
        return tensor

    def differentiable(self, tensor: Tensor) -> Tensor:
        """Return the tensor: there are no gradients here."""
        return tensor

    def on_weight(self, use: int, op: WeightUse) -> None:
        """Compare the results of an op that uses a weight."""
        for index, result in enumerate(op.results):
            self._compare((op.point.name, use, index), result)

    def _compare(self, key: Key, tensor: Tensor) -> None:
        value = self._whole.get(key)
        if value is None:
            return
        axis = sample_axis(value.tensor, tensor, self._samples, self._fewer, not value.written)
        if axis is not None:
            self.axes[key] = axis


def sample_axis(whole: Tensor, part: Tensor, samples: int, fewer: int, unchanged: bool = True) -> SampleAxis | None:
    """Find the axis of the samples by comparing a tensor with that of a run with fewer samples.

    Args:
        whole: of the run with all ``samples``.
        part: the same tensor in a run with the first ``fewer`` of them.
        samples: number of samples.
        fewer: number of samples in ``part``.
        unchanged: the values can be compared (False: ``whole`` was written since; then only its shape counts).

    Returns:
        None if no axis, or several, could hold them, or if the values of the first samples depend on the others.

    Example:
        >>> x = torch.arange(24.0).reshape(4, 2, 3)
        >>> sample_axis(x, x[:2], 4, 2)
        SampleAxis(axis=0, samples=4, inner=False)
        >>> sample_axis(x.reshape(8, 3), x[:2].reshape(4, 3), 4, 2)
        SampleAxis(axis=0, samples=4, inner=False)
        >>> sample_axis(x - x.mean(0), x[:2] - x[:2].mean(0), 4, 2)  # samples are mixed
    """
    if whole.dim() != part.dim():
        return None
    differing = [axis for axis in range(whole.dim()) if whole.shape[axis] != part.shape[axis]]
    if len(differing) != 1:
        return None
    axis = differing[0]
    length, shorter = whole.shape[axis], part.shape[axis]
    if length % samples or length * fewer != shorter * samples:
        return None
    folded = length // samples
    if not unchanged:
        return SampleAxis(axis, samples) if folded == 1 else None
    first, second = _fingerprint(whole, axis), _fingerprint(part, axis)
    outer = _close(first[:shorter], second)
    if folded == 1:
        return SampleAxis(axis, samples) if outer else None
    inner = _close(first.view(folded, samples)[:, :fewer], second.view(folded, fewer))
    return SampleAxis(axis, samples, inner) if outer != inner else None


def _fingerprint(tensor: Tensor, axis: int) -> Tensor:
    """One number for each entry of an axis: a product of some of its values with fixed pseudo-random weights."""
    rows = tensor.detach().movedim(axis, 0)
    rows = rows.reshape(rows.shape[0], -1)
    rows = rows[:, :: max(1, rows.shape[1] // _COMPARED)]
    rows = torch.nan_to_num(rows.float(), posinf=0.0, neginf=0.0)
    return rows @ torch.arange(1, rows.shape[1] + 1, device=rows.device).float().square().sin()


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= _TOLERANCE * a.abs().max())
