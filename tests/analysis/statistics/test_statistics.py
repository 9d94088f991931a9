"""Per-point statistics against brute force over all values at once (B4, B10, foundation LayerStatistics)."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_qat.analysis.sensitivity.sensitivity import sensitivity
from lightning_qat.analysis.statistics import point_statistics
from lightning_qat.analysis.statistics.point_statistics import BINS, PointStatistics
from lightning_qat.analysis.statistics.statistics import (
    LayerStatisticsResult,
    LayerStatisticsRow,
    StatisticsCollector,
    layer_statistics,
    scale_snapshot,
)
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region
from lightning_qat.reporting.files import write_csv, write_json


def point(dtype: str, scale: float, channels: int | None = None, **kwargs: Any) -> FakeQuantize:
    fake_quant = FakeQuantize(
        dtype, axis=None if channels is None else 1, channels=channels, fixed_scale=scale, **kwargs
    )
    if channels is not None:
        fake_quant.scale.copy_(scale * torch.linspace(0.5, 1.5, channels))
    return fake_quant


def brute_force(x: Tensor, fake_quant: FakeQuantize) -> dict[str, float]:
    """Everything in numpy, value by value, with the definition of quantization; no chunks, no streaming."""
    values = x.movedim(fake_quant.axis, -1).numpy() if fake_quant.axis is not None else x.numpy()
    scale = fake_quant.scale.numpy()
    unclipped = np.round(values / scale) + fake_quant.zero_point.numpy()
    codes = np.clip(unclipped, fake_quant.quant_min, fake_quant.quant_max)
    error = (((codes - fake_quant.zero_point.numpy()).astype(np.float32) * scale).astype(np.float64) - values) ** 2
    outside = (unclipped < fake_quant.quant_min) | (unclipped > fake_quant.quant_max)
    levels = fake_quant.quant_max - fake_quant.quant_min + 1
    spans = codes.reshape(-1, scale.size if fake_quant.axis is not None else 1)
    if fake_quant.axis is None:
        spans = codes.reshape(-1, 1)
    return {
        "mean": float(np.mean(values, dtype=np.float64)),
        "var": float(np.var(values, dtype=np.float64, ddof=1)),
        "low": float(values.min()),
        "high": float(values.max()),
        "clipped": float(outside.sum()),
        "rounding": float(error[~outside].sum()),
        "clipping": float(error[outside].sum()),
        "total": float(error.sum()),
        "level_occupancy": len(np.unique(codes)) / levels,
        "used_share": float(np.mean((spans.max(axis=0) - spans.min(axis=0)) / (levels - 1))),
    }


@pytest.mark.parametrize("dtype", ["int4", "int8", "uint8", "int16"])
@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("chunk", [1 << 20, 7])
def test_streamed_statistics_equal_brute_force(
    dtype: str, channels: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B4, B10: also when every tensor is looked at in small pieces."""
    monkeypatch.setattr(point_statistics, "CHUNK", chunk)
    fake_quant = point(dtype, 2.0 / 2 ** (4 if dtype == "int4" else 8 if "8" in dtype else 16), channels)
    batches = [torch.randn(5, 3, 2) * 0.7 + 0.3 for _ in range(3)]
    streamed = PointStatistics.of(fake_quant)
    for batch in batches:
        streamed.update(batch, fake_quant(batch), fake_quant)
    expected = brute_force(torch.cat(batches), fake_quant)
    total = expected.pop("total")
    for name, value in expected.items():
        assert getattr(streamed, name) == pytest.approx(value, rel=1e-9, abs=1e-12), name
    assert expected["clipped"] > 0
    assert streamed.rounding + streamed.clipping == pytest.approx(total, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), sizes=st.lists(st.integers(0, 20), min_size=1, max_size=4))
def test_merging_parts_gives_the_statistics_of_the_whole(seed: int, sizes: list[int]) -> None:
    """Foundation: mergeable over ranks."""
    generator = torch.Generator().manual_seed(seed)
    fake_quant = point("int4", 0.2)
    parts = [torch.randn(size, generator=generator) + 1e3 for size in sizes]
    whole, merged = PointStatistics.of(fake_quant), PointStatistics.of(fake_quant)
    everything = torch.cat(parts)
    whole.update(everything, fake_quant(everything), fake_quant)
    for part in parts:
        one = PointStatistics.of(fake_quant)
        one.update(part, fake_quant(part), fake_quant)
        merged.merge(PointStatistics.from_tensors(*one.to_tensors(), one.channels, one.levels))
    assert (merged.used_share is None) == (whole.used_share is None) == (not sum(sizes))
    names = ["count", "low", "high", "mean", "m2", "clipped", "rounding", "clipping"] + ["used_share"] * any(sizes)
    for name in names:
        assert getattr(merged, name) == pytest.approx(getattr(whole, name), rel=1e-9, abs=1e-12), name
    assert np.array_equal(merged.hits, whole.hits)


