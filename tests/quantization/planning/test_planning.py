"""What is quantized, how, and why: the plan of a traced module (design sections 4 and 5)."""

from __future__ import annotations

import fnmatch
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.overrides import Override, Split, WeightOverride, glob_covers
from lightning_qat.quantization.planning.make_plan import make_plan
from lightning_qat.quantization.planning.plan import QuantPlan
from lightning_qat.quantization.qconfig import ActivationConfig, QConfig
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.tracing.op_graph import OpGraph
from lightning_qat.quantization.tracing.tracer import trace
from tests.quantization.models import ZOO, Example, ResNet, Shared, ViT, calibrated

EXAMPLES = pytest.mark.parametrize("example", ZOO.values(), ids=ZOO.keys())
IMAGE = torch.randn(2, 1, 8, 8)


def graph_of(example: Example) -> OpGraph:
    module, args = example.make()
    return trace(module, [args])


@pytest.fixture(scope="module")
def resnet() -> OpGraph:
    return trace(ResNet(), [IMAGE])


# -- properties of every plan


@EXAMPLES
def test_nothing_stays_float_silently(example: Example) -> None:
    """foundation: every op has a status, every op and point that stays float has a reason."""
    graph = graph_of(example)
    plan = make_plan(graph)
    assert [op.name for op in plan.ops] == [op.name for op in graph.ops]
    for op in plan.ops:
        assert op.status == "passes" or op.reason or f"{op.name}.output" in plan.by_name, op
        if op.status == "constant":
            assert not graph.by_name[op.name].data_dependent
    assert all(plan.float_points.values())
    assert all(point.reason for point in plan.points)
    assert not set(plan.by_name) & set(plan.float_points)


@EXAMPLES
def test_quantized_ops_read_only_quantized_tensors(example: Example) -> None:
    """A12: a float operand of a quantized op is quantized at its producer or here, or left out for a stated reason."""
    graph = graph_of(example)
    plan = make_plan(graph)
    groups = {name: set(f.ops) for f in plan.fusions for name in f.ops}

    def on_grid(op: str, source: Any, depth: int = 0) -> bool:
        if source.kind != "op" or depth > 200:
            return False
        producer = graph.by_name[source.name]
        if source.name in groups.get(op, ()) or f"{source.name}.output" in plan.by_name:
            return True
        moves = plan.status[source.name].status == "passes" and producer.data_dependent
        operands = [o for o in producer.operands if o.is_float]
        operands = operands if producer.role == "join" else operands[:1]
        return moves and all(on_grid(op, s, depth + 1) for o in operands for s in o.sources)

    checked = 0
    for op in graph.ops:
        if plan.status[op.name].status not in ("quantized", "fused") or op.role != "quantize":
            continue
        for operand in op.operands:
            name = f"{op.name}.input{operand.index}"
            checked += operand.role == "data"
            if operand.role == "data" and name not in plan.float_points and name not in plan.by_name:
                weight = (
                    f"{op.name}.weight" in plan.by_name and plan.by_name[f"{op.name}.weight"].operand == operand.index
                )
                assert weight or all(on_grid(op.name, s) for s in operand.sources), name
    assert checked


@EXAMPLES
def test_plan_and_graph_survive_json_exactly(example: Example) -> None:
    graph = graph_of(example)
    plan = make_plan(graph, overrides=[{"match": "*", "activation": {"percentile": 99.123456789}}])
    assert OpGraph.from_dict(json.loads(json.dumps(graph.to_dict()))) == graph
    assert QuantPlan.from_dict(json.loads(plan.to_json())) == plan


@EXAMPLES
def test_plan_is_reproducible(example: Example) -> None:
    module, args = example.make()
    graphs = [trace(module, [args]) for _ in range(2)]
    assert graphs[0] == graphs[1]
    assert make_plan(graphs[0]) == make_plan(graphs[1])


# -- where quantizers go


