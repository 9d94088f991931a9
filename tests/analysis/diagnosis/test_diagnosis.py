"""Planted faults (B4, B5, B7, A5, B1): found first, named right, and cured by the YAML that is printed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat.analysis.comparison.comparison import compare
from lightning_qat.analysis.diagnosis.diagnosis import diagnose
from lightning_qat.analysis.diagnosis.diagnosis_result import Diagnosis, DiagnosisResult
from lightning_qat.analysis.diagnosis.split_remedy import relative_rms
from lightning_qat.analysis.model_check.long_loops import LONG_LOOP
from lightning_qat.analysis.sensitivity.sensitivity import sensitivity
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.interception.dynamic_block import dynamic_block
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region

INT16 = {"activation": {"dtype": "int16", "observer": "minmax"}, "weight": {"dtype": "int16"}}
INT8 = {"activation": {"observer": "minmax"}}
DIM_T_SCALE = "8659.5107422/32767"


def quantized(
    make: Callable[[], nn.Module], batches: list[Any], overrides: list[dict[str, Any]], qconfig: dict[str, Any]
) -> Region:
    torch.manual_seed(0)
    region = insert(make().eval(), batches=batches, qconfig=qconfig, overrides=overrides)
    calibrate(region, batches)
    return region


def first_culprit(region: Region, batches: list[Any], **kwargs: Any) -> Diagnosis:
    """The first row of the list, which has to be the first row of the exact sensitivity table too."""
    ranked = sensitivity(region, batches, method="isolation")
    result = diagnose(compare(region, batches), ranked, **kwargs)
    assert result.culprits[0].point == ranked.rows[0].point
    return result.culprits[0]


def own_error(region: Region, batches: list[Any], found: Diagnosis) -> float:
    evidence = next(e for e in compare(region, batches).evidence if e.point == found.point)
    return relative_rms(evidence) if found.relative else evidence.error


def assert_cured(
    found: Diagnosis,
    make: Callable[[], nn.Module],
    batches: list[Any],
    overrides: list[dict[str, Any]],
    qconfig: dict[str, Any],
) -> Region:
    """Add the printed YAML to the overrides, calibrate anew, and measure."""
    before = own_error(quantized(make, batches, overrides, qconfig), batches, found)
    printed = yaml.safe_load(found.yaml)["overrides"]
    region = quantized(make, batches, [*overrides, *printed], qconfig)
    after = own_error(region, batches, found)
    assert found.factor is not None
    assert found.factor >= 4
    assert before / after >= found.factor
    return region


class WithSentinel(nn.Module):
    """Reference points in 0..1, and -99 where there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 8)

    def forward(self, ref_points: Tensor) -> Tensor:
        mask = (ref_points[..., :1] > -50).float()
        return self.fc(ref_points * mask)


@pytest.mark.parametrize(("scale", "verdict"), [("0.7764707", "bad scale"), (None, "rounding")])
def test_sentinel_against_the_declared_range(scale: str | None, verdict: str) -> None:
    """B5: -99 among values in 0..1, the physical range is -100..1. The source's scale clips, ours is too coarse."""
    points = torch.rand(4, 24, 2, generator=torch.Generator().manual_seed(1))
    points[:, 16:] = -99.0
    overrides = [{"match": "mul_0.input0", "activation": {"fixed_scale": scale}}] if scale else []
    region = quantized(WithSentinel, [points], overrides, INT8)
    found = first_culprit(region, [points], ranges={"mul_0.input0": [-100, 1]})
    assert (found.point, found.verdict) == ("mul_0.input0", verdict)
    assert scale is None or "represents -99.39 to 98.61 in steps of 0.7765" in found.evidence.lower()
    assert "fixed_scale: 100/32768" in found.yaml
    cured = assert_cured(found, WithSentinel, [points], overrides, INT8)
    assert cured.points["mul_0.input0"].scale.item() == pytest.approx(100 / 32768)


class DimT(nn.Module):
    """The divisor of the worked example."""

    def __init__(self, sizes: tuple[int, ...] = (128,)) -> None:
        super().__init__()
        self.sizes = sizes
        self.fc = nn.Linear(128, 4)

    def forward(self, x: Tensor) -> Tensor:
        index = torch.arange(128, dtype=torch.float32)
        dim_t = 10000 ** (2 * torch.div(index, 2, rounding_mode="floor") / 128)
        parts = [x[..., None] / part for part in torch.split(dim_t, self.sizes)]
        return torch.sin(self.fc(torch.cat(parts, -1) if len(parts) > 1 else parts[0]))


