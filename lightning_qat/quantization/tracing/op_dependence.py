"""Which traced ops depend on the data, and which hold masks; both spread through the graph from op to op."""

from __future__ import annotations

from collections.abc import Callable

from lightning_qat.quantization.functions.function_lookup import RANDOM
from lightning_qat.quantization.modules.tensor_leaves import is_float_name
from lightning_qat.quantization.tracing.op_graph import Source
from lightning_qat.quantization.tracing.op_records import OperandRecord, OpRecord


def data_dependent(
    order: list[OpRecord], constants: set[str], carried: dict[str, str], changing: set[str], random: set[str]
) -> set[str]:
    """Return the keys of the ops whose result depends on data.

    Data are the inputs of the region, tensors of unknown origin, and random numbers that the deployed model draws, as a
    generator or a sampled latent variable does.

    Args:
        order: the ops.
        constants: names of unknown tensors that stayed the same.
        carried: maps unknown tensors that an op made in an earlier forward to the key of that op.
        changing: buffers that hold data, see :func:`written_with_data`.
        random: the ops that draw, see :func:`random_ops`.
    """
    return _spread(order, carried, lambda source, _: _is_data(source, constants, carried, changing), set(random))


def random_ops(order: list[OpRecord], train_only: set[str]) -> set[str]:
    """Return the ops that draw floating-point random numbers, in eval mode too.

    What only training draws (noise, stochastic depth) is not part of the deployed model: a weight with such noise is
    still a weight. Random integers are exact.

    Args:
        order: the ops.
        train_only: those that ran in train mode only.
    """
    return {
        record.key
        for record in order
        if record.spec.kind in RANDOM
        and record.key not in train_only
        and any(is_float_name(dtype) for dtype, _ in record.outputs)
    }


def index_only(
    order: list[OpRecord],
    constants: set[str],
    carried: dict[str, str],
    changing: set[str],
    random: set[str],
    dependent: set[str],
) -> set[str]:
    """Return the ``dependent`` ops that compute from nothing but integer inputs and constants.

    Their results are exact, until they meet floating-point data or a parameter (as in an embedding).
    """

    def begins(source: Source, operand: OperandRecord) -> bool:
        is_index = source.kind == "input" and operand.dtype in _INDEX_TYPES
        return not is_index and _is_data(source, constants, carried, changing)

    return dependent - _spread(order, carried, begins, (_parameter_dependent(order) | random) & dependent)


def written_with_data(
    order: list[OpRecord],
    constants: set[str],
    carried: dict[str, str],
    writers: dict[str, set[str]],
    random: set[str],
) -> set[str]:
    """Return the buffers that hold data: values from an input, from random numbers or from a tensor of unknown origin.

    The other buffers are computed from parameters alone, such as the vectors of ``spectral_norm``'s power iteration. A
    weight computed with these is still a weight, and a constant once it is deployed.

    Args:
        order: the ops.
        constants: names of unknown tensors that stayed the same.
        carried: maps unknown tensors that an op made in an earlier forward to the key of that op.
        writers: maps buffers that were written in a forward to the keys of the ops that did it.
        random: the ops that draw, see :func:`random_ops`.
    """
    computing = {record.key for record in order if record.spec.role != "create"}
    changing = {name for name, keys in writers.items() if not keys <= computing}
    while True:
        found = data_dependent(order, constants, carried, changing, random)
        more = {name for name, keys in writers.items() if keys & found} | changing
        if more == changing:
            return changing
        changing = more


_INDEX_TYPES = frozenset(["int64", "int32", "int16", "bool"])  # uint8 holds pixels


def _is_data(source: Source, constants: set[str], carried: dict[str, str], changing: set[str]) -> bool:
    """Whether a tensor that no op of this forward made holds data."""
    if source.kind == "opaque":
        return source.name not in constants and source.name not in carried
    return source.kind == "input" or (source.kind == "buffer" and source.name in changing)


def _spread(
    order: list[OpRecord], carried: dict[str, str], begins: Callable[[Source, OperandRecord], bool], found: set[str]
) -> set[str]:
    """Add to ``found`` the ops that read a tensor at which it ``begins``, or a result of an op that is found."""

    def reads(source: Source, operand: OperandRecord) -> bool:
        if source.kind in ("op", "mutated"):
            return source.name in found
        return begins(source, operand) or (source.kind == "opaque" and carried.get(source.name) in found)

    before = -1
    while len(found) != before:  # more than two rounds only where a dynamic block or a kept tensor feeds earlier ops
        before = len(found)
        for record in order:
            if record.key in found or record.spec.role == "create":
                continue
            if any(reads(s, operand) for operand in record.operands.values() for s in operand.sources):
                found.add(record.key)
    return found


def _parameter_dependent(order: list[OpRecord]) -> set[str]:
    """Ops that read a floating-point parameter, or something computed from one."""
    found: set[str] = set()
    for record in order:
        sources = [s for o in record.operands.values() if is_float_name(o.dtype) for s in o.sources]
        if record.spec.role != "create" and any(
            s.kind == "parameter" or (s.kind in ("op", "mutated") and s.name in found) for s in sources
        ):
            found.add(record.key)
    return found


_MASK_CARRIERS = {"add", "sub", "baddbmm", "addmm", "mul", "maximum", "minimum", "clamp"}


def mask_ops(order: list[OpRecord]) -> set[str]:
    """Return the ops whose result holds "never attend here" fills or is subtracted to get them.

    Ops that move such a tensor, or add to it, hold the fills too.
    """
    subtracted = (s for r in order if r.mask and r.spec.kind == "sub" for s in r.operands[1].sources)
    found = {s.name for s in subtracted if s.kind == "op"}
    for record in order:
        kind, role = record.spec.kind, record.spec.role
        incoming = any(
            operand.mask or any(s.kind in ("op", "mutated") and s.name in found for s in operand.sources)
            for operand in record.operands.values()
        )
        if record.mask or (incoming and (role in ("pass", "join") or kind in _MASK_CARRIERS)):
            found.add(record.key)
    return found