def test_points_of_a_residual_network(resnet: OpGraph) -> None:
    """design 4: one input, one weight per layer, one output per fused group; the last GEMM stays float32."""
    plan = make_plan(resnet)
    assert [p.name for p in plan.points] == [
        "stem.input0",
        "stem.weight",
        "relu_0.output",
        "layers.0.conv1.weight",
        "layers.0.relu.output",
        "layers.0.conv2.weight",
        "layers.0.relu@1.output",
        "layers.1.down.0.weight",
        "layers.1.down.1.output",
        "layers.1.conv1.weight",
        "layers.1.relu.output",
        "layers.1.conv2.weight",
        "layers.1.relu@1.output",
        "mean_0.output",
        "fc.weight",
    ]
    assert plan.float_points == {
        "fc.output": "high-precision output: a GEMM result that leaves the region stays float32"
    }


def test_weights_are_symmetric_and_per_channel(resnet: OpGraph) -> None:
    """design 4: codes -127..127."""
    for point in make_plan(resnet, {"activation": {"scheme": "affine"}}).points:
        assert point.narrow_range == point.is_weight
        assert point.scheme == ("symmetric" if point.is_weight else "affine")
        assert (point.axis, point.channels is None) == ((0, False) if point.is_weight else (None, True))
    plan = make_plan(resnet, {"weight": {"granularity": "per_tensor"}})
    assert {p.axis for p in plan.points} == {None}


@pytest.mark.parametrize(
    ("tail", "float_points"),
    [
        (lambda y: y, ["linear.output"]),
        (lambda y: y.view(-1, 1), ["linear.output"]),
        (lambda y: {"a": [y], "b": y.flip(0)}, ["linear.output"]),
        (lambda y: torch.cat([y, y]), ["cat_0.output", "linear.output"]),
        (lambda y: F.relu(y), []),
        (lambda y: (y, torch.tanh(y)), ["linear.output"]),
    ],
)
def test_gemm_results_that_leave_stay_float32(tail: Any, float_points: list[str]) -> None:
    """A10, A11, design 4."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return tail(self.linear(x))

    graph = trace(Net(), [torch.ones(2, 4)])
    plan = make_plan(graph)
    assert sorted(plan.float_points) == float_points
    if "tanh_0" in graph.by_name:
        assert "tanh_0.input0" in plan.by_name
    if float_points == ["linear.output"]:
        forced = make_plan(graph, overrides=[{"match": "linear.output", "activation": {"dtype": "int16"}}])
        assert forced.by_name["linear.output"].dtype == "int16"


def test_weight_used_twice_has_one_quantizer() -> None:
    """design 3."""
    module, args = ZOO["shared"].make()
    assert isinstance(module, Shared)
    region = insert(module, args)
    assert region.plan.by_name["linear_0.weight"].same_as == "embed.weight"
    assert region.points["linear_0.weight"] is region.points["embed.weight"]
    assert region.points["block.0.weight"] is region.points["block@1.0.weight"]
    weights = [f for name, f in region.fake_quants.items() if name.endswith("weight")]
    assert len(weights) == 2


def test_shared_weight_with_different_dtypes_has_two_quantizers() -> None:
    module, args = ZOO["shared"].make()
    region = insert(module, args, overrides=[{"match": "linear_0", "weight": {"dtype": "int4"}}])
    assert region.points["linear_0.weight"].dtype == "int4"
    assert region.points["embed.weight"].dtype == "int8"


class UsedTwice(nn.Module):
    """A layer that is called twice, an embedding whose weight is the head's too, and a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer, self.other = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, numbers: Tensor) -> Tensor:
        x = self.layer(self.layer(self.embed(numbers)).relu()).relu()
        return F.linear(self.other(x), self.embed.weight)


