"""Running a region: it opens a mode whenever the target's forward is entered, and notes ops that the plan lacks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import nn

from lightning_qat.quantization.errors import PlanMismatchError
from lightning_qat.quantization.fake_quant.call_ranges import CallRanges
from lightning_qat.quantization.interception.activation_checkpointing import RunningRegion
from lightning_qat.quantization.interception.call_path import (
    CallPaths,
    ScopeNode,
    is_installed,
    is_weight_hook,
    user_location,
)
from lightning_qat.quantization.interception.call_stack import CallStack
from lightning_qat.quantization.interception.interception import InterceptionMode, SpecCache, active_mode
from lightning_qat.quantization.interception.op_identity import OpIdentity
from lightning_qat.quantization.region.bound_points import UNPLANNED, OpQuantizers
from lightning_qat.quantization.region.freezing import Freezing
from lightning_qat.quantization.region.region_mode import RegionMode
from lightning_qat.quantization.region.switches import Switches
from lightning_qat.quantization.tracing.op_graph import OpGraph


class RegionRunner:
    """Opens a :class:`RegionMode` for every entry of the target's forward.

    Args:
        target: the module whose forward is quantized.
        switches: the switches of the region.
        freezing: the frozen parts of the region.

    Attributes:
        call_ranges: the range of each call of points that run several times per forward.
        unplanned: maps the place of each op that tracing did not see to how often it ran.
        call_paths: the call tree of the target, which finds the fake-quants of an op.
        functions: the table rows of the torch functions met so far.
    """

    call_paths: CallPaths
    functions: SpecCache

    def __init__(self, target: nn.Module, switches: Switches, freezing: Freezing) -> None:
        self.target = target
        self.switches = switches
        self.freezing = freezing
        self.call_ranges = CallRanges()
        self.unplanned: dict[str, int] = {}

    def bind(self, target: nn.Module, graph: OpGraph, bound: Mapping[str, OpQuantizers], is_restored: bool) -> None:
        """Take over a graph and its fake-quants.

        Args:
            target: the module whose forward is quantized.
            graph: its ops.
            bound: the fake-quants of every op by its run-time identity.
            is_restored: the graph is that of a checkpoint; the code of this process was not traced.
        """
        self._graph, self._bound, self._is_restored = graph, bound, is_restored
        self.functions = SpecCache()
        self.call_paths = CallPaths(target, self._find)

    def _find(self, digest: str, node: ScopeNode, kind: str) -> OpQuantizers:
        return self._bound.get(digest, UNPLANNED)

    @property
    def is_off(self) -> bool:
        """Whether the plain forward runs."""
        return self.switches.state == "off"

    def identity(self, frame: FrameType) -> OpIdentity:
        """Return the object that identifies the ops of an entry starting in ``frame``, by their call paths."""
        return CallStack(self.call_paths, frame)

    def open(self, frame: FrameType) -> InterceptionMode | None:
        """Return the mode for one entry of the forward; None for a recursive entry, as the running mode covers it.

        Raises:
            RuntimeError: another region is running: its fake-quants would be applied to the same ops.
        """
        outer = active_mode()
        if outer is None:
            self.freezing.hold()
            return RegionMode(self, self.identity(frame))
        if active_mode(self.call_paths) is not None:
            return None
        raise RuntimeError(
            f"the quantized region {type(self.target).__name__} was called inside another one, "
            f"{type(outer.identity.target).__name__}: make only one of the two a target."
        )

    def run(
        self, mode: InterceptionMode, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the forward under a mode; frames (and the tensors they hold) are let go at the end."""
        try:
            with RunningRegion(), mode:
                return forward(*args, **kwargs)
        finally:
            mode.identity.clear()

    def note_unplanned(self, kind: str, frame: FrameType, of_weights: bool) -> None:
        """Count an op that was not seen while tracing; it runs in float and is reported once per place.

        Ops that make a weight and that were added after tracing, such as pruning or a parametrization, are not
        reported: the weight's own fake-quant quantizes their result where it is used. Nor are ops that only
        ``torch.jit.trace`` runs, to which every number is a tensor.

        Args:
            kind: the kind of the op.
            frame: where it is called.
            of_weights: it computes from parameters and buffers alone.

        Raises:
            PlanMismatchError: the plan comes from a checkpoint whose code ran the same ops in every forward, and this
                op is not among them.
        """
        if torch._C._get_tracing_state() is not None or (of_weights and not self._is_restored) or is_weight_hook(frame):
            return
        location = f"{kind} at {user_location(frame)}"
        count = self.unplanned.get(location, 0)
        self.unplanned[location] = count + 1
        if count:
            return
        if self._is_restored and not self._graph.varying:
            raise PlanMismatchError(
                f"the restored plan of {self._graph.target_type} does not know {location}: the code differs from the "
                "one the checkpoint was made with. Restore that code, or insert fake-quant anew and calibrate."
            )
        advice = (
            "Trace more batches; or, as this code is of an installed library, switch off in its settings what makes it "
            "vary (such as layerdrop=0.0)."
            if is_installed(location)
            else "Trace batches that reach it, or, if its repetition varies, put the code into "
            "`with dynamic_block(self, ...)`."
        )
        warnings.warn(
            f"{location} was not seen while tracing {self._graph.target_type}; it runs in float. {advice}",
            UserWarning,
            stacklevel=2,
        )

    def __getstate__(self) -> dict[str, Any]:
        rebuilt = ("call_paths", "functions", "_bound", "_graph")  # by the region of the copy; some hold code objects
        return {name: value for name, value in self.__dict__.items() if name not in rebuilt}
