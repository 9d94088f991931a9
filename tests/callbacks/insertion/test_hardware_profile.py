"""QuantizationAwareTraining(profile=...): the plan of a run keeps to the hardware, and so does its checkpoint."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_qat.callbacks.insertion.quantized_checkpoint import load_quantized
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.quantization.planning.profile_violations import find_violations
from tests.harness.classifier import Classifier
from tests.harness.state import only_region
from tests.harness.trainers import qat_trainer, quantized_checkpoint

INT16 = {"activation": {"dtype": "int16"}}


def test_run_plans_under_the_profile(tmp_path: Path) -> None:
    run = qat_trainer(tmp_path, qat={"profile": "horizon_plugin_pytorch", "qconfig": INT16})
    module = Classifier()
    run.fit(module)
    region = only_region(module)
    assert find_violations(region.plan, region.graph, "horizon_plugin_pytorch") == ()
    assert any("profile horizon_plugin_pytorch: conv2d" in point.reason for point in region.plan.points)
    (file,) = tmp_path.rglob("quant_plan.json")
    (described,) = json.loads(file.read_text())["regions"].values()
    assert described["profile"]["name"] == "horizon_plugin_pytorch"


def test_checkpoint_keeps_its_profile(tmp_path: Path) -> None:
    path = quantized_checkpoint(tmp_path, qat={"profile": "onnxruntime_qdq"})
    plan = only_region(load_quantized(Classifier, path)).plan
    assert plan.profile["name"] == "onnxruntime_qdq"
    run = qat_trainer(tmp_path / "again", qat={"profile": "generic_int8_int16"})
    with pytest.warns(
        UserWarning, match=r"profile: onnxruntime_qdq \(\w{8}\) there, generic_int8_int16 \(\w{8}\) here"
    ):
        run.test(Classifier(), ckpt_path=path, verbose=False)


def test_callback_with_a_profile_can_be_copied() -> None:
    callback = QuantizationAwareTraining(profile="generic_int8_int16")
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert twin.profile == callback.profile


def test_wrong_profile_fails_at_once() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"unknown profile 'generic'\. Did you mean 'generic_int8_int16'"
    ):
        QuantizationAwareTraining(profile="generic")
