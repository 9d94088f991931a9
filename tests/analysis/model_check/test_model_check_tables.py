"""The tables of the model check (A2-A13); numbers are counted by hand or those of the source document."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.analysis.model_check.model_check import check
from lightning_qat.analysis.model_check.model_check_result import ModelCheckResult, Section
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.shared_modules import split_shared_modules
from tests.analysis.model_check import flawed_models as flawed
from tests.analysis.model_check.flaw_cases import CASES, ramp
from tests.quantization.models import ZOO, calibrated


def _section(result: ModelCheckResult, title: str) -> Section:
    return next(section for section in result.sections if section.title == title)


# -- A2, A3


def test_varying_cameras_are_missed_with_cause_and_line() -> None:
    """A2, the source's example: the loop picks convolutions from a dict and varies per batch."""
    finding = next(f for f in CASES["A2 A3 varying cameras"].check().findings if f.kind == "unfused")
    lines = Path(flawed.__file__).read_text(encoding="utf-8").splitlines()
    file, _, line = finding.location.rpartition(":")
    assert file.endswith("flawed_models.py")
    assert "projected + self.level" in lines[int(line) - 1]
    assert "dynamic code" in finding.what
    assert "dynamic_block" in finding.action


def test_static_camera_loop_is_fused_without_a_finding() -> None:
    """A2: the same loop over the same cameras each time."""
    module, args = ZOO["cameras"].make()
    result = check(calibrated(module, *args))
    assert not [f for f in result.findings if f.requirement in ("A2", "A3")]
    assert _section(result, "Fusable modules are listed below:").rows == ()


def test_fusion_section_has_one_table_per_group() -> None:
    """A2: the heading stands above the first."""
    result = CASES["A2 A3 varying cameras"].check()
    tables = [s for s in result.sections if s.requirement == "A2"]
    assert [s.title for s in tables] == ["Fusable modules are listed below:", *[""] * (len(tables) - 1)]
    assert {s.columns for s in tables} == {("name", "type")}
    assert all(s.rows[0][1] == "Conv2d" and s.rows[-1][1] == "add" for s in tables if "Conv2d" in s.rows[0])


# -- A4, A5, A6


def test_called_times_table() -> None:
    """A4: the embedding is called 8 times."""
    rows = _section(CASES["A4 called eight times"].check(), "Each module called times:").rows
    assert dict(rows) == {"embedding": 8}


def test_branches_that_exclude_each_other_are_not_two_calls() -> None:
    """A4: of two places that never run in the same forward, one call is counted."""

    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, first: bool) -> Tensor:
            return self.fc(x) if first else torch.tanh(self.fc(x))

    region = insert(Either(), batches=[(ramp(2, 4), True), (ramp(2, 4), False)])
    assert _section(check(region), "Each module called times:").rows == ()


def test_ranges_of_each_call_are_put_beside_what_the_scale_represents() -> None:
    """A5, the source's numbers: 0.0446799 represents 5.719; 4.5935526 fits, 6.2831225 is clipped."""
    region = insert(flawed.Decoder(2, 1.0, dynamic=True), batches=[ramp(4, 4)])
    calibrate(region, [ramp(4, 4)])
    name = "embedding.mul_0.output"
    point = region.points[name]
    point.scale.fill_(0.0446799)
    region.call_ranges.points = {name: [(0.0002146, 4.5935526), (0.0, 6.2831225)]}
    rows = _section(check(region), "Ranges of each call of what is shared:").rows
    first, second = (row for row in rows if row[0] == name)
    assert first[1:4] == (0, "int8", pytest.approx(0.0446799))
    assert first[4:6] == (0.0002146, 4.5935526)
    assert first[6] == pytest.approx(-5.719, abs=1e-3)
    assert (first[8], second[8]) == ("fits", "clipped")


def test_calibration_records_the_range_of_every_call() -> None:
    """A5: over all batches, compared with the tensors themselves."""
    region = insert(flawed.Decoder(3, 4.0, dynamic=True), batches=[ramp(4, 4)])
    batches = [ramp(4, 4) * 0.5, ramp(4, 4)]
    calibrate(region, batches)
    ranges = region.call_ranges.points["embedding.mul_0.input0"]
    assert ranges == [(-1.0, 1.0), (-4.0, 4.0), (-16.0, 16.0)]


def test_own_scales_of_each_call_are_shown_and_are_no_finding() -> None:
    """A5: calls outside a dynamic block have a scale each."""
    region = insert(flawed.Decoder(3, 4.0), batches=[ramp(4, 4)], qconfig={"activation": {"observer": "minmax"}})
    calibrate(region, [ramp(4, 4)])
    result = check(region)
    rows = [
        r for r in _section(result, "Ranges of each call of what is shared:").rows if r[0] == "embedding.mul_0.output"
    ]
    assert [row[5] for row in rows] == pytest.approx([2 * torch.pi * 4**k for k in range(3)])
    assert not [f for f in result.findings if f.requirement == "A5"]