WIDE = {"weight": {"dtype": "int16"}}


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize(
    ("rules", "wide"),
    [
        ([{"match": "layer.weight", **WIDE}], {"layer.weight", "layer@1.weight"}),
        ([{"match": "layer", **WIDE}], {"layer.weight", "layer@1.weight"}),
        ([{"match": "layer@1.weight", **WIDE}], {"layer@1.weight"}),
        ([{"match": "layer.weight", **WIDE}, {"match": "layer@1.*", "weight": {"dtype": "int8"}}], {"layer.weight"}),
        ([{"match": "layer@1.*", "weight": {"dtype": "int8"}}, {"match": "layer.weight", **WIDE}], {"layer.weight"}),
        (
            [{"match": "*", "weight": {"observer": "mse"}}, {"match": "layer", **WIDE}],
            {"layer.weight", "layer@1.weight"},
        ),
        ([{"match": "embed*", **WIDE}], {"embed.weight"}),
        ([{"op_type": "embedding", **WIDE}], {"embed.weight"}),
        ([{"match": "other.weight", **WIDE}], {"other.weight"}),
    ],
)
def test_rule_that_names_a_weight_holds_for_all_its_uses(
    rules: list[dict[str, Any]], wide: set[str], granularity: str
) -> None:
    """What reports and tables propose names a weight once. Other rules say on their own which uses they cover; two uses
    that another rule told apart before stay apart.
    """
    qconfig = {"weight": {"dtype": "int8", "granularity": granularity}}
    region = insert(UsedTwice().eval(), (torch.tensor([[1, 2, 3]]),), qconfig=qconfig, overrides=rules)
    assert {point.name for point in region.plan.points if point.dtype == "int16"} == wide
    shares = "layer@1.weight" in wide and "layer.weight" in wide
    if shares:
        assert region.points["layer@1.weight"] is region.points["layer.weight"]


def test_rule_that_names_a_weight_holds_for_its_tied_use_where_the_quantizer_is_shared() -> None:
    """One scale for a table and for the head that reads it; with a scale per channel of the head there are two."""
    rule, numbers = [{"match": "embed.weight", **WIDE}], torch.tensor([[1, 2, 3]])
    for granularity, count in (("per_tensor", 2), ("per_channel", 1)):
        plan = insert(UsedTwice().eval(), (numbers,), qconfig={"weight": {"granularity": granularity}}).plan
        assert (plan.by_name["linear_0.weight"].same_as is not None) == (count == 2)
        qconfig = {"weight": {"granularity": granularity}}
        raised = insert(UsedTwice().eval(), (numbers,), qconfig=qconfig, overrides=rule).plan
        assert sum(point.dtype == "int16" for point in raised.points) == count


def test_other_granularity_for_a_named_weight_holds_for_all_its_uses() -> None:
    rule = [{"match": "layer.weight", "weight": {"granularity": "per_tensor"}}]
    region = insert(UsedTwice().eval(), (torch.tensor([[1, 2, 3]]),), overrides=rule)
    assert region.plan.by_name["layer@1.weight"].same_as == "layer.weight"
    assert region.plan.by_name["layer@1.weight"].axis is None
    assert region.plan.by_name["other.weight"].axis == 0


def test_rule_for_the_first_use_asks_nothing_of_hardware_that_does_not_have_it_at_another() -> None:
    """The profile's embeddings have int16 weights, its linear layers have not: the head keeps a quantizer of int8."""
    qconfig = {"weight": {"granularity": "per_tensor"}}
    options: dict[str, Any] = {"qconfig": qconfig, "profile": "generic_int8_int16"}
    numbers = torch.tensor([[1, 2, 3]])
    rule = [{"match": "embed.weight", **WIDE}]
    plan = insert(UsedTwice().eval(), (numbers,), overrides=rule, **options).plan
    assert (plan.by_name["embed.weight"].dtype, plan.by_name["linear_0.weight"].dtype) == ("int16", "int8")
    with pytest.raises(ConfigurationError, match="linear weight only int8"):
        insert(UsedTwice().eval(), (numbers,), overrides=[{"match": "linear_0.weight", **WIDE}], **options)


# -- overrides


