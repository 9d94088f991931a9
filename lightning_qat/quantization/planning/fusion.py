"""Which ops the accelerator runs as one, so that only the last of them needs an output quantizer.

Of the patterns that fit, the longest is taken; see :mod:`lightning_qat.quantization.planning.fusion_patterns`.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_qat.quantization.planning.fusion_patterns import DEFAULT_PATTERNS, FusionPatterns
from lightning_qat.quantization.tracing.op_graph import Op, Operand, OpGraph

_ADVICE = "put it into `with dynamic_block(self, ...)`"


@dataclass(frozen=True)
class FusionGroup:
    """Ops that are computed as one; ``ops[-1]`` carries the output quantizer."""

    ops: tuple[str, ...]
    kinds: tuple[str, ...]

    @property
    def sequence(self) -> tuple[str, ...]:
        """The kinds in order. Equal kinds in a row (modules that a dynamic block picks from) count once."""
        return tuple(kind for i, kind in enumerate(self.kinds) if i == 0 or self.kinds[i - 1] != kind)


@dataclass(frozen=True)
class FusionMiss:
    """Ops that match a pattern and are not fused, with the cause and the place in the code."""

    ops: tuple[str, ...]
    kinds: tuple[str, ...]
    cause: str
    location: str


def find_fusions(
    graph: OpGraph, patterns: FusionPatterns = DEFAULT_PATTERNS
) -> tuple[tuple[FusionGroup, ...], tuple[FusionMiss, ...]]:
    """Find the groups to fuse, and the near misses with their cause.

    Args:
        graph: the traced ops.
        patterns: the sequences of kinds that the hardware computes as one.

    Returns:
        Groups in execution order, and misses in execution order.
    """
    finder = _Finder(graph, patterns)
    groups: list[FusionGroup] = []
    misses: list[FusionMiss] = []
    taken: set[str] = set()
    for op in graph.ops:
        if not patterns.next_kinds((op.kind,)) or op.name in taken or not op.data_dependent:
            continue
        chain, miss = finder.chain(op, taken)
        if miss is not None:
            misses.append(miss)
        if len(chain) > 1:
            groups.append(FusionGroup(tuple(o.name for o in chain), tuple(o.kind for o in chain)))
            taken.update(o.name for o in chain)
    return tuple(groups), tuple(misses)


class _Finder:
    def __init__(self, graph: OpGraph, patterns: FusionPatterns) -> None:
        self.graph = graph
        self.patterns = patterns
        self.position = {op.name: i for i, op in enumerate(graph.ops)}

    def chain(self, head: Op, taken: set[str]) -> tuple[list[Op], FusionMiss | None]:
        chain = complete = [head]
        kinds: tuple[str, ...] = (head.kind,)
        while following := self.patterns.next_kinds(kinds):
            last = chain[-1]
            consumers = self.graph.consumers.get(last.name, ())
            fitting = [c for c in consumers if c.kind in following]
            if not fitting:
                break
            follower = fitting[0]
            if self._is_residual(last, follower, taken):
                break
            cause = self._obstacle(last, follower, consumers)
            if cause is not None:
                ops = (*chain, follower)
                miss = FusionMiss(tuple(o.name for o in ops), tuple(o.kind for o in ops), cause, follower.location)
                return complete, miss
            if follower.name in taken:
                break
            chain, kinds = [*chain, *self._twins(last, follower), follower], (*kinds, follower.kind)
            if kinds in self.patterns.sequences:
                complete = chain
        return complete, None

    def _is_residual(self, last: Op, follower: Op, taken: set[str]) -> bool:
        """Of two operands of an add that could both fuse, the one computed last does; the other is the residual."""
        heads = self.patterns.before(follower.kind) - {follower.kind}
        for name in self._producers(follower, exclude=last):
            other = self.graph.by_name[name]
            later = self.position[name] > self.position[last.name]
            same_operand = self._share_operand(last, other, follower)
            alone = len(self.graph.consumers.get(name, ())) == 1
            if later and not same_operand and alone and other.kind in heads:
                return True
        return False

    def _producers(self, op: Op, exclude: Op) -> set[str]:
        names = {s.name for o in op.operands if o.role == "data" for s in o.sources if s.kind == "op"}
        return names - {exclude.name}

    def _share_operand(self, one: Op, other: Op, follower: Op) -> bool:
        return any({one.name, other.name} <= {s.name for s in o.sources} for o in follower.operands)

    def _obstacle(self, last: Op, follower: Op, consumers: tuple[Op, ...]) -> str | None:
        if last.name in self.graph.leaving:
            return "the intermediate result also leaves the region"
        if len(consumers) > 1 and self._varies(last, consumers):
            return f"dynamic code: the place of {follower.name} varies from forward to forward; {_ADVICE}"
        if len(consumers) > 1:
            others = ", ".join(c.name for c in consumers if c is not follower)
            return f"the intermediate result of {last.name} has another consumer: {others}"
        if any(s.kind == "mutated" and s.name == last.name for o in follower.operands for s in o.sources):
            return "the intermediate result is written in place"
        if len(self._twins(last, follower)) + 1 != len(self._fed_by(last, follower).sources):
            return f"dynamic code: {follower.name} reads another tensor in other forwards; {_ADVICE}"
        return None

    def _varies(self, last: Op, consumers: tuple[Op, ...]) -> bool:
        """Whether the consumers are calls from one place in the code, which reads the result in varying rounds."""
        one_place = len({c.location for c in consumers}) == 1
        return one_place and any(len(self._fed_by(last, c).sources) > 1 for c in consumers if self._reads(last, c))

    def _reads(self, last: Op, follower: Op) -> bool:
        return any(s.kind == "op" and s.name == last.name for o in follower.operands for s in o.sources)

    def _fed_by(self, last: Op, follower: Op) -> Operand:
        return next(o for o in follower.operands if any(s.kind == "op" and s.name == last.name for s in o.sources))

    def _twins(self, last: Op, follower: Op) -> list[Op]:
        """Ops of the same kind that feed the same operand of ``follower``: modules picked in a dynamic block."""
        names = [s.name for s in self._fed_by(last, follower).sources if s.kind == "op" and s.name != last.name]
        others = [self.graph.by_name[name] for name in names]
        return [o for o in others if o.kind == last.kind and len(self.graph.consumers.get(o.name, ())) == 1]
