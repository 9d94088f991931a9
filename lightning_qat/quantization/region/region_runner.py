"""Running a region: it opens a mode whenever the target's forward is entered, and notes ops that the plan lacks."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import nn

from lightning_qat.quantization.errors import ConfigurationError, PlanMismatchError
from lightning_qat.quantization.fake_quant.call_ranges import CallRanges
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.fake_quant.first_scale import takes_first_scale
from lightning_qat.quantization.interception.activation_checkpointing import RunningRegion
from lightning_qat.quantization.interception.call_path import CallPaths, ScopeNode
from lightning_qat.quantization.interception.call_stack import CallStack
from lightning_qat.quantization.interception.code_locations import is_installed, is_weight_hook, user_location
from lightning_qat.quantization.interception.interception import (
    CapturedForward,
    InterceptionMode,
    Opener,
    SpecCache,
    active_mode,
)
from lightning_qat.quantization.interception.op_identity import OpIdentity
from lightning_qat.quantization.interception.op_sequence import OpSequences, SequenceRecorder
from lightning_qat.quantization.modules.exporting import is_exporting
from lightning_qat.quantization.region.bound_points import UNPLANNED, BoundPoint, OpQuantizers, parameter_view, refresh
from lightning_qat.quantization.region.compilation import Compilation
from lightning_qat.quantization.region.compiled_mode import CompiledMode
from lightning_qat.quantization.region.followed_weights import FollowedWeights, State
from lightning_qat.quantization.region.freezing import Freezing
from lightning_qat.quantization.region.region_mode import RegionMode
from lightning_qat.quantization.region.switches import Switches
from lightning_qat.quantization.tracing.op_graph import OpGraph


class RegionRunner(Opener):
    """Opens a :class:`RegionMode` for every entry of the target's forward.

    Args:
        target: the module whose forward is quantized.
        switches: the switches of the region.
        freezing: the frozen parts of the region.

    Attributes:
        call_ranges: the range of each call of points that run several times per forward.
        compilation: how to compile the forward; None for eager mode.
        weights_are_fresh: the scales of weights are up to date in the forward that runs.
        unplanned: maps the place of each op that tracing did not see to how often it ran.
        call_paths: the call tree of the target, which finds the fake-quants of an op.
        functions: the table rows of the torch functions met so far.
    """

    call_paths: CallPaths
    functions: SpecCache
    sequences: OpSequences

    def __init__(self, target: nn.Module, switches: Switches, freezing: Freezing) -> None:
        self.target = target
        self.switches = switches
        self.freezing = freezing
        self.call_ranges = CallRanges()
        self.unplanned: dict[str, int] = {}
        self.compilation: Compilation | None = None
        self.weights_are_fresh = False

    def bind(
        self, target: nn.Module, graph: OpGraph, bound: Mapping[str, OpQuantizers], traced: OpGraph | None
    ) -> None:
        """Take over a graph and its fake-quants.

        Args:
            target: the module whose forward is quantized.
            graph: its ops.
            bound: the fake-quants of every op by its run-time identity.
            traced: the graph of the code of this process; None if only a checkpoint's is there.
        """
        self._graph, self._bound, self._is_restored = graph, bound, traced is None
        self._orders = traced.orders if traced is not None else {}
        points = (p for q in bound.values() for p in (*q.inputs.values(), *([q.output] if q.output else ())))
        self._points = tuple(points)
        self._weights = FollowedWeights(self._points)
        self.functions = SpecCache()
        self.sequences = OpSequences(type(target).__name__)
        self.call_paths = CallPaths(target, self._find)

    def _find(self, digest: str, node: ScopeNode, kind: str) -> OpQuantizers:
        return self._bound.get(digest, UNPLANNED)

    def know_traced_orders(self) -> None:
        """Take the order of the ops from tracing, so that the first forward while quantizing can be captured.

        Without it, an eager forward has to come first: where the order varies, where the plan lacks an op, and where a
        weight is no whole parameter, as only that forward can note which part it is.
        """
        if self.switches.state != "quantize" or not self._orders:
            return
        orders, self._orders = self._orders, {}
        parameters = dict(self.target.named_parameters(remove_duplicate=False))
        weights = [(point, parameters.get(point.parameter or "")) for point in self._points if point.is_weight]
        if any(op.quantizers not in self._bound for ops in orders.values() for op in ops):
            return
        if any(parameter is None for _, parameter in weights):
            return
        for training, ops in orders.items():
            if not self.sequences.of(training):
                known = [dataclasses.replace(op, quantizers=self._bound[op.quantizers]) for op in ops]
                self.sequences.add(training, tuple(known))
        for point, parameter in weights:
            if point.trained is None and parameter is not None:
                point.trained = parameter_view(parameter)

    @property
    def is_off(self) -> bool:  # type: ignore[override]
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
            wanted = self.switches.state == "observe" or bool(self.sequences.problem)
            recorder = self.sequences.recorder(self.target.training, frame, wanted)
            return RegionMode(self, self.identity(frame), recorder=recorder, followed=self._follow_weights())
        if active_mode(self.call_paths) is not None:
            return None
        raise RuntimeError(
            f"the quantized region {type(self.target).__name__} was called inside another one, "
            f"{type(outer.identity.target).__name__}: make only one of the two a target."
        )

    def _follow_weights(self) -> dict[FakeQuantize, State]:
        switches = self.switches
        moves = switches.state == "quantize" and "weight" in switches.updates and self.target.training
        return self._weights.follow() if moves and not torch._C._are_functorch_transforms_active() else {}

    def compile(self, options: bool | Mapping[str, Any]) -> None:
        """Decide whether the forward is compiled, see :meth:`Region.set_compile`."""
        self.switches.eager = options is False
        if options is False:
            self.compilation = None
            return
        compilation = Compilation({} if options is True else options)
        if self.compilation is None or self.compilation.options != compilation.options:  # else what is compiled stays
            self.compilation = compilation

    @property
    def is_compiled(self) -> bool:  # type: ignore[override]
        """Whether compiled code runs: always after the first forward in the present mode, except in an analysis."""
        if self.compilation is None:
            return False
        if self.sequences.varying:
            raise ConfigurationError(
                f"{self._graph.target_type} cannot be compiled: what runs differs from forward to forward at "
                f"{self.sequences.varying}. Leave that part out of the target, or write compile: false."
            )
        return (
            self._can_be_captured
            and not torch.compiler.is_compiling()
            and not torch._C._are_functorch_transforms_active()
            and torch._C._get_tracing_state() is None
            and active_mode() is None
        )

    @property
    def _can_be_captured(self) -> bool:
        switches = self.switches
        return (
            switches.state == "quantize"
            and not switches.eager
            and not switches.taps
            and len(self.sequences.of(self.target.training)) > 0  # torch 2.9 cannot capture `bool` of a list
            and not (switches.first_scales and any(map(self._takes_first_scale, self._points)))
        )

    def _takes_first_scale(self, point: BoundPoint) -> bool:
        return takes_first_scale(point.fake_quant, point.role in self.switches.updates)

    def run_compiled(
        self, captured: CapturedForward, eager: CapturedForward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run what ``torch.compile`` makes of the forward; run it eagerly if other ops run than ever before."""
        assert self.compilation is not None
        self.freezing.hold()
        if "weight" in self.switches.updates:
            self._refresh_weights()
        self.weights_are_fresh = True
        try:
            return self.compilation.run(captured, args, kwargs)
        except torch._dynamo.exc.Unsupported as error:
            text = str(error).partition("\n")[0]
            raise ConfigurationError(
                f"{self._graph.target_type} cannot be compiled as one graph: {text}. Leave that part out of the "
                "target, or write compile: false."
            ) from error
        except torch._dynamo.exc.TorchDynamoException:
            if not self.sequences.problem:
                raise
        finally:
            self.weights_are_fresh = False
        return eager(args, kwargs)

    def _learn_sequence(self, recorder: SequenceRecorder) -> None:
        problem, self.sequences.problem = self.sequences.problem, ""
        if not self.sequences.add(self.target.training, tuple(recorder.ops)) and problem:
            raise PlanMismatchError(problem)

    def _refresh_weights(self) -> None:
        """Bring the scales of weights up to date: this takes less time here than in compiled code."""
        if self.target.training:  # as every eager training forward does
            for point in self._points:
                point.fake_quant.outdated |= point.trained is not None and not point.fake_quant.frozen
            present = set(map(id, self.target.parameters()))
            for fake_quant, (parameter, *_) in self._weights.follow().items():
                fake_quant.outdated = id(parameter) not in present
        refresh(self._points, self.target)

    def captured(self) -> CompiledMode | None:
        """Return the mode for a forward that ``torch.compile`` captures; None if it has to run in eager mode.

        That is the case before the first eager forward in the present mode, if the order of the ops varies, while
        observing or analysing, and in training while points still take their first scale from the data.
        """
        if is_exporting() or not self._can_be_captured or not self.freezing.is_held:
            return None
        return CompiledMode(self, self.sequences)

    def run(
        self, mode: InterceptionMode, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the forward under a mode; frames (and the tensors they hold) are let go at the end."""
        try:
            with RunningRegion(), mode:
                result = forward(*args, **kwargs)
            if isinstance(mode, RegionMode) and mode.recorder is not None:
                self._learn_sequence(mode.recorder)
            return result
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
        # made by the region of the copy; some hold code objects
        rebuilt = ("call_paths", "functions", "sequences", "_bound", "_graph", "_orders", "_points", "_weights")
        kept = {name: value for name, value in self.__dict__.items() if name not in rebuilt}
        return {**kept, "compilation": None}  # copies are for analyses, and run eagerly
