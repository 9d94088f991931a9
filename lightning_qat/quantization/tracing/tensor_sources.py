"""Where the tensors of a traced forward come from: seen while it runs, by identity of the tensor objects."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_qat.quantization.functions.function_lookup import STATISTICS
from lightning_qat.quantization.functions.mask_values import has_mask_values
from lightning_qat.quantization.modules.tensor_leaves import is_float, named_leaves
from lightning_qat.quantization.tracing.op_graph import Source
from lightning_qat.quantization.tracing.op_records import OperandRecord, OpRecord


class TensorSources:
    """Knows where every tensor of the running forward comes from.

    Args:
        target: the module whose parameters and buffers are known by name.

    Attributes:
        constants: names of unknown tensors that were met in several forwards.
        carried: maps the names of unknown tensors that an op made in an earlier forward to the key of that op.
        writers: maps the names of buffers that were written in a forward to the keys of the ops that did it.
    """

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
        """Start a forward. From now on, tensors of earlier forwards are constants or kept state."""
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
                written = entry.version != version_of(tensor) and entry.source.kind == "op"  # through a view of it
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
        """Remember the results of an op. A result that is an argument written in place is replaced by an alias.

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
        """Remember which operand read which memory, to notice later writes. The memory is kept until :meth:`end`."""
        for tensor, operand in zip(inputs, operands, strict=True):
            address = _address(tensor)
            if address:
                self._readers.setdefault(address, (tensor.untyped_storage(), []))[1].append(operand)

    def end(self) -> None:
        """Release the memory of a forward."""
        self._readers.clear()

    def _remember(self, tensor: Tensor, source: Source) -> None:
        self._produced[id(tensor)] = _Produced(weakref.ref(tensor), source, version_of(tensor), self._forward)


@dataclass
class _Produced:
    tensor: weakref.ref[Tensor]
    source: Source
    version: int
    forward: int


def version_of(tensor: Tensor) -> int:
    """How often a tensor (or a view of it) was written; inference tensors do not count."""
    return -1 if tensor.is_inference() else tensor._version


def _address(tensor: Tensor) -> int:
    """Address of the memory of a tensor; 0 where it has none of its own."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, fake and wrapped tensors
        return 0
