"""The mode of a region while ``torch.compile`` captures its forward: ops are identified by their position."""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_qat.quantization.errors import PlanMismatchError
from lightning_qat.quantization.interception.interception import CapturedMode
from lightning_qat.quantization.interception.op_sequence import COMPOSITE, NO_OP, UNKNOWN, OpSequences
from lightning_qat.quantization.modules.tensor_leaves import is_float, leaves
from lightning_qat.quantization.region.bound_points import BoundPoint
from lightning_qat.quantization.region.region_mode import RegionMode, Runner


class CompiledMode(RegionMode, CapturedMode):
    """Applies the fake-quants of a region while its forward is captured. All of it becomes part of the graph.

    What it reads of the region (its state, which scales move, the mode of the target) are guards: a change of them is
    compiled anew.

    Args:
        runner: the parts of the region that a mode needs.
        sequences: the ops in the order of eager forwards.
    """

    def __init__(self, runner: Runner, sequences: OpSequences) -> None:
        TorchFunctionMode.__init__(self)
        self.runner = runner
        self.state = "quantize"
        self.recomputing = False
        self._updates = runner.switches.updates
        self._fresh = runner.weights_are_fresh
        self._factors: dict[str, Tensor] = {}
        self._sequences = sequences
        self._training = runner.target.training
        self._position = 0

    def resumed(self, frame: FrameType, scope: Any) -> None:
        return None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.unflatten:  # its Python code calls super(), which cannot be captured
            func = torch.unflatten
        number = self._sequences.match(self._training, self._position, func)
        if number == NO_OP:
            return func(*args, **kwargs)
        if not torch.compiler.is_dynamo_compiling():
            raise PlanMismatchError(
                f"{type(self.runner.target).__name__} is not captured as one graph: torch.compile runs a part of it in "
                "eager mode, where positions say nothing. Leave that part out of the target, or write compile: false; "
                "torch.compile(..., fullgraph=True) says what breaks the graph."
            )
        if number == COMPOSITE:
            with self:
                return self._sequences.composites[func.__name__](*args, **kwargs)
        if number == UNKNOWN:
            result = func(*args, **kwargs)
            if any(map(is_float, leaves(result))):  # counting and comparing is never quantized
                self._sequences.refuse(self._training, self._position)
            return result
        op = self._sequences.of(self._training)[number][self._position]
        self._position += 1
        return self.run_op(op.quantizers, op.kind, func, args, kwargs)

    def check_end(self) -> None:
        """Refuse a forward that ended before all recorded ops ran."""
        self._sequences.check_end(self._training, self._position)

    def _apply(self, point: BoundPoint, tensor: Tensor) -> Tensor:
        fake_quant = point.fake_quant
        if point.role in self._updates and not fake_quant.frozen:
            if self._fresh and fake_quant.training and point.trained is not None:
                self._note_trained(point, tensor)
            else:
                self._move_scale(point, tensor)
        return fake_quant.forward(tensor)

    def _note_trained(self, point: BoundPoint, weight: Tensor) -> None:
        point.fake_quant.outdated = True  # an eager forward has noted which parameter it is
