"""The records of single ops that tracing collects over forwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from lightning_qat.quantization.functions.op_spec import OpSpec
from lightning_qat.quantization.interception.call_path import ScopeNode
from lightning_qat.quantization.modules.tensor_leaves import dtype_name, is_float, is_float_name, named_leaves
from lightning_qat.quantization.tracing.op_graph import OperandRole, Source
from lightning_qat.quantization.tracing.op_options import call_options

_FUNCTORCH_REASON = "runs inside a function transform (vmap, grad), where values are wrapped"
_LAYOUT_REASON = "reads or returns a sparse or nested tensor, which has no grid"


class OpRecord:
    """The facts about one op that tracing has collected so far.

    Args:
        key: its run-time identity.
        node: the module call that it happens in.
    """

    def __init__(self, key: str, node: ScopeNode) -> None:
        self.key = key
        self.node = node
        self.spec = OpSpec("", "float")
        self.location = "?"
        self.reason = ""
        self.operands: dict[int, OperandRecord] = {}
        self.outputs: list[tuple[str, tuple[int, ...]]] = []
        self.calls: dict[int, int] = {}
        self.inplace = False
        self.mask = False
        self.twins: list[str] = []
        self.options: dict[str, Any] = {}

    def observe(
        self,
        spec: OpSpec,
        location: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: list[tuple[Tensor, Source, bool]],
        outputs: list[Tensor],
        written: list[Tensor],
        training: bool,
    ) -> list[OperandRecord]:
        """Add one call to the record.

        Args:
            spec: the row of the function, refined by the options of the call.
            location: ``file.py:line`` of the user's code.
            args: the positional arguments.
            kwargs: the keyword arguments.
            operands: their tensors, each with its source and whether it looks like a mask.
            outputs: the tensors that were returned.
            written: the operands that were written into.
            training: whether the target is in train mode.

        Returns:
            The records of the operands.
        """
        self.spec, self.location, self.reason = spec, location, spec.reason
        obstacle = _obstacle([tensor for tensor, _, _ in operands], outputs)
        if obstacle:
            self.spec, self.reason = OpSpec(spec.kind, "float", reason=obstacle), obstacle
        self.options |= call_options(spec.kind, args, kwargs, training)
        names = _parameter_names(spec, args, kwargs)
        for index, (tensor, source, mask) in enumerate(operands):
            record = self.operands.setdefault(index, OperandRecord(names[index]))
            record.dtype, record.shape = dtype_name(tensor.dtype), _shape(tensor)
            record.sources[source] = None
            record.mask = record.mask or mask
            record.written = record.written or any(tensor is t for t in written)
        if not self.outputs or outputs:
            self.outputs = [(dtype_name(t.dtype), _shape(t)) for t in outputs]
        return [self.operands[index] for index in range(len(operands))]

    def absorb(self, twin: OpRecord) -> None:
        """Take over what was observed of the same op on another call path."""
        self.twins.append(twin.key)
        self.calls |= twin.calls
        self.options |= twin.options
        self.inplace, self.mask = self.inplace or twin.inplace, self.mask or twin.mask
        for index, operand in twin.operands.items():
            own = self.operands[index]
            own.sources |= operand.sources
            own.mask, own.written = own.mask or operand.mask, own.written or operand.written
            own.rewritten = own.rewritten or operand.rewritten

    def role_of(self, operand: OperandRecord) -> OperandRole:
        """Return the role that an operand has in the op."""
        spec = self.spec
        if not is_float_name(operand.dtype):
            return "index"
        parameter, _, in_list = operand.name.partition(".")
        if parameter == "out":
            return "parameter"
        if parameter and parameter in spec.weights:
            return "parameter" if in_list and len(operand.shape) < 2 else "weight"
        if spec.operands is None or not spec.parameters:
            return "data"
        return "data" if operand.name in spec.operands else "parameter"


class OperandRecord:
    """The facts about one operand that tracing has collected so far."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dtype = ""
        self.shape: tuple[int, ...] = ()
        self.sources: dict[Source, None] = {}
        self.mask = False
        self.written = False
        self.rewritten = False


def _parameter_names(spec: OpSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Return the name of the parameter of each leaf of a call, empty where the row does not know it."""
    names = (*spec.parameters[: len(args)], *[""] * (len(args) - len(spec.parameters)))
    arguments = [*zip(names, args, strict=True), *((name, kwargs[name]) for name in sorted(kwargs))]
    return [path if name else "" for name, value in arguments for path, _ in named_leaves(value, name)]


def _obstacle(operands: list[Tensor], outputs: list[Tensor]) -> str:
    """Why an op stays float whatever its row says; nothing if it need not."""
    if any(is_functorch_wrapped_tensor(tensor) and is_float(tensor) for tensor in outputs):
        return _FUNCTORCH_REASON
    if any((tensor.layout is not torch.strided or tensor.is_nested) for tensor in (*operands, *outputs)):
        return _LAYOUT_REASON
    return ""


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape; that of a nested tensor is no numbers."""
    return () if tensor.is_nested else tuple(tensor.shape)