def divisor_of(region: Region) -> str:
    return next(p.name for p in region.plan.points if ".input1" in p.name and "div" in p.name)


def test_divisor_with_a_huge_dynamic_range_is_split() -> None:
    """B7 and B8: int16, nothing clipped, and still the most sensitive; the printed split cures it."""
    batches = [6.28 * torch.rand(2, 50, generator=torch.Generator().manual_seed(1))]
    overrides = [{"match": "div_*.input1", "activation": {"fixed_scale": DIM_T_SCALE}}]
    region = quantized(DimT, batches, overrides, INT16)
    found = first_culprit(region, batches)
    assert (found.point, found.verdict) == (divisor_of(region), "non-uniform")
    assert "divides by it" in found.evidence
    cured = assert_cured(found, DimT, batches, overrides, INT16)
    before = {row.point: row.score for row in sensitivity(region, batches, method="isolation").rows}
    after = {row.point: row.score for row in sensitivity(cured, batches, method="isolation").rows}
    assert after[found.point] < before[found.point] / 10


def test_divisor_that_becomes_zero_is_the_first_culprit() -> None:
    """B7: at int8 the small values vanish and the output is NaN; more bits and a split are needed."""
    batches = [6.28 * torch.rand(2, 50, generator=torch.Generator().manual_seed(1))]
    region = quantized(DimT, batches, [], INT8)
    found = first_culprit(region, batches)
    assert (found.point, found.verdict) == (divisor_of(region), "non-uniform")
    cured = assert_cured(found, DimT, batches, [], INT8)
    assert diagnose(compare(cured, batches)).by_point[found.point].verdict == "fine"


def test_rewritten_divisor_is_fine() -> None:
    """B7: the source's own remedy, dim_t[:32] and dim_t[32:] divided apart and concatenated."""
    batches = [6.28 * torch.rand(2, 50, generator=torch.Generator().manual_seed(1))]
    region = quantized(lambda: DimT((32, 96)), batches, [], INT16)
    scales = [p.scale.item() for n, p in region.points.items() if n.endswith(".input1")]
    assert min(scales) == pytest.approx(0.000264, rel=0.01)
    result = diagnose(compare(region, batches))
    assert not [row for row in result.culprits if row.verdict == "non-uniform"]


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))


def images(outlier: float = 1.0) -> list[Tensor]:
    x = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    x[:, 0, :2, :2] *= outlier
    return [x]


def test_outlier_channel_that_the_observer_cuts_off() -> None:
    """B4: clipping."""
    batches = images(outlier=20.0)
    percentile = [{"match": "conv1.input0", "activation": {"observer": "percentile", "percentile": 99.0}}]
    found = first_culprit(quantized(Convs, batches, percentile, INT8), batches)
    assert (found.point, found.verdict) == ("conv1.input0", "clipping")
    assert_cured(found, Convs, batches, percentile, INT8)


def test_values_that_calibration_did_not_see() -> None:
    """B4: clipping, because the calibration data are not representative."""
    batches = images()
    region = insert(Convs().eval(), (batches[0],), qconfig=INT8)
    calibrate(region, [0.2 * batches[0]])
    found = next(row for row in diagnose(compare(region, batches)).culprits if row.point == "conv1.input0")
    assert found.verdict == "clipping"
    assert "Calibration saw only" in found.action
    printed = yaml.safe_load(found.yaml)["overrides"]
    region = insert(Convs().eval(), (batches[0],), qconfig=INT8, overrides=printed)
    calibrate(region, [0.2 * batches[0]])
    before, after = found.severity, diagnose(compare(region, batches)).by_point[found.point].severity
    assert found.factor is not None
    assert before / after >= found.factor


def test_fixed_scale_that_is_too_wide() -> None:
    """B4: rounding."""
    batches = images()
    wide = [{"match": "relu_0.output", "activation": {"fixed_scale": 0.5}}]
    found = first_culprit(quantized(Convs, batches, wide, INT8), batches)
    assert (found.point, found.verdict) == ("relu_0.output", "rounding")
    assert "times too wide" in found.action
    assert_cured(found, Convs, batches, wide, INT8)