def test_without_calibration_the_evidence_says_so() -> None:
    """A5: no ranges, and no rows that pretend there were."""
    region = insert(flawed.Decoder(3, 4.0), batches=[ramp(4, 4)])
    section = _section(check(region), "Ranges of each call of what is shared:")
    assert section.rows == ()
    assert "not calibrated" in section.note


def test_call_ranges_are_in_checkpoints() -> None:
    """A5: a restored region has the evidence too."""
    region = insert(flawed.Decoder(2, 2.0, dynamic=True), batches=[ramp(4, 4)])
    calibrate(region, [ramp(4, 4)])
    other = insert(flawed.Decoder(2, 2.0, dynamic=True), batches=[ramp(4, 4)])
    other.target.load_state_dict(region.target.state_dict())
    assert other.call_ranges.points == region.call_ranges.points != {}


def test_splitting_shared_modules_removes_the_finding_and_changes_no_number() -> None:
    """A6: the helper that the finding names."""
    torch.manual_seed(0)
    model, x = flawed.SharedActivation(), ramp(8, 4)
    before = model(x)
    split_shared_modules(model)
    assert torch.equal(model(x), before)
    region = insert(model, (x,))
    assert not [f for f in check(region).findings if f.requirement == "A6"]


# -- A7-A9


def test_dtype_statistics_count_operands_and_results() -> None:
    """A7, A8: counted by hand for linear, tanh (int16), linear."""
    region = insert(flawed.mlp(), (ramp(2, 4),), overrides=[{"match": "1.output", "activation": {"dtype": "int16"}}])
    result = check(region)
    inputs, outputs = (_section(result, f"{side} dtype statistics:") for side in ("input", "output"))
    assert inputs.columns == outputs.columns == ("module type", "float32", "int8", "int16")
    assert {row[0]: row[1:] for row in inputs.rows} == {
        "quantize": (1, 0, 0),
        "linear": (0, 1, 1),
        "tanh": (0, 1, 0),
        "total": (1, 2, 1),
    }
    assert {row[0]: row[1:] for row in outputs.rows} == {
        "quantize": (0, 1, 0),
        "linear": (1, 1, 0),
        "tanh": (0, 0, 1),
        "total": (1, 2, 1),
    }


def test_what_computes_in_float_between_quantized_tensors_is_not_counted_as_quantized() -> None:
    """A7-A9, A12: an LSTM and a GRU between int8 tensors; FLOPs by hand: a product per gate, input and hidden state."""
    result = CASES["A7 float inside"].check()
    inputs = {row[0]: row[1:] for row in _section(result, "input dtype statistics:").rows}
    assert inputs == {
        "quantize": (1, 0),
        "lstm (float32 inside)": (0, 1),
        "gru (float32 inside)": (0, 1),
        "linear": (0, 1),
        "total": (1, 3),
    }
    rows = {row[0]: row[1:] for row in _section(result, "Each layer out qconfig:").rows}
    assert rows["lstm"][4].startswith("minmax; gates and cell state inside the fused call stay float")
    flops = {row[0]: row[3] for row in _section(result, "Ops and FLOPs by dtype:").rows}
    assert flops["float32"] == 2 * 3 * 2 * (4 + 3) * 4 * (4 + 4)
    assert flops["int8"] == 2 * 3 * 2 * 4 * 2


def test_attention_in_one_call_is_counted_as_float_and_written_out_as_quantized() -> None:
    """A7, A12: FLOPs by hand, two products of 5 x 4 x 5 for each of 3 samples; written out, only linears are left."""
    case = CASES["A7 attention in one call"]
    result = case.check()
    inputs = {row[0]: row[1:] for row in _section(result, "input dtype statistics:").rows}
    assert inputs["scaled_dot_product_attention (float32 inside)"] == (0, 3)
    flops = {row[0]: row[3] for row in _section(result, "Ops and FLOPs by dtype:").rows}
    assert flops["float32"] == 2 * 3 * 2 * (5 * 4 * 5)
    assert flops["int8"] == 2 * 3 * 5 * (4 * 12 + 4 * 2)
    (finding,) = result.findings
    assert "write the attention out" in finding.action
    assert "gates" not in finding.action
    written_out = dataclasses.replace(case, build=lambda: flawed.FusedAttention(fused=False)).check()
    assert "float inside" not in {f.kind for f in written_out.findings}
    flops = {row[0]: row[3] for row in _section(written_out, "Ops and FLOPs by dtype:").rows}
    assert "float32" not in flops


