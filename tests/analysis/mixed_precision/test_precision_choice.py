"""Choosing types from measured errors: no data, no model. Expected values come from the definition of each rule."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_qat.analysis.mixed_precision.op_costs import CostName, OpCost
from lightning_qat.analysis.mixed_precision.point_errors import PointError
from lightning_qat.analysis.mixed_precision.precision_errors import PrecisionErrors
from lightning_qat.quantization.errors import ConfigurationError


def errors_from(
    table: Mapping[str, Mapping[str, float]],
    together: Mapping[str, tuple[str, ...]] | None = None,
    ops: tuple[OpCost, ...] = (),
) -> PrecisionErrors:
    rows = [
        PointError(point, point.rpartition(".")[0], "linear", "activation", dtype, mse, 0.0, True)
        for point, own in table.items()
        for dtype, mse in own.items()
    ]
    alone = {point: (point,) for point, own in table.items() if len(own) > 1}
    return PrecisionErrors(tuple(rows), power=100.0, together=together or alone, ops=ops)


PLAIN = errors_from({f"p{i}.output": {"int8": value, "int16": 0.0} for i, value in enumerate([8, 1, 4, 2, 0.5, 0.25])})


def names(*numbers: int) -> set[str]:
    return {f"p{n}.output" for n in numbers}


def test_top_and_share_take_those_that_gain_most() -> None:
    """D2: a count, a ratio and a percentage of all points; the rest stays narrow."""
    assert set(PLAIN.choose(top=2).raised) == names(0, 2)
    assert set(PLAIN.choose(top="50%").raised) == set(PLAIN.choose(share=0.5).raised) == names(0, 2, 3)
    assert set(PLAIN.choose(share="0.5%").raised) == names(0)  # rounded up: at least one


def test_leaders_are_those_before_the_gap() -> None:
    """D4."""
    gap = errors_from({f"p{i}.output": {"int8": v, "int16": 0.0} for i, v in enumerate([900, 800, *[1.0] * 10])})
    assert set(gap.choose(top="leaders").raised) == names(0, 1)
    flat = errors_from({f"p{i}.output": {"int8": 1.0 + i / 10, "int16": 0.0} for i in range(8)})
    assert flat.choose(top="leaders").raised == ()


def test_explicit_points_and_points_to_raise_in_any_case() -> None:
    """D3, D5."""
    assert set(PLAIN.choose(points=["p5.output"]).raised) == names(5)
    assert set(PLAIN.choose(top=1, always=["p5.output"]).raised) == names(0, 5)
    bound = PLAIN.choose(max_error=4.0, always=["p5.output"])
    assert "p5.output" in bound.raised
    assert bound.predicted <= 4.0


def test_overrides_are_written_as_the_yaml_has_them() -> None:
    table = errors_from({"a.output": {"int8": 1.0, "int16": 0.0}})
    assert table.choose(top=1).overrides == [{"match": "a.output", "activation": {"dtype": "int16"}}]


costs = st.lists(st.floats(0.01, 100), min_size=1, max_size=7)


@given(costs, st.floats(0.01, 0.99))
def test_bound_is_met_with_the_fewest_points(values: list[float], share: float) -> None:
    """D6: with equal costs the fewest points are found exactly; compared with all subsets."""
    table = errors_from({f"p{i}.output": {"int8": v, "int16": v / 1000} for i, v in enumerate(values)})
    bound = share * sum(values) + sum(values) / 1000
    choice = table.choose(max_error=bound)
    assert choice.predicted <= bound
    indices = range(len(values))
    fits = [
        len(raised)
        for count in range(len(values) + 1)
        for raised in itertools.combinations(indices, count)
        if math.fsum(v / 1000 if i in raised else v for i, v in enumerate(values)) <= bound
    ]
    assert len(choice.rows) == min(fits)


@given(costs, st.integers(1, 7))
def test_budget_is_spent_on_the_largest_gains(values: list[float], count: int) -> None:
    table = errors_from({f"p{i}.output": {"int8": v, "int16": 0.0} for i, v in enumerate(values)})
    choice = table.choose(budget=min(1.0, count / len(values)))
    assert choice.predicted == pytest.approx(sum(sorted(values)[: max(0, len(values) - count)]), abs=1e-9)


def test_tied_points_are_raised_together_and_cost_together() -> None:
    """The inputs of an addition that takes one type: raising one alone gains nothing on the device."""
    together = {"p0.output": ("p0.output", "p1.output"), "p1.output": ("p0.output", "p1.output")}
    together |= {"p2.output": ("p2.output",)}
    table = errors_from(
        {
            "p0.output": {"int8": 5, "int16": 0},
            "p1.output": {"int8": 0.1, "int16": 0},
            "p2.output": {"int8": 4, "int16": 0},
        },
        together,
    )
    assert set(table.choose(top=1).raised) == names(0, 1)
    assert set(table.choose(budget=1 / 3).raised) == names(2)
    assert set(table.choose(max_error=5.2).raised) == names(2)
    assert set(table.choose(max_error=4.5).raised) == names(0, 1)


def test_a_point_that_is_not_listed_with_itself_is_still_raised_once() -> None:
    table = errors_from({"a.output": {"int8": 1.0, "int16": 0.0}}, {"a.output": ()})
    assert table.front().rows[-1].raised == 1


def test_several_types_are_climbed_one_by_one() -> None:
    levels = {"int4": 100.0, "int8": 1.0, "int16": 0.0}
    table = errors_from({"a.output": levels, "b.output": {k: v / 10 for k, v in levels.items()}})
    choice = table.choose(max_error=2.0)
    assert {row.point: row.dtype for row in choice.rows} == {"a.output": "int8", "b.output": "int8"}
    assert choice.predicted == pytest.approx(1.1)


OPS = (
    OpCost("fc", "linear", 2000, True, (("x.output",), ("fc.weight",)), ("fc.weight",)),
    OpCost("mm", "matmul", 400, True, (("x.output",), ("y.output",)), ()),
    OpCost("add", "add", 10, False, (("x.output",), ("y.output",)), ("x.output", "y.output")),
)
MIXED = errors_from({name: {"int8": 1.0, "int16": 0.0} for name in ("x.output", "y.output", "fc.weight")}, ops=OPS)


@pytest.mark.parametrize(
    ("raised", "bops", "ops"),
    [
        ((), 1000 * 64 + 200 * 64, 0),
        (("x.output",), 1000 * 128 + 200 * 128, 1),
        (("fc.weight",), 1000 * 128 + 200 * 64, 1),
        (("x.output", "fc.weight", "y.output"), 1000 * 256 + 200 * 256, 2),
    ],
)
def test_costs_equal_their_formulas(raised: tuple[str, ...], bops: int, ops: int) -> None:
    """Bit operations: multiply-accumulates times the bits of both operands. Ops: those that own a raised point."""
    assert MIXED.choose(points=raised, cost="bops").cost == pytest.approx(bops / (1200 * 64))
    assert MIXED.choose(points=raised, cost="ops").cost == pytest.approx(ops / 2)
    assert MIXED.choose(points=raised, cost="points").cost == pytest.approx(len(raised) / 3)


def test_latency_comes_from_a_table() -> None:
    table = {"*": {"int8": 1.0, "int16": 2.0}, "linear": {"int16": 3.0}}
    choice = MIXED.choose(points=["fc.weight"], cost="latency", latency=table)
    assert choice.cost == pytest.approx((2000 * 3 + 400 + 10) / 2410)
    with pytest.raises(ConfigurationError, match="needs the time of each op and type"):
        MIXED.choose(points=["fc.weight"], cost="latency")
    with pytest.raises(ConfigurationError, match="no time for matmul at int8"):
        MIXED.choose(points=["fc.weight"], cost="latency", latency={"linear": {"int8": 1.0, "int16": 3.0}})


def test_cheap_points_go_first_where_cost_is_counted() -> None:
    ops = (
        OpCost("big", "linear", 10**6, True, (("a.output",), ()), ("a.output",)),
        OpCost("small", "linear", 10, True, (("b.output",), ()), ("b.output",)),
    )
    table = errors_from({"a.output": {"int8": 1.0, "int16": 0.0}, "b.output": {"int8": 0.9, "int16": 0.0}}, ops=ops)
    assert table.choose(budget=1.01, cost="bops").raised == ("b.output",)
    assert table.choose(max_error=1.0, cost="bops").raised == ("b.output",)


def test_front_never_gets_worse_and_every_row_can_be_pasted() -> None:
    front = MIXED.front("bops")
    cost, error = [r.cost for r in front.rows], [r.predicted for r in front.rows]
    assert cost == sorted(cost)
    assert error == sorted(error, reverse=True)
    assert front.rows[0].raised == 0
    assert front.rows[-1].predicted == 0.0
    for row, choice in zip(front.rows, front.choices, strict=True):
        assert len(choice.overrides) == row.raised
        assert MIXED.choose(points=choice.raised, cost="bops").cost == pytest.approx(row.cost)


@pytest.mark.parametrize("seed", range(6))
def test_front_is_that_of_the_plain_greedy_search(seed: int) -> None:
    """Against the definition: in each step all points are tried, and the one that gains most per cost is raised.

    Errors span many orders of magnitude, some stand for NaN (1e100), some points are tied, some types gain nothing.
    """
    drawn = random.Random(seed)
    point_names = [f"p{i}.output" for i in range(14)]
    table = {}
    for i, name in enumerate(point_names):
        wide = 10 ** drawn.uniform(-12, 0)
        narrow = 1e100 if drawn.random() < 0.1 else wide * 10 ** drawn.uniform(-0.2, 6)
        middle = drawn.uniform(wide, min(narrow, 10.0)) if narrow > wide else wide
        table[name] = {"int8": narrow, "int12": middle, "int16": wide} if i % 3 else {"int8": narrow, "int16": wide}
    together = {name: (name,) for name in table} | {point_names[0]: (point_names[0], point_names[3])}
    ops = tuple(OpCost(n[:-7], "linear", drawn.randint(1, 99), True, ((n,), ()), (n,)) for n in table)
    front = errors_from(table, together=together, ops=ops).front("bops")
    now, whole = dict.fromkeys(table, 0), sum(op.flops for op in ops) * 8

    def levels(name: str) -> list[float]:
        return list(table[name].values())

    def raised(name: str) -> dict[str, int]:
        after = {**now, name: now[name] + 1}
        for other in together[name]:
            after[other] = max(after[other], min(after[name], len(levels(other)) - 1))
        return after

    def gain(after: dict[str, int]) -> float:
        return math.fsum(levels(n)[now[n]] - levels(n)[level] for n, level in after.items() if level != now[n])

    def cost(at: dict[str, int]) -> float:
        bits = {n: int(list(table[n])[level].removeprefix("int")) for n, level in at.items()}
        return sum(op.flops * bits[op.points[0]] for op in ops) / whole

    expected = [(cost(now), math.fsum(levels(n)[level] for n, level in now.items()))]
    while True:
        steps = [raised(n) for n in table if now[n] + 1 < len(levels(n))]
        steps = [after for after in steps if gain(after) > 0]
        if not steps:
            break
        now = max(steps, key=lambda after: gain(after) / (cost(after) - cost(now)))
        expected.append((cost(now), math.fsum(levels(n)[level] for n, level in now.items())))
    assert [row.predicted for row in front.rows] == [error for _, error in expected]  # bit for bit
    assert [row.cost for row in front.rows] == pytest.approx([c for c, _ in expected])
    for row, choice in zip(front.rows, front.choices, strict=True):
        assert (row.raised, row.predicted) == (len(choice.rows), choice.predicted)
        assert row.cost == pytest.approx(choice.cost)
    assert sum(len(row.added) for row in front.rows) == front.rows[-1].raised == len(front.choices[-1].rows)
    assert [c.predicted for c in front.choices[1:3]] == [row.predicted for row in front.rows[1:3]]


@pytest.mark.parametrize("cost", ["points", "ops", "bops", "latency"])
@pytest.mark.parametrize("seed", range(3))
def test_no_choice_of_a_front_beats_another(cost: CostName, seed: int) -> None:
    """Points that cost nothing more are raised at once: those that no matrix product reads (bops), the second point of
    an op (ops), the second operand (latency), the second step of a point (points). Compared pair by pair.
    """
    drawn = random.Random(seed)
    table, ops = {}, []
    for i in range(8):
        first, second = f"op{i}.input0", f"op{i}.output"
        for name in (first, second):
            wide = 10 ** drawn.uniform(-9, -3)
            table[name] = {"int4": wide * drawn.uniform(9, 99), "int8": wide * drawn.uniform(2, 8), "int16": wide}
        operands = ((first,), (second,)) if i % 2 else ((first,),)
        ops.append(OpCost(f"op{i}", "linear", drawn.randint(1, 99), bool(i % 3), operands, (first, second)))
    times = {"*": {"int4": 1.0, "int8": 1.0, "int16": 2.0, "float32": 4.0}}
    front = errors_from(table, ops=tuple(ops)).front(cost, times)
    assert len(front.rows) > 4
    for one, other in itertools.permutations(front.rows, 2):
        assert one.cost > other.cost * (1 + 1e-8) or one.predicted > other.predicted
    for row, choice in zip(front.rows, front.choices, strict=True):
        assert (row.raised, row.predicted) == (len(choice.rows), choice.predicted)
        assert row.cost == pytest.approx(choice.cost)
    assert sum(len(row.added) for row in front.rows) == len(table)


def test_short_form_of_a_front_accounts_for_every_point() -> None:
    """Of many rows it shows some: what the rows between them add is told with the next, by at most three names."""
    front = errors_from({f"p{i}.output": {"int8": 1.0 + i, "int16": 0.0} for i in range(60)}).front()
    assert len(front.rows) == 61
    (block,) = front.blocks()
    raised, added = (block.columns.index(name) for name in ("raised", "added"))
    assert len(block.rows) == 20
    assert (block.rows[0][raised], block.rows[-1][raised]) == (0, 60)
    for above, row in itertools.pairwise(block.rows):
        names = list(row[added])
        more = int(names.pop().split()[1]) if names[-1].startswith("and ") else 0
        assert len(names) + more == row[raised] - above[raised]
        assert names == [f"p{59 - above[raised] - i}.output" for i in range(len(names))]


def test_steps_that_gain_nothing_are_not_made() -> None:
    table = errors_from({"a.output": {"int8": 1.0, "int16": 2.0}, "b.output": {"int8": 1.0, "int16": 0.0}})
    assert table.front().rows[-1].raised == 1
    assert table.choose(budget=1.0).raised == ("b.output",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of points, top, share, max_error, budget, not none"),
        ({"top": 1, "share": 0.5}, "not top, share"),
        ({"points": ["p0.outputs"]}, r"point 'p0\.outputs'\. Did you mean 'p0\.output'"),
        ({"top": 0}, "top must be a positive number"),
        ({"share": "many"}, "share must be a positive number or a percentage"),
        ({"budget": -1}, "budget must be a positive number"),
        ({"share": 5}, r"share is a share of the whole, at most 1 or '100%', not 5: write '5%'"),
        ({"share": "150%"}, "share is a share of the whole"),
        ({"budget": 10}, "budget is a share of the whole"),
        ({"budget": "101%", "cost": "ops"}, "budget is a share of the whole"),
        ({"top": 2.5}, r"top is a count of points, a percentage up to '100%' or leaders, not 2\.5"),
        ({"top": "150%"}, "top is a count of points"),
        ({"max_error": math.nan}, "max_error is a mean squared error, a number from 0 on, not nan"),
        ({"max_error": -1.0}, "max_error is a mean squared error"),
        ({"max_error": "1e-3"}, "max_error is a mean squared error, a number from 0 on, not '1e-3'"),
        ({"points": "p0.output"}, r"several points belong into a list: write \['p0\.output'\]"),
        ({"top": 1, "always": "p0.output"}, "several points belong into a list"),
        ({"top": 1, "cost": "latency", "latency": {"linear": 2.0}}, "latency is a table of times by kind of op"),
        ({"top": 1, "cost": "watts"}, "unknown cost 'watts'"),
    ],
)
def test_bad_rules_are_one_error(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        PLAIN.choose(**arguments)  # type: ignore[arg-type]


def test_a_bound_that_cannot_be_met_says_the_least_that_can() -> None:
    table = errors_from({"a.output": {"int8": 1.0, "int16": 0.25}})
    with pytest.raises(ConfigurationError, match=r"at most 0\.1: with all points raised it is 0\.25"):
        table.choose(max_error=0.1)
    with pytest.raises(ConfigurationError, match=r"no choice costs at most 0\.5 \(bops\): the least is"):
        MIXED.choose(budget=0.5, cost="bops")