def test_two_ranges_that_a_dynamic_block_makes_share_a_scale() -> None:
    """A5: the evidence says what each call sees."""

    class Model(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            results = []
            for factor in (0.02, 4.0):
                with dynamic_block(self, "loop"):
                    results.append((x * factor).tanh())
            return [results[0] * 100, results[1]]

    batches = [torch.randn(4, 64, generator=torch.Generator().manual_seed(1))]
    region = quantized(Model, batches, [], INT8)
    shared = [p.name for p in region.plan.points if region.graph.by_name[p.op].calls > 1]
    found = first_culprit(region, batches)
    assert found.point in shared
    assert found.verdict == "rounding"
    assert "2 calls share the scale" in found.evidence
    assert "split_shared_modules" in found.action
    assert_cured(found, Model, batches, [], INT8)


def test_post_processing_changes_which_point_matters() -> None:
    """B1: behind a sigmoid that is saturated, an error does nothing."""

    class Heads(nn.Module):
        def forward(self, large: Tensor, small: Tensor) -> Tensor:
            return torch.cat([large * 3, small * 0.5], -1)

    batches = [(torch.full((4, 8), 30.0) + torch.randn(4, 8), torch.randn(4, 8))]
    in_float = [{"match": "cat_0", "activation": {"dtype": "float32"}}]  # joined outside of the device
    region = quantized(Heads, batches, in_float, INT8)
    plain = sensitivity(region, batches, method="isolation").rows[0].op_name
    after = sensitivity(region, batches, post_process=torch.sigmoid, method="isolation").rows[0].op_name
    assert (plain, after) == ("mul_0", "mul_1")
    rows = [compare(region, batches, post_process=f).rows[-1] for f in (None, torch.sigmoid)]
    assert rows[1].MSE < rows[0].MSE / 100  # type: ignore[operator]


def test_ops_after_the_fault_are_inherited() -> None:
    """Done-when 4: the culprit is one point, whatever it does to those behind it."""
    batches = images()
    region = quantized(Convs, batches, [{"match": "conv1.input0", "activation": {"fixed_scale": 0.5}}], INT8)
    comparison = compare(region, batches)
    origins = {row.mod_name: row.origin for row in comparison.rows}
    assert origins["conv1.input0"] == "own"
    assert [origins[name] for name in ("relu_1", "conv3")] == ["inherited"] * 2
    result = diagnose(comparison)
    assert [row.point for row in result.culprits] == ["conv1.input0"]
    assert result.by_point["relu_1.output"].verdict == "inherited"


@pytest.mark.parametrize("dtype", ["int3", "int4"])
def test_weights_with_few_bits_get_more(dtype: str) -> None:
    """B4: rounding of weights; the printed rule is one for weights, and asks for the next usual type.

    A scale per channel comes first where the channels differ, and not at all where they are alike: it was tried.
    """
    batches = images()
    few = [{"match": "conv2", "weight": {"dtype": dtype, "granularity": "per_tensor", "observer": "mse"}}]

    def uneven() -> Convs:
        model = Convs()
        with torch.no_grad():
            model.conv2.weight *= torch.logspace(0, -0.4, 8)[:, None, None, None]
        return model

    found = first_culprit(quantized(uneven, batches, few, INT8), batches)
    assert (found.point, found.verdict) == ("conv2.weight", "rounding")
    assert yaml.safe_load(found.yaml)["overrides"][0]["weight"] == {"granularity": "per_channel"}
    channels = [*few, {"match": "conv2", "weight": {"granularity": "per_channel"}}]
    for make, rules in ((uneven, channels), (Convs, channels), (Convs, few)):
        found = first_culprit(quantized(make, batches, rules, INT8), batches)
        assert yaml.safe_load(found.yaml)["overrides"][0]["weight"] == {"dtype": "int8"}
        assert_cured(found, make, batches, rules, INT8)


def test_healthy_model_has_nothing_to_do() -> None:
    batches = images()
    result = diagnose(compare(quantized(Convs, batches, [], {}), batches))
    assert result.culprits == ()
    head, advice = result.lines()
    assert head == f"What to do: 0 points to look at, {result.note.split(', ', 1)[1]}."
    assert advice.startswith("No point stands out. If the target is missed nevertheless")


@pytest.mark.parametrize(("clipped", "is_said"), [(1, False), (2, True), (3, True)])
def test_clipping_at_many_points_has_one_cause(clipped: int, is_said: bool) -> None:
    """C6: no override mends data of another kind; a single point is a matter of its own scale."""
    rows = [Diagnosis(f"p{i}.output", "clipping" if i < clipped else "fine", "", "") for i in range(8)]
    advice = DiagnosisResult(tuple(rows)).lines()[1]
    assert advice.startswith(f"{clipped} of 8 points clip: the data, or the weights") == is_said
    assert DiagnosisResult(tuple(rows)).lines(limit=8)[-1].startswith(f"{clipped}. p{clipped - 1}.output: clipping")


def test_rule_that_an_older_one_beats_is_not_applied() -> None:
    """A13: an override asks for int16 and int8 is in effect."""
    rules = [
        {"match": "relu_1", "activation": {"dtype": "int16"}},
        {"match": "*", "activation": {"dtype": "int8"}},
    ]
    batches = images()
    result = diagnose(compare(quantized(Convs, batches, rules, INT8), batches))
    found = next(row for row in result.culprits if row.verdict == "config not applied")
    assert "asks for int16, int8 is in effect" in found.evidence


def test_scale_that_turns_all_values_into_one() -> None:
    batches = images()
    zero = [{"match": "relu_0.output", "activation": {"fixed_scale": 1000.0}}]
    found = diagnose(compare(quantized(Convs, batches, zero, INT8), batches)).culprits[0]
    assert (found.point, found.verdict) == ("relu_0.output", "bad scale")
    assert_cured(found, Convs, batches, zero, INT8)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"conv1.inptu0": [-1, 1]}, "matches no quantization point. Near names: conv1.input0"),
        ({"conv1.input0": [1, -1]}, r"must be the two ends of a range such as \[-100, 1\]"),
        ({"conv1.input0": [1]}, "must be the two ends"),
    ],
)
def test_declared_range_that_is_none_is_refused(ranges: dict[str, list[float]], message: str) -> None:
    comparison = compare(quantized(Convs, images(), [], INT8), images())
    with pytest.raises(ConfigurationError, match=message):
        diagnose(comparison, ranges=ranges)


