"""Finding where the first NaN of a forward, or the first infinity, comes from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.functions.canonical_kinds import canonical_kind
from lightning_qat.quantization.interception.code_locations import user_location
from lightning_qat.quantization.modules.tensor_leaves import call_leaves, is_float, leaves
from lightning_qat.quantization.region.region import Region
from lightning_qat.quantization.region.switches import Tap
from lightning_qat.quantization.tracing.op_graph import OpGraph


def refuse_nan(tensors: list[Tensor], what: str, region: Region, forward: Callable[[], Any]) -> None:
    """Raise an error if the float output holds NaN: no change of it can be measured.

    Args:
        tensors: tensors of the output.
        what: description of the output, for the message.
        region: the region that computed the output.
        forward: a function that runs the region's target again.

    Raises:
        ConfigurationError: a tensor holds NaN. The message names the op that made the first one.
    """
    if _any_nan(tensors):
        raise ConfigurationError(
            f"{what} of the float model holds NaN, so no change of it can be measured. {first_nan_op(region, forward)}"
        )


def first_nan_op(region: Region, forward: Callable[[], Any]) -> str:
    """Run a forward of a region in float and say which op first returned NaN without having received any.

    Args:
        region: the region whose target runs.
        forward: runs it.
    """
    found = _FirstNaN(region.graph)
    with region.state("off"), torch.no_grad(), found:
        forward()
    return found.message


def first_bad_point(regions: Mapping[str, Region], forward: Callable[[], Any]) -> str | None:
    """Run a forward of a quantized model and name the first point that receives NaN or an infinity.

    Ops that run in float are skipped: masks, for example, are infinite on purpose.

    Args:
        regions: the regions by the path of their target, in state ``quantize``.
        forward: runs them.

    Returns:
        The point with the file and line of its op; None if all values are finite.
    """
    found: list[str] = []

    def watch(path: str, region: Region) -> Tap:
        def tap(name: str, value: Tensor, quantized: Tensor) -> None:
            if not found and not bool(value.isfinite().all()):
                op = region.graph.by_name[region.plan.by_name[name].op]
                found.append(f"{path + ':' if path else ''}{name} ({op.location})")

        return tap

    with ExitStack() as stack:
        for path, region in regions.items():
            stack.enter_context(region.tap(watch(path, region)))
        forward()
    return found[0] if found else None


class _FirstNaN(TorchFunctionMode):
    def __init__(self, graph: OpGraph) -> None:
        super().__init__()
        self._graph = graph
        self.message = "No op of the region made it. It is in the inputs or parameters, or the post-processing made it."

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operands = call_leaves(args, kwargs or {})
        searching = self.message.startswith("No op") and not _any_nan(operands)
        result = func(*args, **(kwargs or {}))
        if searching and _any_nan([*leaves(result), *operands]):  # an op in place writes into an operand
            kind, location = canonical_kind(func), user_location(sys._getframe(1))
            if kind in _UNINITIALIZED:
                return result
            ops = [op.name for op in self._graph.ops if op.kind == kind and op.location == location]
            name = " or ".join(ops) if 0 < len(ops) < 4 else kind
            self.message = f"The first op that made one is {name} at {location}."
        return result


_UNINITIALIZED = frozenset(
    ["empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "empty_permuted", "new"]
)
"""Functions whose results hold arbitrary memory (NaN under deterministic algorithms) until they are written."""


def _any_nan(tensors: list[Tensor]) -> bool:
    return any(is_float(tensor) and bool(tensor.isnan().any()) for tensor in tensors)
