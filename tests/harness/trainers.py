"""Quiet Trainers on one CPU, with and without quantization, and the checkpoints of short runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from tests.harness.classifier import Classifier


def quiet() -> dict[str, Any]:
    """Arguments of a Trainer that prints nothing, and leaves no logs and no checkpoints."""
    return {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }


def trainer(path: Path, *callbacks: Callback, **kwargs: Any) -> Trainer:
    """A quiet Trainer for one epoch; it may write checkpoints if a callback for them is given."""
    defaults = {
        **quiet(),
        "max_epochs": 1,
        "enable_checkpointing": any("Checkpoint" in type(c).__name__ for c in callbacks),
        "default_root_dir": path,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **kwargs})


def qat_trainer(
    path: Path,
    *callbacks: Callback,
    qat: dict[str, Any] | None = None,
    quantization: QuantizationAwareTraining | None = None,
    calibration_batches: int = 4,
    **kwargs: Any,
) -> Trainer:
    """The same with QuantizationAwareTraining (made of the arguments ``qat``, or given) and Calibration in front."""
    first = quantization or QuantizationAwareTraining(**(qat or {}))
    return trainer(path, first, Calibration(batches=calibration_batches), *callbacks, **kwargs)


def quantized_checkpoint(path: Path, module: LightningModule | None = None, **kwargs: Any) -> Path:
    """The checkpoint of a short QAT run."""
    run = qat_trainer(path, **kwargs)
    run.fit(module or Classifier())
    run.save_checkpoint(path / "quantized.ckpt")
    return path / "quantized.ckpt"


def float_checkpoint(path: Path, module: LightningModule | None = None) -> Path:
    """The checkpoint of a short float run."""
    run = trainer(path)
    run.fit(module or Classifier())
    run.save_checkpoint(path / "float.ckpt")
    return path / "float.ckpt"