def test_last_match_wins_field_by_field(resnet: OpGraph) -> None:
    """design 5: None means inherit."""
    plan = make_plan(
        resnet,
        QConfig(activation=ActivationConfig(observer="percentile", percentile=99.0)),
        [
            {"match": "layers.*", "activation": {"dtype": "int16"}},
            {"match": "layers.1", "activation": {"observer": "kl"}, "weight": {"dtype": "int4"}},
            {"op_type": "relu", "match": "layers.1.*", "activation": {"dtype": "int12"}},
        ],
    )
    found = {name: (p.dtype, p.observer, p.percentile) for name, p in plan.by_name.items()}
    assert found["stem.input0"] == ("int8", "percentile", 99.0)
    assert found["layers.0.relu.output"] == ("int16", "percentile", 99.0)
    assert found["layers.1.down.1.output"] == ("int16", "kl", 99.0)
    assert found["layers.1.relu@1.output"] == ("int12", "kl", 99.0)
    assert found["layers.1.conv1.weight"][:2] == ("int4", "minmax")
    assert plan.by_name["layers.1.relu.output"].reason == ("override 3 (match 'layers.1.*', op_type 'relu')")


def test_later_general_rule_wins_over_an_earlier_specific_one(resnet: OpGraph) -> None:
    """A13: the rule that won is named."""
    rules = [
        {"match": "mean_0.output", "activation": {"dtype": "int16"}},
        {"match": "*", "activation": {"dtype": "int4"}},
    ]
    point = make_plan(resnet, overrides=rules).by_name["mean_0.output"]
    assert (point.dtype, point.reason) == ("int4", "override 2 (match '*')")


@pytest.mark.parametrize(
    ("pattern", "name", "covers"),
    [
        ("decoder.*", "decoder.add_0.output", True),
        ("decoder", "decoder.add_0.output", True),
        ("decoder", "decoder2.add_0.output", False),
        ("*.div_0.input1", "a.b.div_0.input1", True),
        ("*.div_0.input?", "a.div_0.input1", True),
        ("layers[0]*", "layers[0].conv.output", True),
        ("layers[0]*", "layers0.conv.output", False),
        ("a.b", "axb.output", False),
        ("a+", "aa.output", False),
        ("*", "x.output", True),
    ],
)
def test_only_star_and_question_mark_are_special(pattern: str, name: str, covers: bool) -> None:
    """design 5."""
    override = Override(match=pattern, weight=WeightOverride(dtype="int4"))
    assert override.selects(name, "conv2d") is covers


@pytest.mark.parametrize(
    ("activation", "scale"),
    [
        ({"dtype": "int16", "threshold": 100}, 100 / 32768),
        ({"dtype": "int16", "threshold": "100"}, 100 / 32768),
        ({"dtype": "int16", "fixed_scale": "100/32768"}, 100 / 32768),
        ({"fixed_scale": 0.5}, 0.5),
        ({"dtype": "int8", "threshold": 1.28}, 1.28 / 128),
        ({"dtype": "uint8", "threshold": 2.55}, 0.01),
    ],
)
def test_threshold_and_fixed_scale_give_the_exact_scale(activation: dict[str, Any], scale: float) -> None:
    """B6: 100 -> 100/32768; calibration does not move it."""
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    x = torch.randn(2, 4)
    region = calibrated(module, x, overrides=[{"match": "0.input0", "activation": activation}])
    point = region.points["0.input0"]
    assert point.scale.item() == torch.tensor(scale).item()
    assert point.scale_source == "fixed"
    assert region.plan.by_name["0.input0"].fixed_scale == pytest.approx(scale, rel=1e-12)


def test_later_threshold_replaces_an_earlier_fixed_scale(resnet: OpGraph) -> None:
    rules = [{"match": "*", "activation": {"fixed_scale": 3.0}}, {"match": "stem", "activation": {"threshold": 128}}]
    plan = make_plan(resnet, overrides=rules)
    assert (plan.by_name["stem.input0"].fixed_scale, plan.by_name["mean_0.output"].fixed_scale) == (1.0, 3.0)