def test_lines_are_short_and_say_where_the_rest_is() -> None:
    row = Diagnosis("a.output", "rounding", "Evidence.", "Raise it.", "overrides:\n  - {}")
    result = DiagnosisResult(tuple(dataclasses.replace(row, point=f"p{i}.output") for i in range(12)))
    lines = result.lines(limit=2)
    assert lines[1] == "1. p0.output: rounding. Evidence. Raise it."
    assert lines[2:4] == ("     overrides:", "       - {}")
    assert lines[-1] == "10 more are in diagnosis.json and .txt."


class ManyBranches(nn.Module):
    """One branch makes nearly all of the output: its points are far more sensitive than the median, and healthy."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Linear(16, 16)
        self.side = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x).tanh()
        for layer in self.side:
            y = y + 0.01 * layer(x).relu()
        return y


@pytest.mark.parametrize("qconfig", [{}, INT16, {"activation": {"scheme": "affine"}}], ids=["int8", "int16", "affine"])
def test_points_that_lead_a_healthy_model_are_no_culprits(qconfig: dict[str, Any]) -> None:
    """There is always something that leads; without an effect on the output there is nothing to do about it."""
    batches = [torch.randn(64, 16, generator=torch.Generator().manual_seed(1))]
    region = quantized(ManyBranches, batches, [], qconfig)
    ranked = sensitivity(region, batches, method="isolation")
    scores = sorted(row.score for row in ranked.rows)
    assert scores[-1] > 10 * scores[len(scores) // 2]
    comparison = compare(region, batches)
    with torch.no_grad(), region.only(()):
        size = region.target(*batches).square().mean().sqrt().item()
    assert comparison.output_size == pytest.approx(size, rel=1e-3)
    assert diagnose(comparison, ranked).culprits == ()


def test_evidence_says_how_sensitive_a_culprit_is() -> None:
    """An input channel that is amplified: its own error is small, that of the output is not."""

    class Amplified(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 1.0)[:, :1] * 50 + x[:, 1:].tanh() * 0.1

    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    x[:, 0] *= 0.01
    region = quantized(Amplified, [x], [], INT8)
    ranked = sensitivity(region, [x], method="isolation")
    comparison = compare(region, [x])
    found = diagnose(comparison, ranked).culprits[0]
    assert next(e for e in comparison.evidence if e.point == found.point).relative_error < 1 / 32
    share = found.score / compare(region, [x]).output_size  # type: ignore[operator]
    assert f"Alone, it changes the output by {100 * share:.2g} %" in found.evidence


def test_what_follows_a_nan_is_inherited() -> None:
    """Done-when 4: NaN has a place where it comes from, too."""
    batches = [6.28 * torch.rand(2, 50, generator=torch.Generator().manual_seed(1))]
    batches[0][:, 0] = 0.0  # divided by a zero
    region = quantized(DimT, batches, [], INT8)
    comparison = compare(region, batches)
    origins = {row.mod_name: row.origin for row in comparison.rows}
    assert math.isnan(comparison.rows[-1].MSE or 0.0)
    assert origins["fc"] == origins["sin_0"] == "inherited"


def test_output_that_selects_by_values_does_not_make_culprits() -> None:
    """Any error changes how many are selected: that says nothing about a point."""

    class Selects(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return y[y[:, 0] > 0]

    batches = [torch.randn(512, 8, generator=torch.Generator().manual_seed(1))]
    region = quantized(Selects, batches, [], {})
    ranked = sensitivity(region, batches, method="isolation")
    assert ranked.reshaped
    assert diagnose(compare(region, batches), ranked).culprits == ()


def test_sentinel_is_found_without_a_declared_range_and_without_sensitivity() -> None:
    """B5: the energy of -99 hides what becomes of the values in 0..1."""
    points = torch.rand(4, 24, 2, generator=torch.Generator().manual_seed(1))
    points[:, 16:] = -99.0
    region = quantized(WithSentinel, [points], [], INT8)
    found = diagnose(compare(region, [points])).culprits[0]
    assert (found.point, found.verdict) == ("mul_0.input0", "non-uniform")
    assert "33 %" not in found.evidence
    assert "67 % of the values are below 1" in found.evidence
    assert "split" not in found.yaml  # the two coordinates are alike
    assert_cured(found, WithSentinel, [points], [], INT8)
    healthy = points[:, :16]
    assert diagnose(compare(quantized(WithSentinel, [healthy], [], INT8), [healthy])).culprits == ()


AFFINE = {"activation": {"scheme": "affine", "observer": "minmax"}}


@pytest.mark.parametrize("fixed", [0.5, 0.0005])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_fixed_scale_of_an_affine_point_is_replaced(dtype: str, fixed: float) -> None:
    """An observer would not be asked: a fixed scale stays until another one replaces it."""
    batches = images()
    rule = [{"match": "relu_0.output", "activation": {"dtype": dtype, "fixed_scale": fixed}}]
    found = first_culprit(quantized(Convs, batches, rule, AFFINE), batches)
    assert found.point == "relu_0.output"
    assert f"fixed scale{' is too small' if fixed < 0.01 else ''}" in found.action
    assert_cured(found, Convs, batches, rule, AFFINE)


def test_unsigned_point_that_gets_negative_values_gets_a_sign() -> None:
    batches = images()
    rule = [{"match": "conv1.input0", "activation": {"dtype": "uint8", "scheme": "affine", "fixed_scale": 0.02}}]
    found = first_culprit(quantized(Convs, batches, rule, INT8), batches)
    assert (found.point, found.verdict) == ("conv1.input0", "clipping")
    assert_cured(found, Convs, batches, rule, INT8)


def test_affine_point_that_calibration_did_not_serve() -> None:
    """Only one end is too short; the observer has seen too little, so that another one would not help."""
    x = images()[0]
    calibration = x.clamp(min=-0.5)
    region = insert(Convs().eval(), (x,), qconfig=AFFINE)
    calibrate(region, [calibration])
    found = next(row for row in diagnose(compare(region, [x])).culprits if row.point == "conv1.input0")
    assert found.verdict == "clipping"
    assert "Calibration saw only -0.5 to" in found.action
    region = insert(Convs().eval(), (x,), qconfig=AFFINE, overrides=yaml.safe_load(found.yaml)["overrides"])
    calibrate(region, [calibration])
    assert found.severity / diagnose(compare(region, [x])).by_point[found.point].severity >= (found.factor or 4)


@pytest.mark.parametrize("profile", ["onnxruntime_qdq", "horizon_plugin_pytorch", "generic_int8_int16"])
def test_remedy_is_one_that_the_hardware_has(profile: str) -> None:
    """What is printed can be planned; the first convolution takes int8 alone on two of them."""
    batches = images(outlier=30.0)

    def planned(overrides: list[dict[str, Any]]) -> Region:
        torch.manual_seed(0)
        region = insert(Convs().eval(), batches=batches, qconfig=INT8, overrides=overrides, profile=profile)
        calibrate(region, batches)
        return region

    region = planned([])
    ranked = sensitivity(region, batches, method="isolation")
    found = diagnose(compare(region, batches), ranked).culprits[0]
    assert found.point == "conv1.input0"
    if profile == "generic_int8_int16":
        assert planned(yaml.safe_load(found.yaml)["overrides"]).points[found.point].dtype == "int16"
    else:
        assert found.yaml == ""
        assert "The hardware has no wider type here" in found.action


def test_overrides_of_several_regions_name_their_target() -> None:
    """Both have a ``relu_0.output``: pasted without its path, the remedy of one would break the other."""
    batches = images()
    wide = [{"match": "relu_0.output", "activation": {"fixed_scale": 0.5}}]
    faulty = diagnose(compare(quantized(Convs, batches, wide, INT8), batches))
    healthy = diagnose(compare(quantized(Convs, batches, [], INT8), batches))
    (both,) = DiagnosisResult.merged({"backbone": healthy, "head": faulty}).culprits
    assert yaml.safe_load(both.yaml)["overrides"][0]["match"] == "head.relu_0.output"
    (alone,) = DiagnosisResult.merged({"head": faulty}).culprits
    assert alone.yaml == faulty.culprits[0].yaml


class Loop(nn.Module):
    """A head, and post-processing whose rounds are ops of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.head(x).sigmoid()
        for _ in range(LONG_LOOP):
            h = h * 0.999
        return h + 1.0


