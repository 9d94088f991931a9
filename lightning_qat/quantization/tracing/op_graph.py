"""The graph that tracing returns: ops, the sources of their operands, and the region's outputs. Plain frozen data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from lightning_qat.quantization.errors import shown
from lightning_qat.quantization.functions.op_spec import Role
from lightning_qat.quantization.interception.op_sequence import RecordedOp
from lightning_qat.quantization.modules.tensor_leaves import is_float_name
from lightning_qat.quantization.reading.plain_values import UnreadableValueError
from lightning_qat.quantization.reading.schema import read_as

SourceKind = Literal["op", "mutated", "input", "parameter", "buffer", "constant", "opaque"]
OperandRole = Literal["data", "weight", "parameter", "index"]


@dataclass(frozen=True)
class Source:
    """Where a tensor comes from.

    ``op``: the result of the op ``name``. ``mutated``: a tensor that op ``name`` wrote into while its result was not
    used (``y.mul_(2)``), or the result of ``name`` after it was written through a view.
    ``input``: a leaf of the region's arguments. ``parameter``, ``buffer``: a tensor of the target.
    ``constant``: any other tensor that stays the same. ``opaque``: a tensor whose producer was not seen, or that was
    made in another forward.
    """

    kind: SourceKind
    name: str
    output: int = 0


@dataclass(frozen=True)
class Operand:
    """One tensor argument of an op.

    Args:
        index: number among the tensor leaves of the call.
        name: name of the parameter, where the op's row knows it.
        role: ``data``, ``weight``, ``parameter`` (such as a bias) or ``index``.
        dtype: name of its type.
        shape: its shape in the last traced forward.
        sources: where it came from, over all forwards.
        mask: it looks like an additive mask.
        written: the op writes into it.
        rewritten: a later op writes into it in the same forward.
    """

    index: int
    name: str
    role: OperandRole
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    mask: bool = False
    written: bool = False
    rewritten: bool = False

    @property
    def is_float(self) -> bool:
        """Whether the operand is a floating-point tensor."""
        return is_float_name(self.dtype)


@dataclass(frozen=True)
class Op:
    """One call of a torch function inside the region.

    Args:
        name: display name, unique in the graph.
        kind: canonical torch function (``conv2d``).
        role: see :data:`~lightning_qat.quantization.functions.op_spec.Role`.
        scope: name of the module call it happened in.
        module_type: class of that module.
        key: run-time identity (digest of the call path).
        location: ``file.py:line`` of the user's code.
        reason: why the op stays float, if it does.
        gemm: whether it is a matrix product.
        weight_axis: channel axis of the weight, if it has one.
        operands: its tensor arguments.
        outputs: ``(dtype, shape)`` of each tensor it returns.
        forwards: in how many traced forwards it ran.
        calls: how often it ran within one forward, at most (above 1 only inside a dynamic block).
        inplace: it wrote into an argument.
        mask: its result is an additive mask.
        data_dependent: its result depends on an input of the region.
        options: other arguments that a check needs, see :mod:`lightning_qat.quantization.tracing.op_options`.
        index_only: it depends on integer inputs of the region, and on no floating-point input or parameter (positions
            and masks computed from token masks or lengths).
        train_only: it ran in train mode only, and forwards in eval mode were traced too.
        twins: further run-time identities, if train mode reaches the op on another call path (checkpointing).
    """

    name: str
    kind: str
    role: Role
    scope: str
    module_type: str
    key: str
    location: str
    reason: str
    gemm: bool
    weight_axis: int | None
    operands: tuple[Operand, ...]
    outputs: tuple[tuple[str, tuple[int, ...]], ...]
    forwards: int
    calls: int
    inplace: bool
    mask: bool
    data_dependent: bool
    options: dict[str, Any] = field(default_factory=dict)
    index_only: bool = False
    train_only: bool = False
    twins: tuple[str, ...] = ()

    @property
    def has_float_output(self) -> bool:
        """Whether the first result is a floating-point tensor."""
        return bool(self.outputs) and is_float_name(self.outputs[0][0])

    def operand(self, index: int) -> Operand:
        """Return the operand with a number among the tensor leaves of the call.

        Raises:
            KeyError: the op was not seen with such an operand.
        """
        for operand in self.operands:
            if operand.index == index:
                return operand
        raise KeyError(f"{self.name} has no operand {index}")


@dataclass(frozen=True)
class RegionOutput:
    """A tensor that leaves the region.

    Args:
        path: where it is in the output.
        dtype: name of its type.
        sources: where it came from, over all forwards.
        is_scalar: it had no dimensions in any forward (a loss).
    """

    path: str
    dtype: str
    sources: tuple[Source, ...]
    is_scalar: bool = False


@dataclass(frozen=True)
class OpGraph:
    """The union of all traced forwards of one target, in execution order.

    Args:
        target_type: class name of the target.
        ops: every torch function call that returned a tensor.
        outputs: the tensors that leave the region.
        forwards: number of traced forwards.
        varying: locations whose op sequence differed between traced forwards.

    Attributes:
        orders: the ops of one forward in each mode (True: train mode) in their order, with keys in the place of
            fake-quants; empty if the order varies. It belongs to the code of this process, and is not stored.
    """

    target_type: str
    ops: tuple[Op, ...]
    outputs: tuple[RegionOutput, ...]
    forwards: int
    varying: tuple[str, ...] = ()
    orders: dict[bool, tuple[RecordedOp, ...]] = field(default_factory=dict, init=False, compare=False, repr=False)

    @cached_property
    def by_name(self) -> dict[str, Op]:
        """Ops by display name."""
        return {op.name: op for op in self.ops}

    @cached_property
    def position(self) -> dict[str, int]:
        """The place of each op in the order of execution."""
        return {op.name: index for index, op in enumerate(self.ops)}

    @cached_property
    def consumers(self) -> dict[str, tuple[Op, ...]]:
        """Which ops read the result of an op; an op that reads it twice is listed once."""
        found: dict[str, dict[str, Op]] = {}
        for op in self.ops:
            for operand in op.operands:
                for source in operand.sources:
                    if source.kind in ("op", "mutated"):
                        found.setdefault(source.name, {})[op.name] = op
        return {name: tuple(ops.values()) for name, ops in found.items()}

    @cached_property
    def leaving(self) -> frozenset[str]:
        """Names of the ops whose result is itself an output of the region."""
        return frozenset(s.name for o in self.outputs for s in o.sources if s.kind in ("op", "mutated"))

    def to_dict(self) -> dict[str, Any]:
        """Return primitives only (JSON, ``weights_only`` checkpoints)."""
        data: dict[str, Any] = primitives(self)
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> OpGraph:
        """Rebuild a graph from :meth:`to_dict`.

        Raises:
            UnreadableValueError: a value does not fit, or an op reads from one that does not exist.
        """
        graph = read_as(cls, data)
        names = {op.name for op in graph.ops}
        if len(names) < len(graph.ops):
            raise UnreadableValueError("holds two ops of one name", ".ops")
        for op in graph.ops:
            for operand in op.operands:
                _check_sources(operand.sources, names, op.name)
        for output in graph.outputs:
            _check_sources(output.sources, names, f"output {output.path}")
        return graph


def primitives(value: Any) -> Any:
    """Convert like ``dataclasses.asdict``, with lists for tuples, so that a round trip through JSON changes nothing."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: primitives(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, (tuple, list)):
        return [primitives(item) for item in value]
    if isinstance(value, dict):
        return {key: primitives(item) for key, item in value.items()}
    return value


def _check_sources(sources: tuple[Source, ...], names: set[str], reader: str) -> None:
    for source in sources:
        if source.kind in ("op", "mutated") and source.name not in names:
            raise UnreadableValueError(f"reads from {shown(source.name)}, which is no op", f".ops[{shown(reader)}]")
