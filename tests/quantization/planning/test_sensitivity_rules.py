"""D2 and D4 in YAML: overrides by the order of a sensitivity table. The order is compared with Python's csv and sort.

The siblings of one wrong table: every other thing that may be wrong with it, or with what is asked of it.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_qat.analysis.sensitivity.sensitivity import sensitivity
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.overrides import Override
from lightning_qat.quantization.planning.make_plan import make_plan, make_plans
from lightning_qat.quantization.planning.plan import QuantPlan
from lightning_qat.quantization.planning.sensitivity_rules import plain_rules
from lightning_qat.quantization.planning.target_paths import possible_points
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.tracing.op_graph import OpGraph
from lightning_qat.quantization.tracing.tracer import trace
from lightning_qat.reporting.files import write_csv
from tests.quantization.models import ZOO, Example

INT16 = {"activation": {"dtype": "int16"}}
X = torch.linspace(-1, 1, 32).reshape(8, 4)
POINTS = ("0.input0", "0.weight", "1.output", "2.weight")


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.fixture(scope="module")
def graph() -> OpGraph:
    return trace(chain(), [X])


def table(path: Path, scores: Mapping[str, object], epoch: int | None = None, region: str = "") -> str:
    """Write or continue a table."""
    head = [*(["epoch"] if epoch is not None else []), "op_name", "point", "score", "region"]
    rows = [[*([epoch] if epoch is not None else []), p.rpartition(".")[0], p, s, region] for p, s in scores.items()]
    with path.open("a", newline="") as file:
        csv.writer(file).writerows([head, *rows] if file.tell() == 0 else rows)
    return str(path)


def wide(plan: QuantPlan) -> set[str]:
    return {point.name for point in plan.points if point.dtype == "int16"}


def rule(path: object, top: object, **changes: Any) -> dict[str, Any]:
    return {"sensitivity": str(path), "top": top, **(changes or INT16)}


SCORES = dict(zip(POINTS, (0.5, 4.0, 2.0, 1.0), strict=True))
BOTH = {**INT16, "weight": {"dtype": "int16"}}


@pytest.mark.parametrize(
    ("top", "changes", "expected"),
    [
        (1, INT16, {"1.output"}),  # weights do not count for a rule about activations
        (2, INT16, {"1.output", "0.input0"}),
        ("1", {"weight": {"dtype": "int16"}}, {"0.weight"}),
        (2, BOTH, {"0.weight", "1.output"}),  # ranked together
        ("0.5%", INT16, {"1.output"}),  # rounded up
        ("50%", INT16, {"1.output"}),  # of two, not of four
        ("50%", BOTH, {"0.weight", "1.output"}),
        ("51%", BOTH, {"0.weight", "1.output", "2.weight"}),
        ("100%", BOTH, set(POINTS)),
        (99, BOTH, set(POINTS)),
        ("leaders", INT16, {"1.output"}),
    ],
)
def test_the_first_points_of_the_table_are_raised(
    graph: OpGraph, tmp_path: Path, top: object, changes: dict[str, Any], expected: set[str]
) -> None:
    path = table(tmp_path / "sensitivity.csv", SCORES)
    plan = make_plan(graph, overrides=[rule(path, top, **changes)])
    assert wide(plan) == expected
    (note,) = plain_rules(Override.list_of([rule(path, top, **changes)]), {"": graph})[1]
    kind = {("activation",): " activation", ("weight",): " weight"}.get(tuple(changes), "")
    assert f"{len(expected)} of the {4 if len(changes) == 2 else 2}{kind} points in the table: " in note


def test_later_rules_win_and_the_plan_is_that_of_plain_rules(graph: OpGraph, tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", SCORES)
    first, last = {"op_type": "linear", **INT16}, {"match": "1", "activation": {"dtype": "int12"}}
    by_table = make_plan(graph, overrides=[first, rule(path, 2, activation={"dtype": "int14"}), last])
    named = [{"match": p, "activation": {"dtype": "int14"}} for p in ("1.output", "0.input0")]
    assert by_table == make_plan(graph, overrides=[first, *named, last])
    assert by_table.by_name["1.output"].dtype == "int12"


def test_the_last_epoch_of_a_growing_table_counts(graph: OpGraph, tmp_path: Path) -> None:
    """Its last line may be half written; an epoch holds only the points whose turn it was."""
    path = table(tmp_path / "t.csv", {"0.input0": 9.0, "1.output": 1.0}, epoch=0)
    table(tmp_path / "t.csv", {"0.input0": 1.0, "1.output": 3.0}, epoch=1)
    with open(path, "a") as file:
        file.write("2,0,0.input0,99")
    assert wide(make_plan(graph, overrides=[rule(path, 1)])) == {"1.output"}


def test_what_turned_the_output_into_nan_comes_first(graph: OpGraph, tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", {"0.input0": math.nan, "1.output": 3.0})
    assert wide(make_plan(graph, overrides=[rule(path, 1)])) == {"0.input0"}
    assert wide(make_plan(graph, overrides=[rule(path, "leaders")])) == {"0.input0"}


def test_a_table_that_the_analysis_wrote(tmp_path: Path) -> None:
    """The whole way: measured, written, read, planned; the expected points by Python's csv and sort."""
    region = insert(chain(), (X,))
    calibrate(region, [X])
    path = write_csv(sensitivity(region, [X]), tmp_path / "sensitivity.csv")
    with open(path, newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: -float(row["score"]))
    fresh = insert(chain(), (X,), overrides=[rule(path, 3, **BOTH)])
    assert wide(fresh.plan) == {row["point"] for row in rows[:3]}
    assert all("sensitivity" not in stored and "top" not in stored for stored in fresh.plan.overrides)
    assert QuantPlan.from_dict(fresh.plan.to_dict()) == fresh.plan


