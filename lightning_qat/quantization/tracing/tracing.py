"""Running the target a few times to learn its ops: ``trace(target, calls) -> OpGraph``.

Each call runs once in eval and once in train mode; the graph is the union, so ops that exist in only one mode or in one
branch are ordinary. Running twice also tells tensors that stay the same (constants) from tensors whose producer the
mode did not see (opaque).
"""

from __future__ import annotations

import copy
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.quantization.errors import TracingError
from lightning_qat.quantization.tracing.activation_checkpointing import RunningRegion
from lightning_qat.quantization.tracing.call_path import CallPaths, ScopeNode, user_location
from lightning_qat.quantization.tracing.graph_building import GraphBuilder, OperandRecord, OpRecord
from lightning_qat.quantization.tracing.interception import CallPathMode, Intercepted, active_mode
from lightning_qat.quantization.tracing.mask_values import has_mask_values, makes_mask, subtracts_mask
from lightning_qat.quantization.tracing.op_graph import OpGraph, Source
from lightning_qat.quantization.tracing.preservation import preserved, preserved_tensors
from lightning_qat.quantization.tracing.tensor_leaves import call_leaves, is_float, leaves, named_leaves
from lightning_qat.quantization.tracing.torch_functions import STATISTICS, is_interceptable, spec_of, specialise


@dataclass(frozen=True)
class Call:
    """The arguments of one forward of the target."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Any) -> Call:
        """Read a batch: a Call, a tensor, a tuple or list of args, a mapping of kwargs, or ``(args, kwargs)``."""
        if isinstance(batch, Call):
            return batch
        if isinstance(batch, Mapping):
            return cls((), dict(batch))
        if isinstance(batch, (tuple, list)):
            if len(batch) == 2 and isinstance(batch[0], (tuple, list)) and isinstance(batch[1], Mapping):
                return cls(tuple(batch[0]), dict(batch[1]))
            return cls(tuple(batch))
        return cls((batch,))

    def copied(self) -> Call:
        """Return a call with the same tensors and modules whose other arguments may be changed by the forward.

        Objects that keep state between forwards, such as the key-value cache of a language model, are copied with
        their tensors; so a call can run several times, and its owner's objects stay as they are.
        """
        return Call(_copied(self.args), _copied(self.kwargs))


def _copied(value: Any) -> Any:
    if type(value) in (tuple, list):
        return type(value)(_copied(item) for item in value)
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (Tensor, nn.Module)) or callable(value) or not hasattr(value, "__dict__"):
        return value
    try:
        return copy.deepcopy(value, {id(tensor): tensor for tensor in leaves(value)})
    except Exception:  # such as tensors with a gradient history: the original has to do
        return value


def trace(target: nn.Module, batches: Iterable[Any], train_mode: bool = True) -> OpGraph:
    """Trace a module on a few batches and return its ops. Module and batches are left exactly as they were.

    Args:
        target: the module whose forward is the region.
        batches: see :meth:`Call.of`; a few representative ones.
        train_mode: also run in train mode.

    Raises:
        TracingError: a forward failed, or there was no batch.

    Example:
        >>> import torch
        >>> graph = trace(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), [torch.ones(2, 4)])
        >>> [op.name for op in graph.ops]
        ['0', '1']
    """
    tracer = Tracer(target)
    # the parameters that a forward of torch's own modules writes: embeddings that limit the norm of their rows
    limited = (m for m in target.modules() if getattr(m, "max_norm", None) is not None)
    rescaled = [p for m in limited for p in m.parameters(recurse=False)]
    with tracer, preserved(target), torch.inference_mode(False), torch.no_grad():
        for batch in batches:
            call = Call.of(batch)
            for training in (False, True) if train_mode else (False, False):
                target.train(training)
                try:
                    with preserved_tensors([*leaves((call.args, call.kwargs)), *rescaled]):
                        own = call.copied()
                        target(*own.args, **own.kwargs)
                except TracingError:
                    raise
                except Exception as error:
                    mode = "train" if training else "eval"
                    raise TracingError(
                        f"running {type(target).__name__} on the example batch in {mode} mode failed: "
                        f"{type(error).__name__}: {error}"
                    ) from error
    return tracer.graph()


class Tracer:
    """Context manager that records every forward of ``target`` that happens inside it.

    Use it directly when the forwards are run by somebody else (a training step); otherwise use :func:`trace`.
    """

    def __init__(self, target: nn.Module) -> None:
        self.target = target
        self.builder = GraphBuilder(type(target).__name__)
        self.paths = CallPaths(target, self.builder.record)
        self.values = _Values(target)
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

    @property
    def is_off(self) -> bool:
        """Never: a tracer is removed when it is done."""
        return False

    def open(self, frame: FrameType) -> CallPathMode | None:
        """Start recording a forward; a recursive entry is part of the forward that runs."""
        if threading.get_ident() != self._thread or active_mode(self.paths) is not None:
            return None
        if torch.is_inference_mode_enabled():
            raise TracingError("trace under torch.no_grad(): inference_mode does not tell which tensors are written.")
        return _TracingMode(self, frame)

    def run(
        self, mode: CallPathMode, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run and record one forward. One that raises is not recorded as a forward."""
        self.builder.begin(self.target.training)
        self.values.begin(args, kwargs)
        try:
            with RunningRegion(), mode:
                output = forward(*args, **kwargs)
            _refuse_lazy(self.target, output)
        finally:
            mode.calls.clear()
            self.values.end()
        for path, tensor in named_leaves(output):
            self.builder.leaving(path, tensor, self.values.source(tensor))
        self.builder.end()
        return output

    def graph(self) -> OpGraph:
        """Return what was recorded.

        Raises:
            TracingError: the target was never called.
        """
        if self.builder.forwards == 0:
            raise TracingError(f"{type(self.target).__name__} was never called while tracing.")
        return self.builder.graph(self.values.constants, self.values.carried, self.values.writers)


