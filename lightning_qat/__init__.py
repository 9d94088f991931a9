"""Quantization-aware training for PyTorch Lightning, and finding out why it fails."""

from lightning_qat.analysis.sensitivity import sensitivity
from lightning_qat.callbacks.accuracy_table import AccuracyTable
from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.float_checkpoint import load_quantized
from lightning_qat.callbacks.float_finetune import FloatFinetune
from lightning_qat.callbacks.layer_statistics import LayerStatistics
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.callbacks.sensitivity_analysis import SensitivityAnalysis
from lightning_qat.callbacks.zero_lr_finetune import ZeroLRFinetune
from lightning_qat.quantization.calibration import calibrate
from lightning_qat.quantization.dynamic_block import dynamic_block
from lightning_qat.quantization.insertion import insert
from lightning_qat.quantization.qconfig import (
    ActivationConfig,
    ActivationOverride,
    Override,
    QConfig,
    WeightConfig,
    WeightOverride,
)
from lightning_qat.quantization.region import Region

__version__ = "0.1.0"

__all__ = [
    "AccuracyTable",
    "ActivationConfig",
    "ActivationOverride",
    "Calibration",
    "FloatFinetune",
    "LayerStatistics",
    "Override",
    "QConfig",
    "QuantizationAwareTraining",
    "Region",
    "SensitivityAnalysis",
    "WeightConfig",
    "WeightOverride",
    "ZeroLRFinetune",
    "__version__",
    "calibrate",
    "dynamic_block",
    "insert",
    "load_quantized",
    "sensitivity",
]
