"""Collecting the ops of several traced forwards into one :class:`OpGraph` with readable names."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from lightning_qat.quantization.functions.function_lookup import is_interceptable
from lightning_qat.quantization.interception.call_path import ScopeNode
from lightning_qat.quantization.modules.tensor_leaves import dtype_name, is_float_name
from lightning_qat.quantization.tracing.op_dependence import (
    data_dependent,
    index_only,
    mask_ops,
    random_ops,
    written_with_data,
)
from lightning_qat.quantization.tracing.op_graph import Op, Operand, OpGraph, RegionOutput, Source
from lightning_qat.quantization.tracing.op_records import OpRecord


class GraphBuilder:
    """Collects the records of ops over the traced forwards, and makes the graph of them.

    Args:
        target_type: class name of the target.

    Attributes:
        forwards: how many forwards have ended.
        training: whether the present one runs in train mode.
    """

    def __init__(self, target_type: str) -> None:
        self.target_type = target_type
        self.forwards = 0
        self.training = False
        self._records: dict[str, OpRecord] = {}
        self._order: list[OpRecord] = []
        self._cursor = 0
        self._met: set[str] = set()
        self._seen_by_mode: dict[bool, list[set[str]]] = {False: [], True: []}
        self._broken_off: dict[bool, set[str]] = {False: set(), True: set()}
        self._forward = 0
        self._outputs: dict[str, tuple[str, dict[Source, None]]] = {}
        self._not_scalar: set[str] = set()

    def record(self, digest: str, node: ScopeNode, kind: str) -> OpRecord:
        """Return the record of an op: one per digest, as there will be one set of quantizers per digest."""
        return self._records.setdefault(digest, OpRecord(digest, node))

    def begin(self, training: bool) -> None:
        """Start a forward."""
        self._forward += 1
        self._cursor, self._met, self.training = 0, set(), training

    def met(self, record: OpRecord) -> None:
        """Note a call of an op. A new op is inserted after the op met before it, so the order is that of execution."""
        record.calls[self._forward] = record.calls.get(self._forward, 0) + 1
        if record.key in self._met:
            return
        self._met.add(record.key)
        if len(record.calls) == 1:
            self._order.insert(self._cursor, record)
            self._cursor += 1
        else:
            self._cursor = max(self._cursor, self._index(record) + 1)

    def _index(self, record: OpRecord) -> int:
        try:
            return self._order.index(record, self._cursor)  # nearly always right at the cursor
        except ValueError:
            return self._order.index(record)

    def leaving(self, path: str, tensor: Tensor, source: Source) -> None:
        """Note a tensor that leaves the region."""
        _, sources = self._outputs.setdefault(path, (dtype_name(tensor.dtype), {}))
        sources[source] = None
        if tensor.ndim:
            self._not_scalar.add(path)

    def end(self) -> None:
        """Finish a forward."""
        self.forwards += 1
        self._seen_by_mode[self.training].append(self._met)

    def break_off(self) -> None:
        """End a forward that raised. The ops it met count; no op counts as missing in it."""
        self._broken_off[self.training] |= self._met

    def graph(self, constants: set[str], carried: dict[str, str], writers: dict[str, set[str]]) -> OpGraph:
        """Return the graph of everything that was collected.

        Args:
            constants: names of unknown tensors that stayed the same.
            carried: maps unknown tensors that an op made in an earlier forward to the key of that op.
            writers: maps buffers that were written in a forward to the keys of the ops that did it.
        """
        renamed = self._merge_modes()
        carried = {name: renamed.get(key, key) for name, key in carried.items()}
        writers = {name: {renamed.get(key, key) for key in keys} for name, keys in writers.items()}
        train_only = self._train_only()
        random = random_ops(self._order, train_only)
        changing = written_with_data(self._order, constants, carried, writers, random)
        dependent = data_dependent(self._order, constants, carried, changing, random)
        exact = index_only(self._order, constants, carried, changing, random, dependent)
        names = _display_names(self._order)
        resolver = _SourceResolver(names, dependent, constants, carried, changing)
        facts = _Facts(names, dependent, mask_ops(self._order), exact, train_only)
        outputs = tuple(
            RegionOutput(path, dtype, resolver.resolve(s), path not in self._not_scalar)
            for path, (dtype, s) in self._outputs.items()
        )
        ops = tuple(_op(record, facts, resolver) for record in self._order)
        return OpGraph(self.target_type, ops, outputs, self.forwards, self._varying())

    def _merge_modes(self) -> dict[str, str]:
        """Merge two ops where eval and train mode reach the same place of a module on different call paths.

        ``checkpoint(self.block, x) if self.training else self.block(x)`` runs the same ops on two call paths. They are
        the same where one ran in eval mode only and the other in train mode only, from the same line for the same
        module, and there are as many of them.

        Returns:
            The keys that are gone, each with the one that took its place.
        """
        in_eval, in_train = (self._broken_off[mode].union(*self._seen_by_mode[mode]) for mode in (False, True))
        places: dict[tuple[str, str, str], tuple[list[OpRecord], list[OpRecord]]] = {}
        for record in self._order:
            if (record.key in in_eval) != (record.key in in_train):
                place = record.node.module_path, record.spec.kind, record.location
                places.setdefault(place, ([], []))[record.key in in_train].append(record)
        renamed: dict[str, str] = {}
        for evals, trains in places.values():
            if [record.operands.keys() for record in evals] == [record.operands.keys() for record in trains]:
                for kept, twin in zip(evals, trains, strict=True):
                    kept.absorb(twin)
                    renamed[twin.key] = kept.key
        if renamed:
            self._rename(renamed)
        return renamed

    def _rename(self, renamed: dict[str, str]) -> None:
        def new(sources: dict[Source, None]) -> dict[Source, None]:
            return {dataclasses.replace(s, name=renamed.get(s.name, s.name)): None for s in sources}

        self._order = [record for record in self._order if record.key not in renamed]
        for record in self._order:
            for operand in record.operands.values():
                operand.sources = new(operand.sources)
        self._outputs = {path: (dtype, new(sources)) for path, (dtype, sources) in self._outputs.items()}
        for forwards in (*self._seen_by_mode.values(), *([met] for met in self._broken_off.values())):
            for met in forwards:
                gone = met & renamed.keys()
                met -= gone
                met |= {renamed[key] for key in gone}

    def _train_only(self) -> set[str]:
        """Keys of the ops that ran in train mode and never in eval mode; none if no forward ran in eval mode."""
        in_eval, in_train = self._seen_by_mode[False], self._seen_by_mode[True]
        return self._broken_off[True].union(*in_train).difference(*in_eval) if in_eval else set()

    def _varying(self) -> tuple[str, ...]:
        """Locations of ops that ran in some forwards of a mode and not in others (and are in no dynamic block).

        What training leaves out now and then (layers, at random) and every evaluation runs is the same in all of these.
        """
        some: set[str] = set()
        for forwards in self._seen_by_mode.values():
            if forwards:
                some |= forwards[0].union(*forwards) - forwards[0].intersection(*forwards)
        if in_eval := self._seen_by_mode[False]:
            some -= in_eval[0].intersection(*in_eval)
        varying = (r for r in self._order if r.key in some and not r.node.is_dynamic and is_interceptable(r.spec))
        return tuple(dict.fromkeys(r.location for r in varying))


@dataclass(frozen=True)
class _Facts:
    """What was found out about the ops, by key."""

    names: dict[str, str]
    dependent: set[str]
    masks: set[str]
    exact: set[str]
    train_only: set[str]


@dataclass(frozen=True)
class _SourceResolver:
    """Translates the sources of tensors from record keys to the names of the graph.

    Args:
        names: display names of the ops, by key.
        dependent: keys of the ops that depend on an input of the region.
        constants: unknown tensors that stayed the same.
        carried: unknown tensors that an op made in an earlier forward, with the key of that op.
        changing: buffers that are written while running.
    """

    names: dict[str, str]
    dependent: set[str]
    constants: set[str]
    carried: dict[str, str]
    changing: set[str]

    def resolve(self, sources: Iterable[Source]) -> tuple[Source, ...]:
        """Resolve the sources of one tensor; each result is there once."""
        return tuple(dict.fromkeys(map(self._resolved, sources)))

    def _resolved(self, source: Source) -> Source:
        if source.kind in ("op", "mutated"):
            return Source(source.kind, self.names[source.name], source.output)
        if source.kind == "buffer" and source.name in self.changing:
            return Source("opaque", f"buffer {source.name}, which is written while running")
        if source.kind == "opaque" and source.name in self.carried:
            maker = self.carried[source.name]
            kept = f"a result of {self.names[maker]} that is kept from an earlier forward"
            return Source("opaque" if maker in self.dependent else "constant", kept)
        if source.kind == "opaque":
            return Source("constant", "tensor") if source.name in self.constants else Source("opaque", "unknown")
        return source


def _op(record: OpRecord, facts: _Facts, resolver: _SourceResolver) -> Op:
    return Op(
        name=facts.names[record.key],
        kind=record.spec.kind,
        role=record.spec.role,
        scope=record.node.display,
        module_type=record.node.module_type,
        key=record.key,
        location=record.location,
        reason=record.reason,
        gemm=record.spec.gemm,
        weight_axis=record.spec.weight_axis,
        operands=tuple(_operands(record, facts, resolver)),
        outputs=tuple(record.outputs),
        forwards=len(record.calls),
        calls=max(record.calls.values(), default=0),
        inplace=record.inplace,
        mask=record.key in facts.masks,
        data_dependent=record.key in facts.dependent,
        options=record.options,
        index_only=record.key in facts.exact,
        train_only=record.key in facts.train_only,
        twins=tuple(record.twins),
    )


def _operands(record: OpRecord, facts: _Facts, resolver: _SourceResolver) -> Iterator[Operand]:
    for index, operand in sorted(record.operands.items()):
        from_mask = any(s.kind in ("op", "mutated") and s.name in facts.masks for s in operand.sources)
        yield Operand(
            index,
            operand.name,
            record.role_of(operand),
            operand.dtype,
            operand.shape,
            resolver.resolve(operand.sources),
            operand.mask or from_mask,
            operand.written,
            operand.rewritten,
        )


def _display_names(order: list[OpRecord]) -> dict[str, str]:
    """Name ops: the module path where a module is one op, else ``<scope>.<kind>_<n>``."""
    substantial = Counter(record.node.key for record in order if _is_substantial(record))
    counters: Counter[str] = Counter()
    names: dict[str, str] = {}
    taken = {record.node.display for record in order}
    for record in order:
        node, kind = record.node, record.spec.kind
        alone = substantial[node.key] == 1 and not node.children and node.is_module
        if alone and _is_substantial(record):
            names[record.key] = node.display
            continue
        prefix = f"{node.display}.{kind}" if node.display else kind
        name = f"{prefix}_{counters[prefix]}"
        while name in taken:  # a module of the user is called add_0
            counters[prefix] += 1
            name = f"{prefix}_{counters[prefix]}"
        counters[prefix] += 1
        names[record.key] = name
    return names


def _is_substantial(record: OpRecord) -> bool:
    """Whether an op computes floating-point values rather than moving them or counting."""
    return record.spec.role not in ("pass", "create") and any(is_float_name(dtype) for dtype, _ in record.outputs)