def test_values_within_half_a_step_of_the_range_are_rounded_not_clipped() -> None:
    """B4: the split follows the gradient mask of fake-quantization."""
    fake_quant = point("int4", 1.0)
    x = torch.tensor([7.4, 7.6, -8.4, -8.6], requires_grad=True)
    y = fake_quant(x)
    y.sum().backward()
    statistics = PointStatistics.of(fake_quant)
    statistics.update(x, y, fake_quant)
    assert x.grad is not None
    assert statistics.clipped == (x.grad == 0).sum() == 2
    assert statistics.rounding == pytest.approx(2 * 0.4**2, rel=1e-5)
    assert statistics.clipping == pytest.approx(2 * 0.6**2, rel=1e-5)


def test_values_that_are_not_finite_are_counted_and_left_out() -> None:
    fake_quant = point("int8", 0.1)
    x = torch.tensor([1.0, math.nan, math.inf, -math.inf, -1.0])
    statistics = PointStatistics.of(fake_quant)
    statistics.update(x, fake_quant(x), fake_quant)
    assert (statistics.count, statistics.non_finite, statistics.clipped) == (2, 3, 0)
    assert (statistics.low, statistics.high, statistics.mean) == (-1, 1, 0)
    assert statistics.level_occupancy == 2 / 256
    statistics.update(torch.full((3,), math.nan), torch.full((3,), math.nan), fake_quant)
    assert statistics.used_share == pytest.approx(20 / 255)


@pytest.mark.parametrize("channels", [None, 3])
def test_scale_that_training_has_ruined_is_no_reason_to_fail(channels: int | None) -> None:
    """B4: a learned scale may become NaN; the run that needs looking at must not end here."""
    fake_quant = point("int8", 0.1, channels)
    fake_quant.scale.view(-1)[0] = math.nan
    x = torch.linspace(-1, 1, 12).reshape(4, 3)
    statistics = PointStatistics.of(fake_quant)
    statistics.update(x, fake_quant(x), fake_quant)
    affected = x.numel() if channels is None else x.shape[0]
    assert (statistics.count, statistics.clipped) == (x.numel(), affected)
    assert math.isnan(statistics.clipping)
    assert not math.isnan(statistics.rounding)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.5, 1.0], math.inf),
        ([0.0, 0.0], math.inf),
        ([0.2, 0.2], 10 * math.log10(0.2**2 / 0.05**2)),
        ([0.05, 0.05], 0.0),
        ([math.nan], None),
        ([], None),
    ],
)
def test_sqnr_is_that_of_all_values(values: list[float], expected: float | None) -> None:
    """B4: also without an error, without a signal, and without values."""
    fake_quant = point("int8", 0.25)
    x = torch.tensor(values)
    statistics = PointStatistics.of(fake_quant)
    statistics.update(x, fake_quant(x), fake_quant)
    assert statistics.sqnr == (expected if expected is None else pytest.approx(expected, abs=1e-5))


