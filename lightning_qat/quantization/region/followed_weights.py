"""The scales of weights that follow them, computed before a training forward for all weights of a region together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.fake_quant.quantization_parameters import write_magnitudes
from lightning_qat.quantization.region.bound_points import BoundPoint

State = tuple[nn.Parameter, int, int]
"""A parameter, its version and its memory: nothing has written into it since, but for the one way around versions."""


class FollowedWeights:
    """Computes the usual scales of weights: symmetric, per channel, of a whole parameter on the CPU.

    To compute them where the weights are used takes several times as long, as each operation of torch has its price.
    What is written into a parameter during the forward is noticed by the op that uses it, and the scale is computed
    there once more; only values that are written in place through ``.data`` are not noticed, as under
    ``torch.compile``.

    Args:
        points: those of the region.
    """

    def __init__(self, points: Iterable[BoundPoint]) -> None:
        usual = (p for p in points if p.is_weight and p.batch_norm is None and p.fake_quant.groups == 1)
        self._points = [p for p in usual if p.fake_quant.axis is not None]

    @torch.no_grad()
    def follow(self) -> dict[FakeQuantize, State]:
        """Compute the scales; return those that were, each with the state of the weight that it belongs to."""
        found: dict[FakeQuantize, State] = {}
        by_limit: dict[int, list[tuple[FakeQuantize, Tensor]]] = defaultdict(list)
        for point in self._points:
            fake_quant = point.fake_quant
            parameter = _parameter(point)
            if parameter is None or fake_quant in found or not _follows(fake_quant):
                continue
            magnitudes = fake_quant.magnitudes(parameter)
            if magnitudes is not None:
                found[fake_quant] = parameter, parameter._version, parameter.data_ptr()
                by_limit[fake_quant.quant_max].append((fake_quant, magnitudes))
        written = {p for pairs in by_limit.values() for p in write_magnitudes(*zip(*pairs, strict=True))}
        return found if len(written) == len(found) else {f: state for f, state in found.items() if f in written}


def is_current(state: State | None, weight: Tensor) -> bool:
    """Whether a scale that was computed before the forward is that of a weight that an op uses."""
    return state is not None and state[0] is weight and state[1] == weight._version and state[2] == weight.data_ptr()


def _parameter(point: BoundPoint) -> nn.Parameter | None:
    """The parameter that a weight was in the last training forward, if it was one as a whole."""
    if point.trained is None:
        return None
    parameter = point.trained[0]
    usual = type(parameter) is nn.Parameter and parameter.is_cpu and not parameter.is_inference()
    if not usual or not parameter.data_ptr():  # sharding frees the memory of whole weights between forwards
        return None
    whole = parameter.size(), parameter.stride(), parameter.storage_offset()
    return parameter if point.trained[1:] == whole else None


def _follows(fake_quant: FakeQuantize) -> bool:
    if fake_quant.frozen or not fake_quant.training or fake_quant.starts_at_zero or fake_quant.learned:
        return False
    return fake_quant.scale_source not in (None, "fixed")
