"""Finding the op that made the first NaN of a forward."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_qat.quantization.call_path import user_location
from lightning_qat.quantization.canonical_kinds import canonical_kind
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.op_graph import OpGraph
from lightning_qat.quantization.region import Region
from lightning_qat.quantization.tensor_leaves import call_leaves, is_float, leaves


def refuse_nan(tensors: list[Tensor], what: str, region: Region, forward: Callable[[], Any]) -> None:
    """Refuse a float output with NaN, of which no change can be measured.

    Args:
        tensors: the output.
        what: its description.
        region: a region.
        forward: runs its target again.

    Raises:
        ConfigurationError: there is a NaN; names the op that made it.
    """
    if _any_nan(tensors):
        raise ConfigurationError(
            f"{what} of the float model holds NaN, so that no change of it can be measured. "
            f"{first_nan_op(region, forward)}"
        )


def first_nan_op(region: Region, forward: Callable[[], Any]) -> str:
    """Run a forward of a region in float and say which op first returned NaN without having received any.

    Args:
        region: whose target it is.
        forward: runs it.
    """
    found = _FirstNaN(region.graph)
    with region.state("off"), torch.no_grad(), found:
        forward()
    return found.message


class _FirstNaN(TorchFunctionMode):
    def __init__(self, graph: OpGraph) -> None:
        super().__init__()
        self._graph = graph
        self.message = "No op of the region made it: it is in the inputs or parameters, or a post-processing made it."

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        searching = self.message.startswith("No op")
        if searching and _any_nan(leaves(result)) and not _any_nan(call_leaves(args, kwargs or {})):
            kind, location = canonical_kind(func), user_location(sys._getframe(1))
            ops = [op.name for op in self._graph.ops if op.kind == kind and op.location == location]
            name = " or ".join(ops) if 0 < len(ops) < 4 else kind
            self.message = f"The first op that made one is {name} at {location}."
        return result


def _any_nan(tensors: list[Tensor]) -> bool:
    return any(is_float(tensor) and bool(tensor.isnan().any()) for tensor in tensors)