class _TracingMode(CallPathMode):
    def __init__(self, tracer: Tracer, frame: FrameType) -> None:
        super().__init__(tracer.paths, frame)
        self.tracer = tracer

    def resumed(self, frame: FrameType, node: ScopeNode) -> CallPathMode | None:
        return None  # a backward pass inside a traced step repeats what was already recorded

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        spec = spec_of(func)
        if spec.role == "composite":
            return self.run_composite(func, args, kwargs)
        frame = sys._getframe(1)
        record: OpRecord | None = None
        if is_interceptable(spec):  # identified exactly as at run time: before the call, which may raise
            record = self.calls.op(frame, spec.kind)
            if record is None:
                return func(*args, **kwargs)
        values = self.tracer.values
        inputs = call_leaves(args, kwargs)
        operands = values.operands(inputs)  # before the call, which may write into them
        versions = [_version(tensor) for tensor in inputs]
        if spec.kind == "iter":  # "for row in x": an iterator cannot be looked into, the rows can
            result: Any = list(args[0].unbind(0))
        else:
            result = func(*args, **kwargs)
        outputs = leaves(result)
        written = [t for t, version in zip(inputs, versions, strict=True) if _version(t) != version]
        if record is None and (outputs or written):
            record = self.calls.bystander(frame, spec.kind)
        if record is not None:
            refined = specialise(spec, args, kwargs)
            location = user_location(frame)
            known = record.observe(refined, location, args, kwargs, operands, outputs, written)
            record.mask = record.mask or makes_mask(spec.kind, args, kwargs, outputs)
            if subtracts_mask(spec.kind, inputs):
                record.mask = known[1].mask = True
            result = values.produced(record, result, outputs, written)
            values.read(inputs, known)
        return iter(result) if spec.kind == "iter" else result


