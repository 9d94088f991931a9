"""Damaged checkpoints: whatever is wrong in one, the error is one sentence, and the model is left as it was.

People met raw tracebacks in 39 of 55 damaged checkpoints, scales of NaN, inf, 0 and -1 that were accepted, and the
advice to read an empty file with ``weights_only=False``. Damage here is systematic, see ``tests/harness/damage.py``.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_qat.analysis.diagnosis.diagnosis import check_declared_range
from lightning_qat.callbacks.insertion.quantized_checkpoint import load_quantized
from lightning_qat.quantization.errors import ConfigurationError, PlanMismatchError
from lightning_qat.quantization.overrides import ActivationOverride
from lightning_qat.quantization.region.region import find_regions
from lightning_qat.quantization.region.stored_state import read_region
from tests.harness.classifier import Classifier
from tests.harness.damage import damaged_bytes, damaged_values, is_one_sentence, read_or_refused
from tests.harness.state import assert_same, state_of
from tests.harness.trainers import qat_trainer, quantized_checkpoint

IMAGES = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))
PREFIX = "net._quantization."
EXTRA = f"{PREFIX}_extra_state"
SPLIT = [{"match": "conv1.input0", "activation": {"split": {"axis": 2, "sizes": [2, 4]}}}]
pytestmark = pytest.mark.filterwarnings("ignore:`weights_only` was not set")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return quantized_checkpoint(tmp_path_factory.mktemp("run"), qat={"overrides": SPLIT})


def changed(checkpoint: Path, key: str, value: Any) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(checkpoint)
    content["state_dict"][key] = value
    return content


def test_damaged_bytes(checkpoint: Path, tmp_path: Path) -> None:
    """Cut off, overwritten, flipped, empty, text: it is refused, or it is the same model."""
    expected = load_quantized(Classifier, checkpoint)(IMAGES)
    path = tmp_path / "x.ckpt"
    refused = 0
    for name, content in damaged_bytes(checkpoint.read_bytes(), places=20):
        path.write_bytes(content)
        outcome = read_or_refused(lambda: load_quantized(Classifier, path), name)
        refused += isinstance(outcome, Exception)
        if not isinstance(outcome, Exception):
            assert torch.equal(outcome(IMAGES), expected), name
    assert refused > 40


@pytest.mark.parametrize("part", range(2))
def test_damaged_values_of_a_region(checkpoint: Path, part: int) -> None:
    """Every value of plan, graph and statistics: the same check stands in front of every way in."""
    state = torch.load(checkpoint)["state_dict"]
    refused = cases = 0
    for name, extra in itertools.islice(damaged_values(state[EXTRA]), part, None, 17):
        outcome = read_or_refused(lambda e=extra: read_region({**state, EXTRA: e}, PREFIX), name)
        refused, cases = refused + isinstance(outcome, Exception), cases + 1
    assert refused > 0.7 * cases > 70


def test_damaged_values_of_a_file(checkpoint: Path, tmp_path: Path) -> None:
    """What is read is used: the model runs."""
    content = torch.load(checkpoint)
    path = tmp_path / "x.ckpt"
    for name, damaged in itertools.islice(damaged_values(content), 0, None, 401):
        torch.save(damaged, path)
        outcome = read_or_refused(lambda: load_quantized(Classifier, path), name)
        if not isinstance(outcome, Exception):
            read_or_refused(lambda loaded=outcome: loaded(IMAGES), name)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("conv2/weight.scale", lambda t: t * float("nan"), "must be numbers between"),
        ("conv2/weight.scale", lambda t: t / 0, "must be numbers between"),
        ("conv2/weight.scale", lambda t: t * 0, "must be numbers between"),
        ("relu_0/output.scale", lambda t: -t, "must be numbers between"),
        ("conv2/weight.scale", lambda t: t[:1], "must be a tensor of 4 numbers"),
        ("conv1/input0.scale", lambda t: t.tolist(), "must be a tensor of 2 numbers"),
        ("relu_0/output.zero_point", lambda t: t + 200, "must be numbers between -128 and 127"),
        ("relu_0/output.zero_point", None, "must be a tensor of 1 numbers"),
    ],
)
def test_scales_that_cannot_be(checkpoint: Path, tmp_path: Path, name: str, value: Any, problem: str) -> None:
    """NaN, inf, 0, -1, of other shapes, and codes that the type does not have: refused in every way of loading."""
    key = f"{PREFIX}fake_quants.{name}"
    content = torch.load(checkpoint)
    content["state_dict"][key] = None if value is None else value(content["state_dict"][key])
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(MisconfigurationException, match="quantizer state in the checkpoint is damaged") as refusal:
        load_quantized(Classifier, tmp_path / "x.ckpt")
    message = str(refusal.value)
    assert name in message
    assert problem in message
    assert is_one_sentence(message)
    assert message.startswith(str(tmp_path / "x.ckpt"))
    with pytest.raises(MisconfigurationException, match="quantizer state in the checkpoint is damaged"):
        qat_trainer(tmp_path, max_epochs=2).fit(Classifier(), ckpt_path=tmp_path / "x.ckpt")


@pytest.mark.parametrize("kind", ["scale", "dtype", "histogram", "graph"])
def test_damaged_state_leaves_the_model_as_it_was(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    """A module that has scales of its own, by load_state_dict of the region, and by a fit."""
    content = torch.load(checkpoint)
    state = content["state_dict"]
    last = list(state[EXTRA]["statistics"])[-1]  # everything before it would be taken already
    if kind == "scale":
        state[f"{PREFIX}fake_quants.{last.replace('.', '/')}.scale"] *= float("nan")
    elif kind == "dtype":
        state[EXTRA]["statistics"][last]["dtype"] = "int99"
    elif kind == "histogram":
        state[EXTRA]["statistics"]["mean_0.output"]["statistics"]["histogram"]["packed"] = "x"
    else:
        state[EXTRA]["graph"] = state[EXTRA]["graph"][:-7]
    module = load_quantized(Classifier, checkpoint)
    (region,) = find_regions(module).values()
    with torch.no_grad():
        for point in region.points.values():
            point.scale *= 2
    before, plan = copy.deepcopy(state_of(module)), region.plan
    own = {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}
    with pytest.raises(PlanMismatchError, match="damaged"):
        region.load_state_dict(own)
    assert_same(state_of(module), before)
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(MisconfigurationException, match="damaged"):
        qat_trainer(tmp_path, max_epochs=2).fit(module, ckpt_path=tmp_path / "x.ckpt")
    assert_same(state_of(module), before)
    assert region.plan is plan


def test_missing_plan_is_no_float_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint)
    del content["state_dict"][EXTRA]
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(MisconfigurationException, match=r"_extra_state\] is missing, which holds the plan"):
        load_quantized(Classifier, tmp_path / "x.ckpt")


def test_empty_file_does_not_ask_for_trust(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").touch()
    with pytest.raises(MisconfigurationException) as refusal:
        load_quantized(Classifier, tmp_path / "x.ckpt")
    assert str(refusal.value).endswith(": it is empty; use another checkpoint of that run.")


@pytest.mark.parametrize("field", ["fixed_scale", "threshold"])
@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), 0, -1, "nan", "0/1", "1/0", "1e999", "-" * 5000 + "1", "1+" * 5000 + "1", [1], True],
)
def test_scales_of_an_override(field: str, value: Any) -> None:
    """The same values in the YAML of a user."""
    with pytest.raises(ConfigurationError) as refusal:
        ActivationOverride(**{field: value})
    assert is_one_sentence(str(refusal.value))


@pytest.mark.parametrize("ends", [[float("nan"), 1], [1, float("inf")], [1, -1], [1], "x", None])
def test_ranges_of_a_comparison(ends: Any) -> None:
    with pytest.raises(ConfigurationError):
        check_declared_range("a", ends, ["a"])


@pytest.mark.filterwarnings("ignore:weight decay pulls", "ignore:learned scales that are less than 2 steps")
def test_scales_that_training_has_taken_below_zero_are_read(tmp_path: Path) -> None:
    """Learned scales are clamped where they are used: a run that diverged can be looked at."""
    content = torch.load(quantized_checkpoint(tmp_path, qat={"activation_scales": "learned"}))
    key = f"{PREFIX}fake_quants.relu_0/output.scale"
    assert isinstance(content["state_dict"][key], Tensor)
    content["state_dict"][key] = torch.tensor(-0.5)
    torch.save(content, tmp_path / "x.ckpt")
    assert load_quantized(Classifier, tmp_path / "x.ckpt")(IMAGES).isfinite().all()