def test_float32_takes_points_out_with_the_rule_as_the_reason(resnet: OpGraph) -> None:
    rules: list[dict[str, Any]] = [
        {"match": "layers.1", "activation": {"dtype": "float32"}, "weight": {"dtype": "float32"}}
    ]
    plan = make_plan(resnet, overrides=rules)
    assert not [name for name in plan.by_name if name.startswith("layers.1") and "input" not in name]
    assert plan.float_points["layers.1.conv1.weight"] == "float32 by override 1 (match 'layers.1')"


def test_consumer_of_an_excluded_op_gets_an_input_quantizer(resnet: OpGraph) -> None:
    plan = make_plan(resnet, overrides=[{"match": "layers.1", "activation": {"dtype": "float32"}}])
    assert plan.by_name["mean_0.input0"].reason == "default; layers.1.relu@1 is not quantized"


# -- bad input


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"match": "layers.0.conv3", "activation": {"dtype": "int16"}},
            "matches no quantization point. Near names: .*conv1",
        ),
        ({"op_type": "sofmax", "activation": {"dtype": "int16"}}, "op_type 'sofmax'.* matches no quantization point"),
        (
            {"match": "fc.output", "activation": {"observer": "kl"}},
            "only points that stay float: fc.output: high-precision",
        ),
        ({"match": "layers.0.conv1.output", "activation": {"dtype": "int16"}}, "layers.0.conv1 .fused: fused into"),
        (
            {"match": "mean_0", "weight": {"dtype": "int16"}},
            r"'mean_0'\) has weight: and matches only activation points: mean_0.output. "
            r"To change these, write activation: {dtype: int16} instead.$",
        ),
        (
            {"match": "*.conv1.weight", "activation": {"dtype": "int16", "observer": "kl"}},
            r"has activation: and matches only weight points: layers.0.conv1.weight, layers.1.conv1.weight. "
            r"To change these, write weight: {dtype: int16, observer: kl} instead.$",
        ),
        (
            {"match": "layers.0.conv1", "activation": {"threshold": 3}},
            r"only weight points: layers.0.conv1.weight. To change these, write weight: {dtype: int16} instead. "
            r"The output of layers.0.conv1 has no point of its own \(fused into layers.0.relu\).",
        ),
        (
            {"op_type": "conv2d", "match": "*.output", "activation": {"dtype": "int16"}},
            r"matches ops without quantization points, such as stem \(fused: fused into",
        ),
        ({"match": "stem", "activation": {"dtype": "int18"}}, "unknown dtype 'int18': did you mean"),
        ({"match": "stem", "activation": {"observer": "msee"}}, "unknown observer 'msee': did you mean 'mse'"),
        (
            {"match": "stem", "activation": {"dtyp": "int8"}},
            "unknown key in activation of override match 'stem': 'dtyp'",
        ),
        ({"mach": "stem", "activation": {"dtype": "int8"}}, r"unknown key in overrides\[0\]: 'mach'.* 'match'"),
        ({"match": "stem", "activation": {"threshold": 1, "fixed_scale": 1}}, "threshold or fixed_scale, not both"),
        ({"match": "stem", "activation": {"fixed_scale": "1/0"}}, "not a number"),
        ({"match": "stem", "activation": {"fixed_scale": -1}}, "positive number"),
        ({"match": "stem", "activation": {"fixed_scale": "__import__('os')"}}, "not a number"),
        ({"match": "stem", "activation": {"observer": "fixed"}}, "observer fixed needs a scale"),
        ({"match": "stem", "activation": {"fixed_scale": True}}, "positive number, got True"),
        ({"match": "stem"}, "changes nothing"),
        ({"match": "stem", "activation": {}, "weight": {"dtype": None}}, "changes nothing"),
        ({"match": 0, "activation": {"dtype": "int8"}}, r'must be one text in quotes \(such as match: "0"\), got 0'),
        ({"op_type": ["add"], "activation": {"dtype": "int8"}}, r"op_type must be one text.*got \['add'\]"),
        ({"activation": {"dtype": "int8"}}, "needs a selector"),
        ({"match": "stem", "activation": {"percentile": 0.5}}, "in percent"),
        ({"match": "stem", "activation": {"percentile": "99.9"}}, "in percent.*got '99.9'"),
        ({"match": "stem", "activation": {"dtype": ["int8"]}}, r"unknown dtype \['int8'\]: did you mean 'int8'"),
        ({"match": "stem", "activation": {"split": {"sizes": [1, 2]}}}, "split: 'axis' is missing"),
        ({"match": "stem", "weight": {"granularity": "per_chanel"}}, "did you mean 'per_channel'"),
    ],
)
def test_wrong_override_is_one_clear_error(resnet: OpGraph, rule: dict[str, Any], message: str) -> None:
    """Bad input: what happened, and what to write instead."""
    with pytest.raises(ConfigurationError, match=message):
        make_plan(resnet, overrides=[rule])