@pytest.mark.parametrize("example", ZOO.values(), ids=ZOO.keys())
def test_every_point_of_every_plan_may_be_in_a_table(example: Example) -> None:
    """No healthy table is refused: names that plans use are among those that are looked for."""
    module, args = example.make()
    traced = trace(module, [args])
    possible = {name for op in traced.ops for name in possible_points(op)}
    assert {point.name for point in make_plan(traced).points} <= possible


def test_loading_a_checkpoint_reads_no_table(tmp_path: Path) -> None:
    path = Path(table(tmp_path / "t.csv", SCORES))
    model = chain()
    region = insert(model, (X,), overrides=[rule(path, 1)])
    calibrate(region, [X])
    path.unlink()
    fresh = chain()
    other = insert(fresh, (X,))
    fresh.load_state_dict(model.state_dict())
    assert other.plan == region.plan
    assert wide(other.plan) == {"1.output"}


def test_a_stored_plan_that_names_a_table_is_refused(graph: OpGraph, tmp_path: Path) -> None:
    """Nobody's checkpoint makes this process open a file."""
    data = make_plan(graph).to_dict()
    data["overrides"] = [rule(table(tmp_path / "t.csv", SCORES), 1)]
    with pytest.raises(ConfigurationError, match=r"overrides must be rules with match or op_type"):
        QuantPlan.from_dict(data)


# -- several targets


def test_targets_of_a_table_with_regions(graph: OpGraph, tmp_path: Path) -> None:
    """Both targets have all names; the region of a row says which is meant."""
    path = table(tmp_path / "t.csv", {"0.input0": 1.0, "1.output": 9.0}, region="head")
    table(tmp_path / "t.csv", {"0.input0": 5.0, "1.output": 0.5}, region="backbone")
    plans = make_plans({"backbone": graph, "head": graph}, overrides=[rule(path, 2)])
    assert {name: wide(plan) for name, plan in plans.items()} == {"backbone": {"0.input0"}, "head": {"1.output"}}