def test_rounds_of_a_long_loop_are_one_entry_of_the_list() -> None:
    """B4: they would fill it, and the last one would hide the head behind "more are in the json file"."""
    x = torch.linspace(-1, 1, 32).reshape(8, 4)
    wide: list[dict[str, Any]] = [
        {"match": "mul_*.output", "activation": {"fixed_scale": 0.1}},
        {"match": "sigmoid_0.output", "activation": {"fixed_scale": 0.1}},
    ]
    region = quantized(Loop, [x], wide, INT8)
    result = diagnose(compare(region, [x]))
    assert len(result.culprits) == LONG_LOOP + 1
    entries = [line for line in result.lines() if line[:1].isdigit()]
    assert len(entries) == 2
    (loop,) = (entry for entry in entries if "mul_" in entry)
    assert f"rounding, as in {LONG_LOOP} rounds of mul in " in loop
    assert "keep it out of the target" in loop
    assert "dynamic_block(self" in loop
    assert sum("match" in line for line in result.lines()) == 2
    for (shown,) in (result.blocks(), result.full_blocks()):
        assert sum("mul_" in row[0] for row in shown.rows) == 1
    assert len(result.to_dicts()) == len(result.rows)


def test_calibration_data_are_blamed_for_what_follows_from_them_alone() -> None:
    """Not for weights, fixed scales, rules that are not in effect, and points that are fine."""
    rows = [
        Diagnosis("fc.input0", "clipping", "e", "a", "overrides: x", 9.0),
        Diagnosis("fc.output", "rounding", "e", "a", "overrides: y", 9.0, severity=1.0),
        Diagnosis("fc.weight", "rounding", "e", "a", "overrides: z", 9.0, severity=2.0),
        Diagnosis("add.output", "bad scale", "fixed", "a", "overrides: f"),
        Diagnosis("relu.output", "config not applied", "e", "a", "overrides: w"),
        Diagnosis("last.output", "fine", "e"),
    ]
    calibrated = [("", name) for name in ("fc.input0", "fc.output", "relu.output", "last.output")]
    held = {"": {"fc.output": "It has zeros in calibration."}}
    result = DiagnosisResult(tuple(rows)).with_foreign_data("Other data.", "Mend the loader.", held, calibrated)
    blamed = {row.point: row for row in result.rows if row.verdict == "calibration data"}
    assert list(blamed) == ["fc.output", "fc.input0"] == [row.point for row in result.rows[:2]]
    assert {(row.action, row.yaml, row.factor) for row in blamed.values()} == {("Mend the loader.", "", None)}
    assert blamed["fc.output"].evidence == "It has zeros in calibration."
    assert {row for row in rows if row.point not in blamed} == set(result.rows[2:])
    assert "Other data." in result.note
    lines = result.lines()
    assert lines[1] == "Other data."
    assert lines[2].startswith("1. fc.weight: rounding.")
    assert not any("overrides: x" in line or "overrides: y" in line for line in lines)
    fine = DiagnosisResult((rows[-1],)).with_foreign_data("Other data.", "Mend the loader.", {}, calibrated)
    assert fine.lines() == ("What to do: 0 points to look at, 1 fine, 0 inherited.", "Other data.")