@pytest.mark.parametrize(
    ("qconfig", "message"),
    [
        ({"activation": {"dtype": "fp8"}}, "unknown dtype 'fp8'"),
        ({"activations": {}}, "unknown key in qconfig: 'activations': did you mean 'activation'"),
        ({"weight": {"scheme": "affine"}}, "unknown key in qconfig.weight"),
        ({"activation": "int8"}, "must be a mapping"),
        ({"activation": {"scheme": "symetric"}}, "did you mean 'symmetric'"),
        ({"activation": None}, "qconfig.activation must be a mapping"),
        ({"activation": {"scheme": None}}, "unknown scheme None"),
        ({"weight": {"granularity": None}}, "unknown granularity None"),
    ],
)
def test_wrong_qconfig_is_one_clear_error(resnet: OpGraph, qconfig: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_plan(resnet, qconfig)


RULE = {"match": "stem", "activation": {"dtype": "int16"}}


@pytest.mark.parametrize("overrides", [RULE, "stem", Override.list_of([RULE])[0], 3])
def test_overrides_that_are_no_list(resnet: OpGraph, overrides: Any) -> None:
    with pytest.raises(ConfigurationError, match="overrides is a list"):
        make_plan(resnet, overrides=overrides)


def test_objects_built_with_mappings_are_those_built_with_objects() -> None:
    """In Python: `QConfig(activation={...})`, which nothing converted before."""
    change = {"dtype": "int16", "split": {"axis": 0, "sizes": [1, 2]}}
    assert QConfig(activation={"dtype": "int4"}) == QConfig.of({"activation": {"dtype": "int4"}})  # type: ignore[arg-type]
    built = Override(match="a", activation=change, weight={"dtype": "int4"})  # type: ignore[arg-type]
    assert built == Override.list_of([{"match": "a", "activation": change, "weight": {"dtype": "int4"}}])[0]
    assert built.activation is not None
    assert built.activation.split == Split(0, [1, 2])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(pattern=st.text("ab.*?[]\\", max_size=6), name=st.text("ab.[]\\\n", min_size=1, max_size=8))
def test_glob_covers_what_fnmatch_finds_in_the_name_or_a_prefix_of_it(pattern: str, name: str) -> None:
    """Only * and ? are special: brackets are spelled out for fnmatch, which gives them a meaning."""
    plain = "".join(f"[{c}]" if c in "[]" else c for c in pattern)
    prefixes = [name, *(name[:i] for i, c in enumerate(name) if c == ".")]
    assert glob_covers(pattern, name) == any(fnmatch.fnmatchcase(prefix, plain) for prefix in prefixes)


def test_softmax_by_op_type() -> None:
    graph = trace(ViT(), [torch.randn(1, 3, 16, 16)])
    plan = make_plan(graph, overrides=[{"op_type": "softmax", "activation": {"dtype": "int16"}}])
    assert {p.name.rpartition(".")[0].rpartition(".")[2] for p in plan.points if p.dtype == "int16"} == {"softmax_0"}
