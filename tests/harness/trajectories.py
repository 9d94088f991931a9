"""Running a module with and without the callbacks that analyse it, and finding the first thing that differs."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.convergence_monitor import ConvergenceMonitor
from lightning_qat.callbacks.layer_comparison import LayerComparison
from lightning_qat.callbacks.layer_statistics import LayerStatistics
from lightning_qat.callbacks.model_check import ModelCheck
from lightning_qat.callbacks.pipeline_check import PipelineCheck
from lightning_qat.callbacks.pipeline_fingerprint import PipelineFingerprint
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.callbacks.sensitivity_analysis import SensitivityAnalysis
from tests.harness.state import differences
from tests.harness.trainers import trainer

OWN = ("sensitivity/", "layer_statistics/", "layer_comparison/", "convergence/")


def analysers() -> list[Callback]:
    """Everything that looks at a run."""
    return [
        LayerStatistics(),
        SensitivityAnalysis(),
        LayerComparison(every_n_epochs=1),
        ModelCheck(show=False),
        ConvergenceMonitor(float_batches=2),
        PipelineCheck(batches=2, eval_batches=1),
        PipelineFingerprint(batches=1),
    ]


def quantization(start_epoch: int = 0) -> list[Callback]:
    return [QuantizationAwareTraining(activation_scales="ema", start_epoch=start_epoch), Calibration(batches=2)]


class Trajectory(Callback):
    """Everything a run consists of, at every batch: data, weights, gradients, optimizers, random states, metrics."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._note(trainer, pl_module, batch)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._note(trainer, pl_module)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any) -> None:
        self._note(trainer, pl_module, batch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer, pl_module)

    def _note(self, trainer: Trainer, module: LightningModule, batch: Any = None) -> None:
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        of_user = {name: tensor for name, tensor in named.items() if "_quantization" not in name}
        metrics = {k: v for k, v in trainer.callback_metrics.items() if not k.startswith(OWN)}
        self.events.append(
            {
                "batch": _copied(batch),
                "tensors": _copied(of_user),
                "gradients": _copied({name: tensor.grad for name, tensor in of_user.items()}),
                "trains": {name: tensor.requires_grad for name, tensor in of_user.items()},
                "modes": {name: m.training for name, m in module.named_modules() if "_quantization" not in name},
                "optimizers": _copied([optimizer.state_dict() for optimizer in trainer.optimizers]),
                "schedulers": _copied([config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]),
                "metrics": _copied(metrics),
                "random": [torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()],
                "own": _copied(getattr(module, "own_state", list)()),
            }
        )


def trajectory(
    path: Path, module: Callable[[], LightningModule], *callbacks: Callback, fit: Any = None, **kwargs: Any
) -> list[dict[str, Any]]:
    """Train a module from fixed seeds for two epochs; ``fit`` returns more arguments of ``Trainer.fit``."""
    seed_everything(3, verbose=False)
    record = Trajectory()
    run = trainer(path, *callbacks, record, **{"max_epochs": 2, **kwargs})
    run.fit(module(), **(fit() if fit else {}))
    return record.events


def assert_no_trace(
    path: Path, module: Callable[[], LightningModule], *, start_epoch: int = 0, fit: Any = None, **kwargs: Any
) -> None:
    """Train with quantization, and with everything that analyses besides; every batch is the same, bit for bit."""
    plain = trajectory(path / "plain", module, *quantization(start_epoch), fit=fit, **kwargs)
    other = trajectory(path / "other", module, *quantization(start_epoch), *analysers(), fit=fit, **kwargs)
    assert_same_trajectory(plain, other)


def assert_same_trajectory(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert len(one) == len(other) > 0
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        assert not (found := list(differences(a, b, f"event {number}", _equal))), found


def _equal(one: Tensor, other: Tensor) -> bool:
    """NaN equals NaN."""
    return one.shape == other.shape and torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(item) for item in value]
    return value.copy().tolist() if isinstance(value, np.ndarray) else value