def test_fused_groups_are_one_type() -> None:
    """A7: conv, batch norm and relu."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 1, 1))
    rows = _section(check(insert(model, (ramp(2, 1, 3, 3),))), "input dtype statistics:").rows
    assert [row[0] for row in rows] == ["quantize", "conv2d+batch_norm+relu", "conv2d", "total"]


def test_a_tensor_inside_of_what_is_fused_has_no_type() -> None:
    """A9: nothing computes in float32 there, though the simulation does; what comes from outside keeps its type."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 1, 1))
    region = insert(model, (ramp(2, 1, 3, 3),))
    rows = {row[0]: row[2:4] for row in _section(check(region), "Each layer out qconfig:").rows}
    assert (rows["0"], rows["1"], rows["2"]) == (("int8", ""), ("", ""), ("", "int8"))
    assert rows["3"] == ("int8", "float32")


def test_layer_tables_say_where_each_scale_comes_from() -> None:
    """A9: fixed scales, observers, and why not."""
    overrides = [{"match": "1.output", "activation": {"dtype": "int16", "threshold": 100}}]
    region = insert(flawed.mlp(), (ramp(2, 4),), overrides=overrides)
    result = check(region)
    activations, weights = (_section(result, f"Each layer {what} qconfig:") for what in ("out", "weight"))
    assert activations.columns == ("Module Name", "Module Type", "Input dtype", "out dtype", "ch_axis", "observer")
    rows = {row[0]: row[1:] for row in activations.rows}
    assert rows["0.input0"] == ("quantize", "float32", "int8", None, "mse")
    assert rows["1"] == ("Tanh", "int8", "int16", None, "fixed scale 0.00305176")
    assert rows["2"][:3] == ("Linear", "int16", "float32")
    assert rows["2"][4].startswith("not quantized: high-precision output")
    assert [(row[0], row[2:]) for row in weights.rows] == [
        ("0.weight", ("int8", 0, "minmax")),
        ("2.weight", ("int8", 0, "minmax")),
    ]


# -- A11, A12, A13


def test_low_precision_output_names_what_is_behind_the_gemm() -> None:
    """A11: behind the last matrix product comes a tanh."""
    (finding,) = CASES["A11 int8 output behind a tanh"].check().findings
    assert "behind 2 come 3 (tanh)" in finding.what


def test_float_op_in_the_middle_cuts_the_model_in_two() -> None:
    """A12: name, producer, reason; two segments, one dequantize and one quantize."""
    result = CASES["A12 no quantized form"].check()
    (row,) = _section(result, "Ops that compute in float32:").rows
    assert row[:5] == ("i1e_0", "i1e", "", "", "middle")
    counts = dict(_section(result, "Segments of the deployed model:").rows)
    assert counts["accelerator segments"] == 2
    assert counts["quantize and dequantize between ops"] == 2


@pytest.mark.parametrize(
    ("layers", "segments", "casts"),
    [
        (("linear", "tanh", "linear"), 1, 0),
        (("erfcx", "linear", "linear"), 1, 1),
        (("linear", "linear", "erfcx"), 1, 1),
        (("linear", "erfcx", "linear", "erfcx", "linear"), 3, 4),
        (("linear", "erfcx", "erfcx", "linear"), 2, 2),
    ],
)
def test_segments(layers: tuple[str, ...], segments: int, casts: int) -> None:
    """A12: float ops at the head or the tail cut nothing, neighbouring ones cut once."""

    class Erfcx(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.erfcx(x)

    kinds: dict[str, Callable[[], nn.Module]] = {"linear": lambda: nn.Linear(4, 4), "tanh": nn.Tanh, "erfcx": Erfcx}
    region = insert(nn.Sequential(*(kinds[layer]() for layer in layers)), (ramp(2, 4),))
    counts = dict(_section(check(region), "Segments of the deployed model:").rows)
    assert (counts["accelerator segments"], counts["quantize and dequantize between ops"]) == (segments, casts)


def test_requested_and_effective_rows() -> None:
    """A13: all rules that asked for something else, and the one that won."""
    overrides = [
        {"op_type": "tanh", "activation": {"dtype": "int16"}},
        {"match": "1", "activation": {"dtype": "int4"}},
    ]
    region = insert(flawed.mlp(), (ramp(2, 4),), overrides=overrides)
    assert _section(check(region), "Requested and effective dtypes:").rows == (
        ("1.output", "int8", "default", "int4", "override 2 (match '1')"),
        ("1.output", "int16", "override 1 (op_type 'tanh')", "int4", "override 2 (match '1')"),
    )


def test_raising_is_in_the_table_and_no_finding() -> None:
    """A13: more bits than the default asks for are what mixed precision is about."""
    region = insert(flawed.mlp(), (ramp(2, 4),), overrides=[{"match": "1", "activation": {"dtype": "int16"}}])
    result = check(region)
    assert len(_section(result, "Requested and effective dtypes:").rows) == 1
    assert not [f for f in result.findings if f.requirement == "A13"]
