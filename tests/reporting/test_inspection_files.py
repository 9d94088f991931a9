"""An inspected point as files and figures."""

from __future__ import annotations

import builtins
import csv
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from torch import nn

from lightning_qat.analysis.comparison.point_inspection import PointInspection, inspect_point
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.reporting.figures import error_histogram, quantized_against_float, value_histogram
from lightning_qat.reporting.inspection_files import directory_name, write_inspection


@pytest.fixture
def inspection() -> PointInspection:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    x = torch.linspace(-1.0, 1.0, 30).reshape(5, 6)
    region = insert(model, (x,))
    calibrate(region, [x])
    return inspect_point(region, "0.input0", lambda: model(2 * x))


def test_archive_and_histogram_hold_the_tensors(inspection: PointInspection, tmp_path: Path) -> None:
    paths = write_inspection(inspection, tmp_path)
    assert {p.parent for p in paths} == {tmp_path / "0.input0"}
    with np.load(tmp_path / "0.input0" / "tensors.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["float_0"], inspection.values[0].numpy())
        assert np.array_equal(arrays["error_0"], arrays["quantized_0"] - arrays["float_0"])
        assert arrays["scale"] == inspection.scale.numpy()
    rows = list(csv.DictReader((tmp_path / "0.input0" / "histogram.csv").read_text().splitlines()))
    assert sum(int(row["float"]) for row in rows) == sum(int(row["quantized"]) for row in rows) == 30
    summary = (tmp_path / "0.input0" / "summary.txt").read_text()
    assert "int8, symmetric" in summary
    assert "5x6" in summary
    assert f"({int(inspection.statistics.clipped)} of 30 values)" in summary


def test_figures_mark_the_representable_range_and_use_no_global_state(inspection: PointInspection) -> None:
    backend = mpl.get_backend(auto_select=False)
    (axes,) = value_histogram(inspection).axes
    limits = [float(line.get_xdata()[0]) for line in axes.lines if len(line.get_xdata())]
    assert limits == [inspection.lowest, inspection.highest]
    (axes,) = error_histogram(inspection).axes
    limits = [float(line.get_xdata()[0]) for line in axes.lines if len(line.get_xdata())]
    assert limits == pytest.approx([-inspection.scale.item() / 2, inspection.scale.item() / 2])
    (axes,) = quantized_against_float(inspection).axes
    dots = np.asarray(axes.collections[0].get_offsets())
    assert np.allclose(dots[:, 0], inspection.values[0].flatten())
    assert np.allclose(dots[:, 1], inspection.quantized[0].flatten())
    assert mpl.get_backend(auto_select=False) == backend


def test_point_of_zeros_and_odd_names_can_be_drawn(inspection: PointInspection, tmp_path: Path) -> None:
    from dataclasses import replace

    zeros = replace(inspection, point="$a/b$_[x]@2.output", values=(torch.zeros(3),), quantized=(torch.zeros(3),))
    assert directory_name(zeros) == "_a_b___x_@2.output"
    assert len(write_inspection(zeros, tmp_path)) == 6


def test_without_matplotlib_the_extra_is_named(
    inspection: PointInspection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad setup: the other files are there all the same."""
    original = builtins.__import__

    def no_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(ConfigurationError, match=r"pip install 'lightning-qat\[plots\]'"):
        write_inspection(inspection, tmp_path)
    names = {path.name for path in (tmp_path / "0.input0").iterdir()}
    assert names == {"tensors.npz", "summary.txt", "histogram.csv"}
