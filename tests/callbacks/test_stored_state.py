"""The state of a callback in a damaged checkpoint: it is read, or refused in one sentence that names the callback.

Issue 12, number 22: every callback that keeps a state, alone and in a fit that resumes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback

import lightning_qat
from lightning_qat.callbacks.accuracy_table import AccuracyTable
from lightning_qat.callbacks.convergence_monitor import ConvergenceMonitor
from lightning_qat.callbacks.float_finetune import FloatFinetune
from lightning_qat.callbacks.layer_statistics import LayerStatistics
from lightning_qat.callbacks.pipeline_check import PipelineCheck
from lightning_qat.callbacks.pipeline_fingerprint import PipelineFingerprint
from lightning_qat.callbacks.sensitivity_analysis import SensitivityAnalysis
from lightning_qat.callbacks.zero_lr_finetune import ZeroLRFinetune
from tests.harness.classifier import Classifier
from tests.harness.damage import damaged_values, is_one_sentence
from tests.harness.trainers import qat_trainer

KEEPING: dict[str, Callable[[], Callback]] = {
    "AccuracyTable": AccuracyTable,
    "ConvergenceMonitor": lambda: ConvergenceMonitor(float_batches=2),
    "FloatFinetune": lambda: FloatFinetune(batches=1),
    "LayerStatistics": LayerStatistics,
    "PipelineCheck": lambda: PipelineCheck(at_epoch=9),
    "PipelineFingerprint": lambda: PipelineFingerprint(batches=1),
    "SensitivityAnalysis": SensitivityAnalysis,
    "ZeroLRFinetune": lambda: ZeroLRFinetune(batches=1),
}
"""The callbacks that keep a state, made cheaply."""

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run with all of them."""
    path = tmp_path_factory.mktemp("run")
    run = qat_trainer(path, *(make() for make in KEEPING.values()), max_epochs=1, limit_train_batches=2)
    run.fit(Classifier())
    run.save_checkpoint(path / "x.ckpt")
    return path / "x.ckpt"


def state_of(checkpoint: dict[str, Any], name: str) -> tuple[str, Any]:
    return next((key, state) for key, state in checkpoint["callbacks"].items() if key.split("{")[0] == name)


def test_these_are_all_that_keep_a_state() -> None:
    public = {name: getattr(lightning_qat, name) for name in lightning_qat.__all__}
    callbacks = {name: c for name, c in public.items() if isinstance(c, type) and issubclass(c, Callback)}
    assert set(KEEPING) == {name for name, c in callbacks.items() if c.load_state_dict is not Callback.load_state_dict}


@pytest.mark.parametrize("name", KEEPING)
def test_a_damaged_state_is_read_or_refused_in_one_sentence(name: str, checkpoint: Path) -> None:
    _, state = state_of(torch.load(checkpoint), name)
    KEEPING[name]().load_state_dict(state)
    refusals = {}
    for what, damaged in damaged_values(state):
        if damaged:  # Lightning gives a callback no empty state
            try:
                KEEPING[name]().load_state_dict(damaged)
            except MisconfigurationException as error:
                refusals[what] = str(error)
    assert len(refusals) > 2
    for what, message in refusals.items():
        assert f"the state of {name} in the checkpoint is damaged" in message, what
        assert is_one_sentence(message), what


@pytest.mark.parametrize("name", KEEPING)
def test_a_fit_that_resumes_ends_in_that_sentence(name: str, checkpoint: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint)
    key, state = state_of(content, name)
    content["callbacks"][key] = dict.fromkeys(state, b"damaged")
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(MisconfigurationException, match=f"the state of {name} in the checkpoint is damaged") as error:
        qat_trainer(tmp_path, KEEPING[name](), max_epochs=2).fit(Classifier(), ckpt_path=tmp_path / "x.ckpt")
    assert is_one_sentence(str(error.value))


def test_a_damaged_step_is_no_traceback(tmp_path: Path) -> None:
    """What AccuracyTable takes from the checkpoint itself."""
    with pytest.raises(MisconfigurationException, match="global_step must be a whole number"):
        AccuracyTable().on_load_checkpoint(None, None, {"global_step": "x"})  # type: ignore[arg-type]