@pytest.mark.parametrize("dtype", ["int4", "int8", "uint8"])
@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("reach", [0.5, 2.0])
def test_clipped_values_hit_the_ends_and_stand_in_no_bin(dtype: str, channels: int | None, reach: float) -> None:
    """B4: below, above, the codes and their bins, against numpy; also where some values are not finite."""
    fake_quant = point(dtype, 0.01, channels)
    x = torch.randn(7, 3, 5) * reach * 0.01 * (fake_quant.quant_max - fake_quant.quant_min)
    x[0, 0, 0], x[1, 1, 1] = math.nan, math.inf
    statistics = PointStatistics.of(fake_quant)
    statistics.update(x, fake_quant(x), fake_quant)
    rows = x.movedim(1, 0).reshape(3, -1).numpy()
    unclipped = np.round(rows / fake_quant.scale.numpy().reshape(-1, 1)) - fake_quant.quant_min
    levels = fake_quant.quant_max - fake_quant.quant_min + 1
    own = unclipped[np.isfinite(rows)]
    assert statistics.above == (own > levels - 1).sum()
    assert statistics.clipped == (own > levels - 1).sum() + (own < 0).sum()
    codes = np.clip(np.where(np.isfinite(rows), unclipped, np.nan), 0, levels - 1)
    low, high = np.nanmin(codes, axis=1), np.nanmax(codes, axis=1)
    assert statistics.code_low.tolist() == (low.tolist() if channels else [low.min()])
    assert statistics.code_high.tolist() == (high.tolist() if channels else [high.max()])
    hits = np.unpackbits(statistics.hits, count=levels)
    assert hits.nonzero()[0].tolist() == np.unique(codes[np.isfinite(codes)]).tolist()
    inside = own[(own >= 0) & (own < levels)]
    counts = np.bincount((inside // statistics.bin_width).astype(int), minlength=len(statistics.bins))
    assert statistics.bins.tolist() == counts.tolist()


def test_memory_does_not_grow_with_the_data() -> None:
    """Bounded memory: 8 KB of code bits for int16 and the bins of a histogram, whatever flows through."""
    fake_quant = point("int16", 1e-4)
    statistics = PointStatistics.of(fake_quant)
    for _ in range(3):
        x = torch.randn(1000)
        statistics.update(x, fake_quant(x), fake_quant)
    tensors = statistics.to_tensors()
    assert sum(t.numel() * t.element_size() for t in tensors) < 8192 + 8 * BINS + 256


def test_half_precision_activations_are_measured() -> None:
    fake_quant = point("int8", 0.05)
    x = torch.randn(100, dtype=torch.bfloat16)
    statistics = PointStatistics.of(fake_quant)
    statistics.update(x, fake_quant(x), fake_quant)
    error = (fake_quant(x).double() - x.double()).square().sum().item()
    assert statistics.rounding + statistics.clipping == pytest.approx(error, rel=1e-12)


# -- over a region


def calibrated(model: nn.Module, x: Tensor, observer: str = "minmax", **kwargs: Any) -> Region:
    region = insert(model, (x,), **kwargs)
    model.eval()
    with region.state("observe"), torch.no_grad():
        model(x)
    region.compute_scales(observer)
    return region


def small_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def rows_by_point(result: LayerStatisticsResult) -> dict[str, LayerStatisticsRow]:
    return {row.point: row for row in result.rows}


def test_rows_follow_the_plan_and_values_are_those_of_the_quantized_model() -> None:
    """B10: values come from the quantized model, checked with hooks."""
    model, x = small_model(), torch.randn(8, 2, 6, 6)
    region = calibrated(model, x)
    batches = [torch.randn(4, 2, 6, 6) * 2, torch.randn(4, 2, 6, 6)]
    rows = rows_by_point(layer_statistics(region, batches))
    assert list(rows) == [p.name for p in region.plan.points]
    normalised: list[Tensor] = []
    handle = model[1].register_forward_hook(lambda module, args, output: normalised.append(output))
    with region.state("quantize", updates=()), torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    relu = torch.cat(normalised).relu()
    row, values = rows["2.output"], relu.double()
    assert row.mean == pytest.approx(values.mean().item(), rel=1e-9)
    assert row.var == pytest.approx(values.var().item(), rel=1e-9)
    assert (row.min, row.max) == (values.min().item(), values.max().item())
    fake_quant = region.points["2.output"]
    limit = (fake_quant.quant_max + 0.5) * fake_quant.scale.item()
    assert row.clipped_share == pytest.approx((values > limit).double().mean().item(), abs=1e-9)
    assert (row.role, row.op_type, row.dtype, row.count) == ("activation", "relu", "int8", values.numel())
    quantized = fake_quant(relu).double()
    expected = 10 * math.log10(values.square().sum() / (values - quantized).square().sum())
    assert row.sqnr == pytest.approx(expected, rel=1e-6)
    assert rows["0.weight"].role == "weight"
    assert rows["0.weight"].count == 72  # once, not once per batch


def test_clipping_and_rounding_are_told_apart() -> None:
    """B4: the verdict."""
    model, x = nn.Sequential(nn.ReLU(), nn.Flatten()), torch.rand(4, 8)
    region = calibrated(model, x)
    assert layer_statistics(region, [x]).rows[0].error_source == "rounding"
    assert layer_statistics(region, [10 * x]).rows[0].error_source == "clipping"
    assert layer_statistics(region, [0 * x]).rows[0].error_source == "none"


def test_scale_drift_and_flip_rate_are_those_since_the_snapshots() -> None:
    """Foundation: scale drift since calibration, weight-code flip rate."""
    model, x = nn.Sequential(nn.Linear(4, 2, bias=False)), torch.randn(8, 4)
    region = calibrated(model, x)
    snapshot = scale_snapshot(region)
    with region.state("quantize"), StatisticsCollector(region, snapshot) as before, torch.no_grad():
        model(x)
    row = rows_by_point(before.result())["0.weight"]
    assert (row.scale_drift, row.flip_rate) == (0.0, None)
    weight, fake_quant = model[0].weight, region.points["0.weight"]
    with torch.no_grad():
        weight[0, 0] += 2 * fake_quant.scale[0]  # two codes further
        fake_quant.scale[1] *= 0.5  # every code of this channel, but the one that was at the end of the range
    assert weight[1].abs().min() > 2 * fake_quant.scale[1]
    with region.state("quantize"), StatisticsCollector(region, snapshot, before.codes) as after, torch.no_grad():
        model(x)
        model(x)
    row = rows_by_point(after.result())["0.weight"]
    assert row.scale_drift == pytest.approx(-0.5)
    assert row.flip_rate == (1 + 3) / 8
    region.points["0.weight"].change_dtype("int4")
    assert layer_statistics(region, [x], snapshot).rows[-1].scale_drift is None


def test_points_that_say_nothing_have_empty_cells(tmp_path: Path) -> None:
    """Never reached or not calibrated: a row all the same, so that keys are stable."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, second: bool = False) -> Tensor:
            return (self.b(x) if second else self.a(x)).relu()

    model, x = Branch(), torch.randn(2, 4)
    region = insert(model, (x,), batches=[((x,), {"second": True})])
    model.eval()
    with region.state("observe"), torch.no_grad():
        model(x)
        model(x, second=True)
    region.compute_scales()
    region.points["a.input0"].scale_source = None
    result = layer_statistics(region, [x])
    rows = rows_by_point(result)
    assert len(rows) == len(region.plan.points)
    assert rows["b.weight"].min is rows["b.weight"].clipped_share is None
    assert rows["b.weight"].count == 0
    assert (rows["a.input0"].count, rows["a.input0"].scale, rows["a.input0"].clipped_share) == (8, None, None)
    with open(write_csv(result, tmp_path / "s.csv"), newline="") as file:
        table = list(csv.DictReader(file))
    assert next(row for row in table if row["point"] == "b.weight")["clipped_share"] == ""
    data = json.loads(write_json(result, tmp_path / "s.json").read_text())
    assert data["rows"][0].keys() == LayerStatisticsRow.__dataclass_fields__.keys()


def test_a_pass_changes_nothing() -> None:
    model, x = small_model(), torch.randn(8, 2, 6, 6)
    region = calibrated(model, x)
    model.train()
    state = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    generator = torch.get_rng_state()
    layer_statistics(region, [x])
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if isinstance(v, Tensor))
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.training
    assert region.current_state == "off"


def test_results_of_regions_are_put_together_by_their_paths() -> None:
    model, x = small_model(), torch.randn(8, 2, 6, 6)
    result = layer_statistics(calibrated(model, x), [x])
    merged = LayerStatisticsResult.merged({"one": result, "two": result})
    assert [row.region for row in merged.rows] == ["one"] * len(result.rows) + ["two"] * len(result.rows)


# -- over ranks


def seeded_region() -> tuple[nn.Module, Region, Tensor]:
    torch.manual_seed(0)
    model, x = small_model(), torch.randn(8, 2, 6, 6)
    return model, calibrated(model, x), x


def on_rank(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    model, region, x = seeded_region()
    share = x[rank::2]
    with region.state("quantize", updates=()), StatisticsCollector(region) as collector, torch.no_grad():
        model(share)
    collector.all_reduce()
    ranked = sensitivity(region, [share], metric="SQNR", across_ranks=True)
    sketched = sensitivity(region, [share], method="sketch", confirm=1, across_ranks=True).to_dicts()
    torch.save((collector.result().to_dicts(), ranked.to_dicts(), ranked.batches, sketched), f"{directory}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_give_the_result_of_one(tmp_path: Path) -> None:
    """Foundation: ranks share the batches and reduce the statistics; B2 over ranks."""
    mp.spawn(on_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert repr(first) == repr(second)
    _, region, x = seeded_region()
    statistics = layer_statistics(region, [x[0::2], x[1::2]]).to_dicts()
    for row, expected in zip(first[0], statistics, strict=True):
        assert row == {k: pytest.approx(v, rel=1e-9) if isinstance(v, float) else v for k, v in expected.items()}
    one = sensitivity(region, [x[0::2], x[1::2]], metric="SQNR")
    assert [row["point"] for row in first[1]] == [row.point for row in one.rows]
    assert [row["SQNR"] for row in first[1]] == pytest.approx([row.value for row in one.rows], rel=1e-9)
    assert first[2] == one.batches == 2
    sketch = sensitivity(region, [x[0::2], x[1::2]], method="sketch", confirm=1)
    assert [row["score"] for row in first[3]] == pytest.approx([row.score for row in sketch.rows], rel=1e-6)
