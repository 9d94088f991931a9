"""Running the target a few times to learn its ops: ``trace(target, calls) -> OpGraph``.

Recorded calls run in the mode that they were made in, examples in both modes. The graph is the union, so it contains
ops that exist in only one mode or branch. Running twice also tells tensors that stay the same (constants) from tensors
whose producer the mode did not see (opaque).
"""

from __future__ import annotations

import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterable
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import nn

from lightning_qat.quantization.errors import TracingError
from lightning_qat.quantization.functions.function_lookup import is_interceptable, spec_of, specialise
from lightning_qat.quantization.functions.mask_values import makes_mask, subtracts_mask
from lightning_qat.quantization.interception.activation_checkpointing import RunningRegion
from lightning_qat.quantization.interception.call_path import CallPaths
from lightning_qat.quantization.interception.call_stack import CallStack
from lightning_qat.quantization.interception.code_locations import user_location
from lightning_qat.quantization.interception.interception import Intercepted, InterceptionMode, Opener, active_mode
from lightning_qat.quantization.interception.op_sequence import RecordedOp, SequenceRecorder
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.modules.garbage_collection import rare_garbage_collection
from lightning_qat.quantization.modules.module_walk import has_lazy_tensors
from lightning_qat.quantization.modules.preservation import preserved, preserved_parameters, preserved_tensors
from lightning_qat.quantization.modules.tensor_leaves import call_leaves, is_float, leaves, named_leaves
from lightning_qat.quantization.tracing.graph_building import GraphBuilder
from lightning_qat.quantization.tracing.op_graph import OpGraph
from lightning_qat.quantization.tracing.op_records import OpRecord
from lightning_qat.quantization.tracing.replays import Replay, replays
from lightning_qat.quantization.tracing.tensor_sources import TensorSources, version_of


@rare_garbage_collection()
def trace(target: nn.Module, batches: Iterable[Any], train_mode: bool = True) -> OpGraph:
    """Trace a module on a few batches and return its ops.

    Its tensors and modes, the batches and the random state are left exactly as they were.

    Args:
        target: the module whose forward is the region.
        batches: see :meth:`~lightning_qat.quantization.modules.call.Call.of`; a few representative ones. A call with
            ``modes`` runs in these, an example in eval and in train mode. An example that fails in train mode only
            (batch norm on one value, missing targets) is left out there, with a warning.
        train_mode: False to run everything in eval mode only.

    Raises:
        TracingError: a forward failed, or there was no batch.

    Example:
        >>> import torch
        >>> graph = trace(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), [torch.ones(2, 4)])
        >>> [op.name for op in graph.ops]
        ['0', '1']
    """
    calls = [Call.of(batch) for batch in batches]
    if calls and any(map(has_lazy_tensors, target.modules())):
        _initialize(target, calls[0])
    tracer = Tracer(target)
    with tracer, preserved(target), preserved_parameters(target), torch.inference_mode(False), torch.no_grad():
        tried = [_run(target, replay) for replay in replays(calls, train_mode)]
    failures = [failure for failure in tried if failure is not None]
    if failures and not tracer.builder.forwards:
        raise failures[0]
    return tracer.graph()


def _initialize(target: nn.Module, call: Call) -> None:
    """Let lazy layers see an input, which they take their shapes from: what they compute then is no op of the model."""
    with preserved(target), torch.inference_mode(False), torch.no_grad():
        _run(target, Replay(call, training=False, as_made=False, required=True))


def _run(target: nn.Module, replay: Replay) -> TracingError | None:
    """Run one forward. Return why it failed, if it did and need not have run."""
    replay.set_modes(target)
    try:
        with preserved_tensors(leaves((replay.call.args, replay.call.kwargs))):
            replay.call.run(target)
    except TracingError:
        raise
    except Exception as error:
        name, mode = type(target).__name__, "train" if replay.training else "eval"
        why = f"{type(error).__name__}: {error}"
        failure = TracingError(f"running {name} on the example batch in {mode} mode failed: {why}")
        failure.__cause__ = error
        if replay.required:
            raise failure from error
        if replay.call.training is None:
            warnings.warn(
                f"{name} does not run on the example in train mode ({why}): ops after that place that run in training "
                "only will stay float. Give an example that it can train on, or write train_mode=False.",
                UserWarning,
                stacklevel=4,
            )
        return failure
    return None


