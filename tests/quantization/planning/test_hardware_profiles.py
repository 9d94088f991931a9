"""Hardware profiles: a plan under a profile has no violation, and every violation of another plan is found."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.planning.fusion import find_fusions
from lightning_qat.quantization.planning.hardware_profile_files import parse_profile, shipped_profiles
from lightning_qat.quantization.planning.make_plan import make_plan
from lightning_qat.quantization.planning.plan import QuantPlan
from lightning_qat.quantization.planning.profile_violations import ProfileViolation, find_violations
from lightning_qat.quantization.tracing.op_graph import OpGraph
from lightning_qat.quantization.tracing.tracer import trace
from tests.quantization.models import ZOO, Wired, calibrated
from tests.quantization.planning.profiles import NARROW, shipped

SHIPPED = shipped_profiles()
IMAGE = torch.linspace(-1, 1, 2 * 4 * 36).reshape(2, 4, 6, 6)
ROWS = torch.linspace(-1, 1, 12).reshape(3, 4)


def wired(function: Callable[[Any, Any], Any]) -> Wired:
    return Wired(
        function,
        conv=nn.Conv2d(4, 4, 1),
        conv2=nn.Conv2d(4, 4, 1),
        up=nn.ConvTranspose2d(4, 4, 1),
        norm=nn.BatchNorm2d(4),
        linear=nn.Linear(4, 4),
        linear2=nn.Linear(4, 4),
        embedding=nn.Embedding(4, 4),
    )


def graph_of(function: Callable[[Any, Any], Any], x: Tensor = IMAGE) -> OpGraph:
    return trace(wired(function), [x])


@functools.cache
def zoo_graph(name: str) -> OpGraph:
    module, args = ZOO[name].make()
    return trace(module, [args])


# -- a plan under a profile has no violation


@pytest.mark.parametrize("profile", SHIPPED)
@pytest.mark.parametrize("name", ZOO)
def test_plan_of_the_defaults_has_no_violation(name: str, profile: str) -> None:
    """Done-when 4 of the breadth issue."""
    plan = make_plan(zoo_graph(name), profile=profile)
    assert find_violations(plan, zoo_graph(name), profile) == ()
    assert plan.profile == shipped(profile).identity()
    assert plan.points


DTYPES = st.sampled_from(["int4", "int8", "int16", "uint8", "uint16", "float32"])
SCHEMES = st.sampled_from(["symmetric", "affine"])
GRANULARITIES = st.sampled_from(["per_tensor", "per_channel"])
QCONFIGS = st.fixed_dictionaries(
    {
        "activation": st.fixed_dictionaries({"dtype": DTYPES, "scheme": SCHEMES}),
        "weight": st.fixed_dictionaries({"dtype": DTYPES, "granularity": GRANULARITIES}),
    }
)
KINDS = ["linear", "conv2d", "add", "relu", "softmax", "layer_norm", "cat", "matmul", "mean", "tanh", "mul", "gelu"]
RULES = st.lists(
    st.fixed_dictionaries(
        {"op_type": st.sampled_from(KINDS)},
        optional={
            "activation": st.fixed_dictionaries({"dtype": DTYPES}, optional={"scheme": SCHEMES}),
            "weight": st.fixed_dictionaries({"dtype": DTYPES}, optional={"granularity": GRANULARITIES}),
        },
    ).filter(lambda rule: len(rule) > 1),
    max_size=3,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(ZOO)), st.sampled_from(SHIPPED), QCONFIGS, RULES)
def test_no_configuration_gives_a_violation(
    name: str, profile: str, qconfig: dict[str, Any], rules: list[dict[str, Any]]
) -> None:
    """Whatever is asked for: a plan without violation, or an error that names the profile or the rule."""
    graph = zoo_graph(name)
    try:
        plan = make_plan(graph, qconfig, rules, shipped(profile))
    except ConfigurationError as error:
        assert rules
        assert "override" in str(error)  # noqa: PT017
        return
    assert find_violations(plan, graph, shipped(profile)) == ()
    for point in plan.points:  # what the files say, read without the code under test
        rule = shipped(profile).rules.get(graph.by_name[point.op].kind)
        if point.is_weight and rule is not None:
            assert any(point.dtype in s.weight for s in rule.signatures), point


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(ZOO)), st.sampled_from(SHIPPED), QCONFIGS)
def test_without_overrides_there_is_always_a_plan(name: str, profile: str, qconfig: dict[str, Any]) -> None:
    plan = make_plan(zoo_graph(name), qconfig, profile=shipped(profile))
    for op in plan.ops:
        assert op.status == "passes" or op.reason or f"{op.name}.output" in plan.by_name, op


def test_plan_without_a_profile_is_as_before() -> None:
    plan = make_plan(zoo_graph("resnet"))
    assert plan.profile is None
    assert QuantPlan.from_dict(plan.to_dict()) == plan
    under = make_plan(zoo_graph("resnet"), profile="generic_int8_int16")
    assert under.points == plan.points  # int8 and symmetric: nothing to change
    assert QuantPlan.from_dict(under.to_dict()) == under


# -- what planning does where defaults and hardware differ

INT16 = {"activation": {"dtype": "int16"}}


def under(function: Callable[[Any, Any], Any], x: Tensor = IMAGE, **options: Any) -> QuantPlan:
    graph = graph_of(function, x)
    plan = make_plan(graph, profile=parse_profile(NARROW, "narrow"), **options)
    assert find_violations(plan, graph, parse_profile(NARROW, "narrow")) == ()
    return plan


def test_default_gives_way_to_the_nearest_type() -> None:
    point = under(lambda m, x: torch.softmax(m.conv(x), 1)).by_name["softmax_0.output"]
    assert (point.dtype, point.reason) == ("int16", "default; profile narrow: softmax output only int16")


def test_consumer_that_cannot_read_its_producer_requantizes() -> None:
    """Mixed precision: int16 out of softmax, int8 into the convolution."""
    plan = under(lambda m, x: m.conv2(torch.softmax(m.conv(x), 1).flip(0)))
    point = plan.by_name["conv2.input0"]
    assert point.dtype == "int8"
    assert point.reason == "default; requantized: softmax_0 gives int16 symmetric"


def test_requantization_takes_part_in_the_forward() -> None:
    """The value is on both grids, and with the region off nothing is left of them."""
    model = wired(lambda m, x: m.conv2(torch.softmax(m.conv(x), 1)))
    reference = model(IMAGE)
    region = calibrated(model, IMAGE, profile=parse_profile(NARROW, "narrow"))
    seen: dict[str, Tensor] = {}
    with region.tap(lambda name, value, quantized: seen.update({name: quantized, f"{name} before": value})):
        model(IMAGE)
    assert torch.equal(seen["conv2.input0 before"], seen["softmax_0.output"])
    steps = seen["conv2.input0"] / region.points["conv2.input0"].scale
    assert torch.allclose(steps, steps.round(), atol=1e-4)
    assert not torch.equal(seen["conv2.input0"], seen["softmax_0.output"])
    region.set_state("off")
    assert torch.equal(model(IMAGE), reference)


def test_join_of_two_types_reads_one() -> None:
    plan = under(lambda m, x: torch.relu(torch.cat([torch.softmax(m.conv(x), 1), torch.relu(m.conv2(x))], 1)))
    assert plan.by_name["cat_0.output"].dtype == "int8"
    assert plan.by_name["cat_0.input0"].dtype == "int8"
    assert "cat_0.input1" not in plan.by_name


def test_join_reads_no_floats() -> None:
    plan = under(lambda m, x: torch.relu(torch.cat([x, torch.relu(m.conv(x))], 1)))
    assert plan.by_name["cat_0.input0"].reason == "default; input 0"


def test_inputs_of_one_type_follow_the_output() -> None:
    rules = [{"op_type": "add", "activation": {"dtype": "int16"}}]
    plan = under(lambda m, x: torch.sigmoid(torch.relu(m.conv(x)) + torch.softmax(x, 1)), overrides=rules)
    found = {p.name: p.dtype for p in plan.points if p.op.startswith("add")}
    assert found == {"add_0.input0": "int16", "add_0.output": "int16"}


def test_unsupported_op_runs_in_float_and_its_consumer_quantizes() -> None:
    plan = under(lambda m, x: m.conv2(torch.tanh(m.conv(x))))
    assert plan.status["tanh_0"].status == "float"
    assert plan.status["tanh_0"].reason == "profile narrow: tanh is not supported (no table for it): runs in float"
    assert plan.by_name["conv2.input0"].reason == "default; tanh_0 is not quantized"


def test_type_passes_through_the_movement_behind_it() -> None:
    plan = under(lambda m, x: m.conv2(F.max_pool2d(m.conv(x).flip(0), 2)), qconfig=INT16)
    point = plan.by_name["conv.output"]
    assert point.dtype == "int8"
    assert point.reason == "default; profile narrow: max_pool2d, which its result goes through, has only int8"
    with pytest.raises(ConfigurationError, match=r"asks for int16 at conv\.output.*max_pool2d"):
        under(lambda m, x: m.conv2(F.max_pool2d(m.conv(x), 2)), overrides=[{"match": "conv.output", **INT16}])


def test_result_that_leaves_is_quantized_where_there_is_no_float_output() -> None:
    plan = under(lambda m, x: m.conv(x))
    assert plan.by_name["conv.output"].reason == "default; profile narrow: conv2d has no float32 output"
    plan = under(lambda m, x: m.linear(x), ROWS)
    assert plan.float_points["linear.output"].startswith("high-precision output")


def test_granularity_and_scheme_give_way_too() -> None:
    plan = under(lambda m, x: torch.relu(m.linear(x)), ROWS, qconfig={"activation": {"scheme": "affine"}})
    weight, output = plan.by_name["linear.weight"], plan.by_name["relu_0.output"]
    assert (weight.axis, weight.reason) == (None, "default; profile narrow: linear weight only per_tensor")
    assert (output.scheme, output.reason) == ("symmetric", "default; profile narrow: relu output only symmetric")


def test_threshold_is_divided_by_the_type_that_is_taken() -> None:
    """B6: 100 / 32768, although the default is int8."""
    plan = under(
        lambda m, x: torch.softmax(m.conv(x), 1), overrides=[{"match": "softmax_0", "activation": {"threshold": 100}}]
    )
    assert plan.by_name["softmax_0.output"].fixed_scale == 100 / 32768


def test_op_with_a_float_operand_runs_in_float_as_a_whole() -> None:
    rules = [{"match": "conv2.input0", "activation": {"dtype": "float32"}}]
    plan = under(lambda m, x: torch.relu(m.conv2(torch.tanh(m.conv(x)))), overrides=rules)
    for name in ("conv2", "relu_0"):
        assert plan.status[name].status == "float"
        assert "input0 is float32 by override 1" in plan.status[name].reason
    assert not [p for p in plan.points if p.op in ("conv2", "relu_0")]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"match": "soft*", "activation": {"dtype": "int8"}},
            r"override 1 \(match 'soft\*'\) asks for int8 at softmax_0.output, which the hardware does not support: "
            r"profile narrow: softmax output only int16. Change the rule, or add one for this point after it: "
            r"\{match: 'softmax_0.output', activation: \{dtype: int16\}\}",
        ),
        ({"match": "conv", "weight": {"dtype": "int4"}}, "int4 at conv.weight.*conv2d weight only int8"),
        ({"match": "conv.input0", "activation": {"dtype": "int16"}}, "int16 at conv.input0.*conv2d input only int8"),
        ({"match": "softmax_0", "activation": {"scheme": "affine"}}, "affine at softmax_0.output.*only symmetric"),
        ({"match": "linear", "weight": {"granularity": "per_channel"}}, "per_channel at linear.weight.*per_tensor"),
        (
            {"match": "linear.input0", "activation": {"dtype": "int16"}},
            "int16 at linear.input0.*linear input only int8",
        ),
    ],
)
def test_override_that_the_hardware_cannot_follow_is_an_error(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        under(lambda m, x: m.linear(torch.softmax(m.conv(x), 1).mean((2, 3))), overrides=[rule])


def test_advice_of_the_error_works() -> None:
    rules = [{"match": "*", **INT16}]
    for _ in range(10):
        try:
            plan = under(lambda m, x: m.conv2(torch.softmax(m.conv(x), 1)), overrides=rules)
            break
        except ConfigurationError as error:
            advice = re.search(r"after it: (\{.*\})\.$", str(error))
            assert advice is not None
            rules.append(yaml.safe_load(advice[1]))
    assert {p.name: p.dtype for p in plan.points if not p.is_weight} == {
        "conv.input0": "int8", "conv.output": "int16", "softmax_0.output": "int16", "conv2.input0": "int8",
        "conv2.output": "int16",
    }  # fmt: skip


def test_profile_decides_what_is_fused() -> None:
    graph = graph_of(lambda m, x: torch.relu(m.conv(x)) + torch.relu(m.norm(m.conv2(x)) + x))
    groups, _ = find_fusions(graph, parse_profile(NARROW, "narrow").patterns)
    assert [g.kinds for g in groups] == [("conv2d", "relu")]
    plan = make_plan(graph, profile=parse_profile(NARROW, "narrow"))
    assert [f.kinds for f in plan.fusions] == [("conv2d", "relu")]


def test_pattern_is_fused_as_a_whole_or_not_at_all() -> None:
    patterns = parse_profile({**NARROW, "fusions": ["conv2d + batch_norm + relu"]}, "narrow").patterns
    fused, _ = find_fusions(graph_of(lambda m, x: torch.relu(m.norm(m.conv(x)))), patterns)
    not_fused, _ = find_fusions(graph_of(lambda m, x: torch.tanh(m.norm(m.conv(x)))), patterns)
    assert ([g.kinds for g in fused], not_fused) == ([("conv2d", "batch_norm", "relu")], ())


# -- what the shipped profiles say


def types(plan: QuantPlan, op: str) -> dict[str, str]:
    return {p.name.removeprefix(f"{op}."): p.dtype for p in plan.by_op.get(op, ())}


@pytest.mark.parametrize(
    ("profile", "function", "x", "qconfig", "op", "expected"),
    [
        # generic: int16 activations with int8 weights; GEMM results leave in float32; everything symmetric
        ("generic_int8_int16", lambda m, x: m.linear(x), ROWS, INT16, "linear", {"input0": "int16", "weight": "int8"}),
        ("generic_int8_int16", lambda m, x: torch.softmax(x, 1), ROWS, INT16, "softmax_0",
         {"input0": "int16", "output": "int16"}),
        ("generic_int8_int16", lambda m, x: m.linear(x), ROWS, {"weight": {"dtype": "int4"}}, "linear",
         {"input0": "int8", "weight": "int8"}),
        ("generic_int8_int16", lambda m, x: torch.tanh(F.max_pool2d(torch.tanh(x), 2)), IMAGE, INT16, "tanh_0",
         {"input0": "int16", "output": "int16"}),
        # ONNX Runtime: a convolution always has a QuantizeLinear behind it, a MatMul need not
        ("onnxruntime_qdq", lambda m, x: m.conv(x), IMAGE, None, "conv",
         {"input0": "int8", "weight": "int8", "output": "int8"}),
        ("onnxruntime_qdq", lambda m, x: m.up(x), IMAGE, None, "up",
         {"input0": "int8", "weight": "int8", "output": "int8"}),
        ("onnxruntime_qdq", lambda m, x: m.linear(x), ROWS, None, "linear", {"input0": "int8", "weight": "int8"}),
        # a signed input needs a signed weight, an unsigned one does not
        ("onnxruntime_qdq", lambda m, x: m.linear(x), ROWS, {"weight": {"dtype": "uint8"}}, "linear",
         {"input0": "int8", "weight": "int8"}),
        ("onnxruntime_qdq", lambda m, x: m.linear(x), ROWS,
         {"activation": {"dtype": "uint8", "scheme": "affine"}, "weight": {"dtype": "uint8"}}, "linear",
         {"input0": "uint8", "weight": "uint8"}),
        # 16-bit activations with 8-bit weights; no 16 bits in MaxPool, Resize, Where
        ("onnxruntime_qdq", lambda m, x: m.linear(x), ROWS, INT16, "linear", {"input0": "int16", "weight": "int8"}),
        ("onnxruntime_qdq", lambda m, x: m.conv2(F.max_pool2d(m.conv(x), 2)), IMAGE, INT16, "conv",
         {"input0": "int8", "weight": "int8", "output": "int8"}),
        ("onnxruntime_qdq", lambda m, x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), IMAGE, INT16,
         "interpolate_0", {"input0": "int8", "output": "int8"}),
        # MatMulNBits: float inputs, 4-bit weights
        ("onnxruntime_qdq", lambda m, x: m.linear(x), ROWS,
         {"activation": {"dtype": "float32"}, "weight": {"dtype": "int4"}}, "linear", {"weight": "int4"}),
        # Add, Concat: one type
        ("onnxruntime_qdq", lambda m, x: torch.relu(torch.cat([x, torch.sigmoid(x)], 1)), IMAGE, None, "cat_0",
         {"input0": "int8", "output": "int8"}),
        ("onnxruntime_qdq", lambda m, x: torch.tanh(x), IMAGE, None, "tanh_0", {}),
        ("onnxruntime_qdq", lambda m, x: F.gelu(x), IMAGE, None, "gelu_0", {}),
        ("onnxruntime_qdq", lambda m, x: x - 2 * torch.sigmoid(x), IMAGE, None, "sub_0", {}),
        # the guide: convolutions int8 only, float32 out at the end; linear layers and element-wise functions int16 too
        ("horizon_plugin_pytorch", lambda m, x: m.conv(x), IMAGE, INT16, "conv", {"input0": "int8", "weight": "int8"}),
        ("horizon_plugin_pytorch", lambda m, x: torch.sigmoid(m.conv(x)), IMAGE, INT16, "conv",
         {"input0": "int8", "weight": "int8", "output": "int8"}),
        ("horizon_plugin_pytorch", lambda m, x: m.linear2(m.linear(x)), ROWS, INT16, "linear",
         {"input0": "int16", "weight": "int8", "output": "int16"}),
        ("horizon_plugin_pytorch", lambda m, x: torch.sin(x) * x, ROWS, INT16, "mul_0",
         {"input1": "int16", "output": "int16"}),
        ("horizon_plugin_pytorch", lambda m, x: F.gelu(torch.sigmoid(x)), ROWS, INT16, "gelu_0",
         {"input0": "int8", "output": "int8"}),
        ("horizon_plugin_pytorch", lambda m, x: torch.relu(x), ROWS, INT16, "relu_0",
         {"input0": "int8", "output": "int8"}),
        ("horizon_plugin_pytorch", lambda m, x: m.norm(x), IMAGE, INT16, "norm", {"input0": "int8", "output": "int8"}),
    ],
)  # fmt: skip
def test_rules_of_the_shipped_profiles(
    profile: str, function: Any, x: Tensor, qconfig: Any, op: str, expected: dict[str, str]
) -> None:
    graph = graph_of(function, x)
    plan = make_plan(graph, qconfig, profile=profile)
    assert types(plan, op) == expected
    assert find_violations(plan, graph, profile) == ()
    if not expected:
        assert plan.status[op].reason.startswith(f"profile {profile}: {graph.by_name[op].kind} is not supported")


def test_embedding_of_onnxruntime_is_per_tensor() -> None:
    graph = trace(nn.Embedding(4, 4), [torch.arange(4)])
    plan = make_plan(graph, {"activation": {"dtype": "int16"}}, profile="onnxruntime_qdq")
    assert {p.role: (p.dtype, p.axis) for p in plan.points} == {"weight": ("int8", None), "output": ("int8", None)}


@pytest.mark.parametrize(
    ("profile", "function", "expected"),
    [
        ("generic_int8_int16", lambda m, x: torch.relu(m.norm(m.conv(x)) + x), "conv2d+batch_norm+add+relu"),
        ("onnxruntime_qdq", lambda m, x: torch.relu(m.norm(m.conv(x)) + x), "conv2d+batch_norm add+relu"),
        ("onnxruntime_qdq", lambda m, x: F.relu6(m.up(x)), "conv_transpose2d+relu6"),
        ("horizon_plugin_pytorch", lambda m, x: m.conv(x) + x, "conv2d+add"),
        ("horizon_plugin_pytorch", lambda m, x: torch.relu(m.norm(m.conv(x))), "conv2d+batch_norm+relu"),
        ("horizon_plugin_pytorch", lambda m, x: F.relu6(m.conv(x)), ""),
        ("horizon_plugin_pytorch", lambda m, x: torch.relu(m.norm(x)), ""),
    ],
)
def test_fusions_of_the_shipped_profiles(profile: str, function: Any, expected: str) -> None:
    plan = make_plan(graph_of(function), profile=profile)
    assert " ".join("+".join(f.kinds) for f in plan.fusions) == expected


# -- violations of a plan made without the profile


@pytest.mark.parametrize(
    ("function", "x", "options", "expected"),
    [
        (lambda m, x: torch.sigmoid(torch.tanh(m.conv(x))), IMAGE, {}, ("tanh_0", "op", "quantized", "float32")),
        (lambda m, x: torch.softmax(m.conv(x), 1), IMAGE, {}, ("softmax_0.output", "output dtype", "int8", "int16")),
        (lambda m, x: torch.sigmoid(m.conv(x)), IMAGE, {"qconfig": {"weight": {"dtype": "int4"}}},
         ("conv.weight", "weight dtype", "int4", "int8")),
        (lambda m, x: torch.sigmoid(m.conv(x)), IMAGE,
         {"overrides": [{"match": "conv.input0", **INT16}]}, ("conv.input0", "input dtype", "int16", "int8")),
        (lambda m, x: torch.sigmoid(m.conv2(torch.sigmoid(m.conv(x)))), IMAGE,
         {"overrides": [{"match": "sigmoid_0", **INT16}]}, ("sigmoid_0.output", "input dtype", "int16", "int8")),
        (lambda m, x: torch.sigmoid(torch.sigmoid(x) + torch.sigmoid(x)), IMAGE,
         {"overrides": [{"match": "sigmoid_0", **INT16}]},
         ("sigmoid_0.output", "input dtype", "int16", "int8 (input int8 -> output int8)")),
        (lambda m, x: torch.sigmoid(F.max_pool2d(torch.sigmoid(x), 2)), IMAGE,
         {"overrides": [{"match": "sigmoid_0", **INT16}]}, ("sigmoid_0.output", "input dtype", "int16", "int8")),
        (lambda m, x: torch.sigmoid(x), IMAGE, {"overrides": [{"match": "sigmoid_0.output", "activation":
         {"scheme": "affine"}}]}, ("sigmoid_0.output", "scheme", "affine", "symmetric")),
        (lambda m, x: m.linear(x), ROWS, {}, ("linear.weight", "granularity", "per_channel", "per_tensor")),
        (lambda m, x: m.conv(x), IMAGE, {}, ("conv.output", "output dtype", "float32", "int8|int16")),
        (lambda m, x: torch.sigmoid(m.conv(x)), IMAGE,
         {"overrides": [{"match": "conv.weight", "weight": {"dtype": "float32"}}]},
         ("conv.weight", "weight dtype", "float32", "int8")),
        (lambda m, x: torch.sigmoid(torch.cat([x, torch.sigmoid(x)], 1)), IMAGE, {},
         ("cat_0.input0", "input dtype", "float32", "int8|int16")),
        (lambda m, x: torch.relu(torch.sigmoid(x) + torch.sigmoid(x)), IMAGE, {},
         ("relu_0", "fusion", "add + relu", "no fusion that begins with add")),
    ],
)  # fmt: skip
def test_every_kind_of_violation_is_found(
    function: Any, x: Tensor, options: dict[str, Any], expected: tuple[str, ...]
) -> None:
    profile = parse_profile(NARROW, "narrow")
    graph = graph_of(function, x)
    (found,) = find_violations(make_plan(graph, **options), graph, profile)
    assert (found.point, found.subject, found.used, found.allowed) == expected
    assert found.advice
    assert str(found).startswith(f"{found.point}: ")
    options = {key: value for key, value in options.items() if key == "qconfig"}
    assert find_violations(make_plan(graph, **options, profile=profile), graph, profile) == ()  # planned for it


def test_advice_removes_violations() -> None:
    """Each advice with an override in it is followed; what remains are types that only requantization can give."""
    profile = parse_profile({**NARROW, "fusions": ["conv2d + relu", "add + relu"]}, "narrow")
    graph = graph_of(lambda m, x: torch.sigmoid(m.conv(torch.softmax(torch.tanh(x), 1))))
    rules: list[dict[str, Any]] = []
    for _ in range(10):
        found = find_violations(make_plan(graph, overrides=rules), graph, profile)
        advice = [a for v in found if (a := re.search(r"(\{match.*\}\})", v.advice)) and "requantizes" not in v.advice]
        if not advice:
            break
        rules.append(yaml.safe_load(advice[0][1]))
    assert [(v.point, v.subject) for v in found] == [("softmax_0.output", "input dtype")]
    assert "requantizes" in found[0].advice


def test_plan_in_float_has_no_violation() -> None:
    graph = zoo_graph("resnet")
    floats = {"activation": {"dtype": "float32"}, "weight": {"dtype": "float32"}}
    assert find_violations(make_plan(graph, floats), graph, "onnxruntime_qdq") == ()


def test_violations_are_plain_frozen_rows() -> None:
    row = ProfileViolation("a.output", "a", "conv2d", "output dtype", "int16", "int8", "Write int8.")
    assert str(row) == "a.output: conv2d output dtype int16; allowed: int8. Write int8."
    with pytest.raises(AttributeError):
        row.used = "int8"  # type: ignore[misc]