def test_a_part_alone_takes_the_table_of_the_part(graph: OpGraph, tmp_path: Path) -> None:
    """Measured as target `net` of a Trainer run, used with insert(model.net, ...)."""
    path = table(tmp_path / "t.csv", SCORES, region="net")
    assert wide(make_plan(graph, overrides=[rule(path, 1)])) == {"1.output"}


# -- bad input


def refused(graphs: Mapping[str, OpGraph], overrides: Iterable[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_plans(graphs, overrides=overrides)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"t.csv is not a sensitivity table of this model: there is no such file; give the sensitivity.csv of"),
        ("", "it has no rows"),
        ("point,score\n", "it has no rows"),
        ("name,value\na,1\n", "it has no column point and score, only 'name', 'value'"),
        ("point,mse\n0.input0,1\n", "it has no column score, only 'point', 'mse'"),
        ("point,score\n0.input0,high\n", r"rows\[0\].score must be a number, not 'high'"),
        ("point,score\n0.input0,\n", r"rows\[0\].score must be a number, not ''"),
        ("point,score\n0.input0,1\n1.output,-1\n", r"rows\[1\].score must be at least 0"),
        ("point,score\n,1\n", r"rows\[0\].point must be the name of a point"),
        ("point,score\n0.input0,1,2\n", "line 2 has 3 cells, the heading has 2"),
        ("point,score\nlayer.conv.output,1\n1.output,1\n", r"1 of its 2 points are of ops that this model does not "
         r"have: 'layer.conv'"),
        ("point,score\n12.weight,1\n", r"1 of its 1 points.*'12' \(near 12 there are 2, 1\)"),
        ("point,score,region\n0.input0,1,a\n0.input0,1,b\n", "it is about 'a', 'b', and what is quantized here is the "
         "whole model"),
    ],
)  # fmt: skip
def test_damaged_and_foreign_tables(graph: OpGraph, tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "t.csv"
    if content is not None:
        path.write_text(content)
    refused({"": graph}, [rule(path, 1)], message)


def test_a_directory_is_no_table(graph: OpGraph, tmp_path: Path) -> None:
    refused({"": graph}, [rule(tmp_path, 1)], "it is a directory")


def test_a_region_that_is_not_quantized_here(graph: OpGraph, tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", SCORES, region="neck")
    refused({"backbone": graph, "head": graph}, [rule(path, 1)], "about 'neck', and .* here is 'backbone', 'head'")


def test_no_point_of_the_kind_and_no_leader(graph: OpGraph, tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", {"0.weight": 1.0, "2.weight": 0.9})
    refused({"": graph}, [rule(path, 1)], "changes activation points only, and the table has none")
    only = rule(path, "leaders", weight={"dtype": "int16"})
    refused({"": graph}, [only], r"no point has broken away.*scores are 1, 0.9\). Write a count")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top": 0}, r"top must be a positive number or a percentage"),
        ({"top": "0%"}, r"top must be a positive number or a percentage"),
        ({"top": -1}, r"top must be a count of points such as 3, a percentage such as '0.5%', or leaders, not -1"),
        ({"top": 0.5}, r"top must be a count of points such as 3, .* not 0.5"),
        ({"top": True}, r"top must be a count of points"),
        ({"top": "101%"}, r"top must be a count of points"),
        ({"top": "leader"}, r"top must be a count of points .* or leaders, not 'leader'"),
        ({"top": None}, r"sensitivity and top belong together"),
        ({"top": 1, "sensitivity": None}, r"sensitivity and top belong together"),
        ({"top": 1, "sensitivity": 3}, r"sensitivity and top belong together"),
        ({"top": 1, "match": "fc"}, r"two kinds of selectors"),
        ({"top": 1, "op_type": "linear"}, r"two kinds of selectors"),
        ({"top": 1, "activation": None}, r"override sensitivity 't.csv', top 1 changes nothing"),
    ],
)
def test_wrong_rules(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Override.list_of([{"sensitivity": "t.csv", **INT16, **fields}])