class Tracer(Opener):
    """Context manager that records every forward of ``target`` that happens inside it.

    Use it directly when the forwards are run by somebody else (a training step); otherwise use :func:`trace`.
    """

    def __init__(self, target: nn.Module) -> None:
        self.target = target
        self.builder = GraphBuilder(type(target).__name__)
        self.paths = CallPaths(target, self.builder.record)
        self.sources = TensorSources(target)
        self.orders: dict[bool, tuple[RecordedOp, ...]] = {}
        self._intercepted: Intercepted | None = None
        self._thread = threading.get_ident()

    def __enter__(self) -> Tracer:
        self._intercepted = Intercepted.install(self.target, self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._intercepted is not None:
            self._intercepted.uninstall()
            self._intercepted = None

    def open(self, frame: FrameType) -> InterceptionMode | None:
        """Start recording a forward; a recursive entry is part of the forward that runs.

        Raises:
            TracingError: inference mode is on.
        """
        if threading.get_ident() != self._thread or active_mode(self.paths) is not None:
            return None
        if torch.is_inference_mode_enabled():
            raise TracingError(
                "tracing does not work under inference_mode, which hides the writes to tensors: use torch.no_grad()."
            )
        return _TracingMode(self, frame)

    def run(
        self, mode: InterceptionMode, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run and record one forward. A forward that raises does not count."""
        self.builder.begin(self.target.training)
        self.sources.begin(args, kwargs)
        try:
            with RunningRegion(), mode:
                output = forward(*args, **kwargs)
            _refuse_lazy(self.target, output)
        except BaseException:
            self.builder.break_off()
            raise
        finally:
            mode.identity.clear()
            self.sources.end()
        for path, tensor in named_leaves(output):
            self.builder.leaving(path, tensor, self.sources.source(tensor))
        self.builder.end()
        if isinstance(mode, _TracingMode) and mode.recorder is not None:
            self.orders[self.target.training] = tuple(mode.recorder.ops)
        return output

    def graph(self) -> OpGraph:
        """Return the graph of all recorded forwards.

        Raises:
            TracingError: the target was never called.
        """
        if self.builder.forwards == 0:
            raise TracingError(f"{type(self.target).__name__} was never called while tracing.")
        graph = self.builder.graph(self.sources.constants, self.sources.carried, self.sources.writers)
        if not graph.varying:
            graph.orders.update(self.orders)
        return graph


class _TracingMode(InterceptionMode):
    def __init__(self, tracer: Tracer, frame: FrameType) -> None:
        self.calls = CallStack(tracer.paths, frame)
        super().__init__(self.calls)
        self.tracer = tracer
        self.recorder = None if tracer.target.training in tracer.orders else SequenceRecorder(frame)

    def resumed(self, frame: FrameType, scope: Any) -> InterceptionMode | None:
        return None  # the backward inside a traced step repeats ops that are recorded already

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        spec = spec_of(func)
        if spec.role == "composite":
            return self.run_composite(func, args, kwargs)
        frame = sys._getframe(1)
        record: OpRecord | None = None
        if is_op := is_interceptable(spec):  # identified exactly as at run time: before the call, which may raise
            record = self.calls.op(frame, spec.kind)
            if record is None:
                return func(*args, **kwargs)
        sources = self.tracer.sources
        inputs = call_leaves(args, kwargs)
        operands = sources.operands(inputs)  # before the call, which may write into them
        versions = [version_of(tensor) for tensor in inputs]
        if spec.kind == "iter":  # "for row in x": an iterator cannot be looked into, the rows can
            result: Any = list(args[0].unbind(0))
        else:
            result = func(*args, **kwargs)
        outputs = leaves(result)
        if is_op and record is not None and self.recorder is not None and any(map(is_float, outputs)):
            self.recorder.note(spec.kind, record.key, frame)
        written = [t for t, version in zip(inputs, versions, strict=True) if version_of(t) != version]
        if record is None and (outputs or written):
            record = self.calls.bystander(frame, spec.kind)
        if record is not None:
            builder, refined, location = self.tracer.builder, specialise(spec, args, kwargs), user_location(frame)
            builder.met(record)
            known = record.observe(refined, location, args, kwargs, operands, outputs, written, builder.training)
            record.mask = record.mask or makes_mask(spec.kind, args, kwargs, outputs)
            if subtracts_mask(spec.kind, inputs):
                record.mask = known[1].mask = True
            result = sources.produced(record, result, outputs, written)
            sources.read(inputs, known)
        return iter(result) if spec.kind == "iter" else result


def _refuse_lazy(target: nn.Module, output: Any) -> None:
    if isinstance(output, (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)):
        raise TracingError(
            f"{type(target).__name__}.forward returns a {type(output).__name__}: its ops run after the forward has "
            "ended, where they cannot be quantized. Return a tuple or a list, or quantize the modules inside."
        )
