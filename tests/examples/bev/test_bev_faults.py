"""Each fault of the source document, alone in an untrained copy, is found by its report and mended by what it says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import yaml

import lightning_qat
from examples.bev.data import Batch, collated
from examples.bev.module import BevModule, normalised
from examples.bev.reports import EDITS
from examples.bev.scenes import make_scene
from lightning_qat.analysis.model_check.finding import Finding
from lightning_qat.quantization.region.region import Region

Rules = list[dict[str, Any]]
NOT_APPLIED = "configuration not applied"
VIEW, SCORES = "view_transformation", "obstacle_head.cls_branches.1"


def batch(recording: int) -> Batch:
    """Two scenes; those of recording 1 lack a camera."""
    made = [make_scene(number) for number in (0, 1)]
    names = ("vehicles", "vehicle_classes", "lines", "line_classes")
    rows = [
        (
            (torch.from_numpy(s.images) * 255).byte(),
            *(torch.from_numpy(getattr(s, n)) for n in names),
            torch.tensor(32 * recording),
        )
        for s in made
    ]
    return collated(rows)


def inputs(module: BevModule) -> list[tuple[Any, ...]]:
    """What the network gets for a batch with all cameras, and for one that lacks a camera."""
    cameras = [(b, b.cameras.tolist()) for b in (batch(0), batch(1))]
    return [(normalised(b.images / 255), module.reference_points[:, c], c) for b, c in cameras]


def quantized(
    dtype: str, rules: Rules, calibrate: bool = True, observer: str = "minmax", **arguments: Any
) -> tuple[Region, list[tuple[Any, ...]]]:
    torch.manual_seed(0)
    module = BevModule(width=8, **arguments).eval()
    calls = inputs(module)
    qconfig = {"activation": {"dtype": dtype, "observer": observer}, "weight": {"dtype": dtype}}
    region = lightning_qat.insert(
        module.model, calls[0], batches=calls[1:], qconfig=qconfig, overrides=rules, train_mode=False
    )
    if calibrate:
        lightning_qat.calibrate(region, calls)
    return region, calls


def found(region: Region, kind: str) -> list[Finding]:
    findings = lightning_qat.check(region).findings
    return [finding for finding in findings if finding.kind == kind and finding.severity != "info"]


def printed(texts: Iterable[str]) -> Rules:
    return [rule for text in texts for rule in yaml.safe_load(text)["overrides"]]


@pytest.mark.parametrize(
    ("dtype", "fault", "kind", "name"),
    [
        ("int16", {"match": f"{VIEW}.*", "activation": {"dtype": "int8"}}, NOT_APPLIED, f"{VIEW}.add_0.input0"),
        ("int16", {"match": f"{VIEW}.norm.output", "activation": {"dtype": "float32"}}, "float op", f"{VIEW}.norm"),
        ("int16", {"match": f"{SCORES}.output", "activation": {"dtype": "int16"}}, "wide integer output", SCORES),
        ("int8", None, "low-precision output", "map_head.add_4"),
    ],
    ids=["int8 wins", "float32 input", "wide output", "low precision behind an addition"],
)  # fmt: skip
def test_a_mistake_in_the_configuration_is_named_and_mended_by_what_is_pasted(
    dtype: str, fault: dict[str, Any] | None, kind: str, name: str
) -> None:
    """A10 to A13."""
    rules = [fault] if fault else []
    region, _ = quantized(dtype, rules, calibrate=False)
    (finding,) = found(region, kind)
    assert name in finding.names
    region.remove()
    mended, _ = quantized(dtype, rules + printed([finding.yaml]), calibrate=False)
    assert not found(mended, kind)


def test_the_loop_over_the_cameras_is_found_to_vary_and_not_to_be_fused() -> None:
    """A2, A3: batches lack a camera now and then, and nothing says that the loop varies."""
    region, _ = quantized("int16", [], calibrate=False, annotate=False)
    (varying,) = found(region, "varying code")
    (unfused,) = found(region, "unfused")
    assert "conv2d+add" in unfused.what
    assert any(name.startswith("view_transformation.input_proj") for name in varying.names)
    (edit,) = [edit for edit in EDITS if edit.is_meant(vars(varying))]
    mended, _ = quantized("int16", [], calibrate=False, **edit.arguments)
    assert not found(mended, "varying code")
    assert not found(mended, "unfused")


def test_the_embedding_that_is_forced_to_share_its_scales_is_found_by_the_ranges_of_its_calls() -> None:
    """A4, A5: the first decoder layer looks at places around the ego, the later ones at all places."""
    region, _ = quantized("int16", [], force_sharing=True)
    findings = found(region, "shared scale")
    meant = [(finding, edit) for finding in findings for edit in EDITS if edit.is_meant(vars(finding))]
    ((finding, edit),) = meant
    assert all("gen_sineembed_for_position" in name or "process_input" in name for name in finding.names)
    assert "4 calls" in finding.what
    mended, _ = quantized("int16", [], **edit.arguments)
    assert not [finding for finding in found(mended, "shared scale") if "gen_sineembed" in str(finding.names)]


def test_the_reference_points_with_an_automatic_scale_are_diagnosed_and_get_the_scale_of_their_range() -> None:
    """B5, B6: -99 where a camera sees nothing; the declared range is -100 to 1."""
    point, ranges = "view_transformation.add_0.input0", {"view_transformation.add_0.input0": [-100.0, 1.0]}
    region, calls = quantized("int8", [], observer="mse")
    row = lightning_qat.diagnose(lightning_qat.compare(region, calls), ranges=ranges).by_point[point]
    assert row.verdict == "bad scale"
    (rule,) = printed([row.yaml])
    assert rule["activation"] == {"dtype": "int16", "fixed_scale": "100/32768"}
    mended, _ = quantized("int8", [rule], calibrate=False)
    assert float(mended.points[point].scale) == 100 / 32768


def test_the_divisors_with_one_scale_are_diagnosed_as_non_uniform_and_split() -> None:
    """B7, B8: int16, nothing is clipped, and the smallest are off by percents."""
    region, calls = quantized("int16", [])
    rows = lightning_qat.diagnose(lightning_qat.compare(region, calls)).rows
    divisors = [row for row in rows if row.verdict == "non-uniform"]
    assert [row.point for row in divisors] == [
        f"map_head.gen_sineembed_for_position@{call}.div_1.input1" for call in (1, 2, 3)
    ]
    assert "divides by it" in divisors[0].evidence
    dim_t = 10000 ** (2 * (torch.arange(64) // 2) / 64)
    before = (region.points[divisors[0].point](dim_t) - dim_t).abs() / dim_t
    mended, _ = quantized("int16", printed(row.yaml for row in divisors))
    after = (mended.points[divisors[0].point](dim_t) - dim_t).abs() / dim_t
    assert float(before.max()) > 0.05
    assert float(after.max()) < 0.005
