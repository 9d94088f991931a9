"""Sketches tell how far two tensors lie apart, whatever the difference is; settings and code of modules are noted."""

from __future__ import annotations

import importlib.util
import linecache
import math
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qat.analysis.fingerprint.layer_calls import MOST_SAMPLES, Sketcher, relative_distance
from lightning_qat.analysis.fingerprint.module_settings import code_digest, module_settings, steady_settings
from lightning_qat.quantization.region.insertion import insert


@given(st.integers(0, 1000), st.floats(1e-4, 1.0), st.integers(100, 5000))
def test_distance_is_that_of_the_tensors(seed: int, share: float, size: int) -> None:
    """Against the exact distance. The square of an estimate of eight sums has a chi-squared distribution with eight
    degrees of freedom: less than one in a million lies outside of these factors.
    """
    assert 1 / 8 < _estimated_share(seed, share, size) < 3


def test_distance_is_right_on_average() -> None:
    """The mean square of 400 estimates is 1 within four of its standard errors, which are the root of 2 / 8 / 400."""
    squares = [_estimated_share(seed, 0.1, 300) ** 2 for seed in range(400)]
    assert sum(squares) / 400 == pytest.approx(1, abs=4 * (2 / 8 / 400) ** 0.5)


def _estimated_share(seed: int, share: float, size: int) -> float:
    """The estimated distance of two tensors, as a share of the exact one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, size, generator=generator)
    y = x + share * torch.randn(4, size, generator=generator)
    sketcher = Sketcher()
    found = relative_distance(sketcher.sketch(x), sketcher.sketch(y))
    return found / float((x - y).norm() / max(x.norm(), y.norm()))


@pytest.mark.parametrize(
    "change",
    [lambda x: x.flip(0), lambda x: x.flip(1), lambda x: x.roll(1, dims=1), lambda x: -x],
    ids=["samples", "features", "rolled", "sign"],
)
def test_other_order_is_a_difference(change: Any) -> None:
    """Mean, spread and range are the same."""
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    sketcher = Sketcher()
    assert relative_distance(sketcher.sketch(x), sketcher.sketch(change(x))) > 0.3


def test_odd_tensors_and_other_batch_sizes() -> None:
    sketcher = Sketcher()
    x = torch.randn(64, 3)
    assert sketcher.sketch(x) == Sketcher().sketch(x[:MOST_SAMPLES]) == Sketcher().sketch(x[:16])
    for odd in (torch.tensor(2.0), torch.zeros(0, 3), torch.arange(4), torch.ones(2, 2, dtype=torch.complex64), x > 0):
        assert relative_distance(sketcher.sketch(odd), Sketcher().sketch(odd)) == 0.0
    bad = x.clone()
    bad[0, 0] = math.nan
    assert relative_distance(sketcher.sketch(x), sketcher.sketch(bad)) == math.inf
    assert relative_distance(sketcher.sketch(bad), sketcher.sketch(bad)) == 0.0
    assert relative_distance(sketcher.sketch(x), sketcher.sketch(x[:, :2])) == math.inf


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.slope, self.size = 0, 0.1, (2, 3)
        self.act = F.relu
        self.layers = nn.TransformerEncoderLayer(4, 2, activation=F.gelu)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.act(x)


def test_settings_are_public_and_plain_and_counters_are_left_out() -> None:
    model = Counting()
    before = module_settings(model)
    assert before[""].settings == {"calls": 0, "slope": 0.1, "size": [2, 3], "act": "relu"}
    assert before["layers"].settings["activation"] == "gelu"
    assert before["layers.norm1"].settings["eps"] == 1e-5
    model(torch.ones(1))
    assert steady_settings(before, module_settings(model))[""].settings == {"slope": 0.1, "size": [2, 3], "act": "relu"}


def test_insertion_changes_no_setting() -> None:
    """Fake-quant adds nothing to what a module is."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.LeakyReLU(0.2), nn.Flatten(), nn.LazyLinear(2))
    x = torch.ones(2, 1, 4, 4)
    model(x)
    before = module_settings(model)
    insert(model, (x,))
    assert module_settings(model) == before


def class_of(code: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> type:
    """A class in a file of its own, as inspect reads it."""
    file = path / "net.py"
    file.write_text("from torch import nn\nfrom torch.nn import functional as F\n" + textwrap.dedent(code))
    linecache.clearcache()
    spec = importlib.util.spec_from_file_location(f"net_{abs(hash(code))}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    spec.loader.exec_module(module)
    return module.Net  # type: ignore[no-any-return]


CODE = """
class Net(nn.Module):
    def forward(self, x):
        return self.helped(x)

    def helped(self, x):
        return F.relu(x)

    def training_step(self, x):
        return 1
"""


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("return self.helped(x)", "# a comment\n        return self.helped( x )", True),
        ("return 1", "return 2", True),
        ("F.relu(x)", "F.gelu(x)", False),
        ("return self.helped(x)", "return self.helped(2 * x)", False),
        ("def helped(self, x):\n", 'def helped(self, x):\n        """What it does."""\n', True),
    ],
    ids=["comment", "not part of it", "called method", "forward", "docstring"],
)
def test_code_is_that_of_forward_and_of_what_it_calls(
    old: str, new: str, same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert old in CODE
    before = code_digest(class_of(CODE, tmp_path, monkeypatch))
    assert before
    assert (code_digest(class_of(CODE.replace(old, new), tmp_path, monkeypatch)) == before) is same


def test_code_of_torch_and_of_nowhere_is_not_noted() -> None:
    namespace: dict[str, Any] = {}
    exec("from torch import nn\nclass Net(nn.Module):\n    def forward(self, x):\n        return x", namespace)
    assert code_digest(nn.Conv2d) == code_digest(namespace["Net"]) == code_digest(nn.Module) == ""
