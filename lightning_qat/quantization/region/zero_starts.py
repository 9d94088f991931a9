"""Which points do not vary because a parameter is zero that training will move: ``zero_starts(region)``."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping

from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.planning.plan import PointPlan
from lightning_qat.quantization.region.region import Region
from lightning_qat.quantization.tracing.op_graph import Op, Operand, Source

_PRODUCTS = frozenset(["mul", "addcmul", "layer_norm", "group_norm", "batch_norm", "instance_norm", "rms_norm"])


def zero_starts(region: Region) -> dict[str, str]:
    """Map each point that calibration saw one value only at to the parameter behind that, if training can change it.

    That is a parameter with a gradient that is zero, and whose product the values are made of: the weight of a layer or
    a norm, or a factor. Mostly the value is zero; behind a sigmoid it is a half. A sum with a zero, a dead relu, or a
    branch that the data do not reach, are none.

    Args:
        region: calibrated.

    Example:
        >>> import torch
        >>> from lightning_qat.quantization.region.calibration import calibrate
        >>> from lightning_qat.quantization.region.insertion import insert
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Tanh())
        >>> for parameter in model.parameters():
        ...     _ = torch.nn.init.zeros_(parameter)
        >>> region = insert(model, (torch.ones(1, 4),))
        >>> with region.state("observe"):
        ...     _ = model(torch.ones(1, 4))
        >>> _ = region.compute_scales()
        >>> zero_starts(region)
        {'0.weight': '0.weight', '0.output': '0.weight', '1.output': '0.weight'}
    """
    points = region.points
    empty = {plan.name for plan in region.plan.points if _is_constant(plan, points[plan.name])}
    if not empty:
        return {}
    parameters = region.target.named_parameters(remove_duplicate=False)
    zero = {name for name, p in parameters if p.requires_grad and p.numel() and not bool(p.detach().any())}
    return _Search(region, points, zero).found(empty) if zero else {}


def _is_constant(plan: PointPlan, fake_quant: FakeQuantize) -> bool:
    if fake_quant.fixed_scale is not None or fake_quant.keeps_scale or not fake_quant.statistics.count:
        return False
    low, high = fake_quant.statistics.range
    return bool((low == high).all()) and not (plan.is_weight and bool(low.any()))


class _Search:
    """Walks from a point back to the parameters that its values are products of, as far as these are zero."""

    def __init__(self, region: Region, points: Mapping[str, FakeQuantize], zero: set[str]) -> None:
        self.region = region
        self.graph = region.graph.by_name
        self.points = points
        self.zero = zero
        self._varying: dict[str, bool] = {}

    def found(self, names: Collection[str]) -> dict[str, str]:
        makers = ((plan.name, self._maker(plan)) for plan in self.region.plan.points if plan.name in names)
        return {name: maker for name, maker in makers if maker is not None}

    def _maker(self, point: PointPlan) -> str | None:
        op = self.graph[point.op]
        if point.role == "output":
            return self._behind([Source("op", op.name)])
        operand = op.operand(point.operand)
        own = self._parameter(operand)
        if own is None and point.batch_norm is not None:  # the folded weight is zero where its factor is
            own = self._factor(self.graph[point.batch_norm])
        return own if own is not None or point.is_weight else self._behind(operand.sources)

    def _behind(self, sources: Iterable[Source]) -> str | None:
        pending, seen = deque(sources), set(sources)
        while pending:
            source = pending.popleft()
            op = self.graph.get(source.name) if source.kind in ("op", "mutated") else None
            if op is None or self._has_values(op):
                continue
            factor = self._factor(op)
            if factor is not None:
                return factor
            for operand in op.operands:
                new = [s for s in operand.sources if s not in seen] if operand.is_float else []
                seen.update(new)
                pending.extend(new)
        return None

    def _has_values(self, op: Op) -> bool:
        """Whether an op's result was seen to vary: what is behind it does not matter."""
        if op.name not in self._varying:
            fake_quant = self.points.get(f"{op.name}.output")
            if fake_quant is None or not fake_quant.statistics.count:
                self._varying[op.name] = False
            else:
                low, high = fake_quant.statistics.range
                self._varying[op.name] = bool((low != high).any())
        return self._varying[op.name]

    def _factor(self, op: Op) -> str | None:
        """A zero parameter that the op multiplies by."""
        if not (op.gemm or op.kind in _PRODUCTS or any(o.role == "weight" for o in op.operands)):
            return None
        names = (self._parameter(operand) for operand in op.operands if operand.name not in _NO_FACTORS)
        return next((name for name in names if name is not None), None)

    def _parameter(self, operand: Operand) -> str | None:
        """The zero parameter that an operand is made of, directly or by ops that depend on no data."""
        pending, seen = list(operand.sources), set(operand.sources)
        while pending:
            source = pending.pop()
            if source.kind == "parameter" and source.name in self.zero:
                return source.name
            op = self.graph.get(source.name) if source.kind in ("op", "mutated") else None
            if op is None or op.data_dependent:
                continue
            new = {s for o in op.operands for s in o.sources} - seen
            seen |= new
            pending.extend(new)
        return None


_NO_FACTORS = frozenset(["bias", "running_mean", "running_var"])