class _Values:
    """Knows where every tensor of the running forward comes from."""

    def __init__(self, target: nn.Module) -> None:
        self._named = {id(p): Source("parameter", name) for name, p in target.named_parameters()}
        self._named |= {id(b): Source("buffer", name) for name, b in target.named_buffers()}
        self._produced: dict[int, _Produced] = {}
        self._unknown: dict[int, tuple[Tensor, int]] = {}  # keeps them alive: a tensor met again is a constant
        self._readers: dict[int, tuple[Any, list[OperandRecord]]] = {}
        self._forward = 0
        self.constants: set[str] = set()
        self.carried: dict[str, str] = {}
        self.writers: dict[str, set[str]] = {}

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start a forward: what earlier ones made is a constant or a state by now."""
        self._forward += 1
        self._produced = {key: entry for key, entry in self._produced.items() if entry.tensor() is not None}
        for path, tensor in named_leaves({**{str(i): a for i, a in enumerate(args)}, **kwargs}):
            if id(tensor) not in self._named:
                self._remember(tensor, Source("input", path))

    def source(self, tensor: Tensor) -> Source:
        """Return where a tensor comes from."""
        named = self._named.get(id(tensor))
        if named is not None:
            return named
        entry = self._produced.get(id(tensor))
        if entry is not None and entry.tensor() is tensor:
            if entry.forward == self._forward:
                written = entry.version != _version(tensor) and entry.source.kind == "op"  # through a view of it
                return Source("mutated", entry.source.name, entry.source.output) if written else entry.source
            if entry.source.kind in ("op", "mutated"):
                name = f"kept {id(tensor)}"
                self.carried[name] = entry.source.name
                return Source("opaque", name)
        known, forward = self._unknown.setdefault(id(tensor), (tensor, self._forward))
        name = f"tensor {id(known)}"
        if forward != self._forward:
            self.constants.add(name)
        return Source("opaque", name)

    def operands(self, inputs: list[Tensor]) -> list[tuple[Tensor, Source, bool]]:
        """Return each input with its source, and whether it is a constant that looks like an additive mask."""
        found = []
        for tensor in inputs:
            source = self.source(tensor)
            masked = source.kind in ("parameter", "buffer", "opaque", "input") and has_mask_values(tensor)
            found.append((tensor, source, masked))
        return found

    def produced(self, record: OpRecord, result: Any, outputs: list[Tensor], written: list[Tensor]) -> Any:
        """Remember the results of an op; results that are an argument written in place come back as an alias.

        The alias tells a use of the result (``y = y.mul_(2)``) from a use of the written tensor (``y.mul_(2)`` alone).
        """
        for tensor in written:
            _, readers = self._readers.pop(_address(tensor), (None, ()))
            for operand in readers:
                operand.rewritten = True
            named = self._named.get(id(tensor))
            if named is None:
                self._remember(tensor, Source("mutated", record.key))
            elif record.spec.kind not in STATISTICS and is_float(tensor):
                self.writers.setdefault(named.name, set()).add(record.key)
        if isinstance(result, Tensor) and any(result is tensor for tensor in written):
            record.inplace = True
            if id(result) in self._named:
                return result
            result = result.view_as(result)
            self._remember(result, Source("op", record.key))
            return result
        for index, tensor in enumerate(outputs):
            if id(tensor) not in self._named and not any(tensor is t for t in written):
                self._remember(tensor, Source("op", record.key, index))
        return result

    def read(self, inputs: list[Tensor], operands: list[OperandRecord]) -> None:
        """Remember who read which memory, to know which of it is written afterwards. Keeps the memory until the end."""
        for tensor, operand in zip(inputs, operands, strict=True):
            address = _address(tensor)
            if address:
                self._readers.setdefault(address, (tensor.untyped_storage(), []))[1].append(operand)

    def end(self) -> None:
        """Let the memory of a forward go."""
        self._readers.clear()

    def _remember(self, tensor: Tensor, source: Source) -> None:
        self._produced[id(tensor)] = _Produced(weakref.ref(tensor), source, _version(tensor), self._forward)


@dataclass
class _Produced:
    tensor: weakref.ref[Tensor]
    source: Source
    version: int
    forward: int


def _refuse_lazy(target: nn.Module, output: Any) -> None:
    if isinstance(output, (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)):
        raise TracingError(
            f"{type(target).__name__}.forward returns a {type(output).__name__}: its ops run after the forward has "
            "ended, where they cannot be quantized. Return a tuple or a list, or quantize the modules inside."
        )


def _version(tensor: Tensor) -> int:
    """How often a tensor (or a view of it) was written; inference tensors do not count."""
    return -1 if tensor.is_inference() else tensor._version


def _address(tensor: Tensor) -> int:
    """Address of the memory of a tensor; 0 where it has none of its own."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, fake and wrapped tensors
        return 0
