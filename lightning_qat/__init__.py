"""Quantization-aware training for PyTorch Lightning, and finding out why it fails."""

from lightning_qat.analysis.comparison.bad_cases import find_bad_cases
from lightning_qat.analysis.comparison.comparison import compare
from lightning_qat.analysis.diagnosis.diagnosis import diagnose
from lightning_qat.analysis.mixed_precision.measure_choices import measure_choices
from lightning_qat.analysis.mixed_precision.measure_errors import measure_errors
from lightning_qat.analysis.mixed_precision.precision_errors import PrecisionErrors
from lightning_qat.analysis.model_check.model_check import check
from lightning_qat.analysis.runs.run_comparison import compare_runs
from lightning_qat.analysis.sensitivity.sensitivity import sensitivity
from lightning_qat.callbacks.accuracy_table import AccuracyTable
from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.convergence_monitor import ConvergenceMonitor
from lightning_qat.callbacks.float_finetune import FloatFinetune
from lightning_qat.callbacks.html_report import HTMLReport
from lightning_qat.callbacks.insertion.quantized_checkpoint import load_quantized
from lightning_qat.callbacks.layer_comparison import LayerComparison
from lightning_qat.callbacks.layer_statistics import LayerStatistics
from lightning_qat.callbacks.model_check import ModelCheck
from lightning_qat.callbacks.onnx_export import export_onnx
from lightning_qat.callbacks.pipeline_check import PipelineCheck
from lightning_qat.callbacks.pipeline_fingerprint import PipelineFingerprint
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.callbacks.sensitivity_analysis import SensitivityAnalysis
from lightning_qat.callbacks.zero_lr_finetune import ZeroLRFinetune
from lightning_qat.export.encodings.written_encodings import read_encodings, write_encodings
from lightning_qat.export.plan_files import write_plan
from lightning_qat.export.program_export import export_program
from lightning_qat.quantization.interception.dynamic_block import dynamic_block
from lightning_qat.quantization.overrides import ActivationOverride, Override, Split, WeightOverride
from lightning_qat.quantization.planning.hardware_profile import HardwareProfile
from lightning_qat.quantization.planning.profile_violations import ProfileViolation, find_violations
from lightning_qat.quantization.qconfig import ActivationConfig, QConfig, WeightConfig
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.parameter_groups import parameter_groups
from lightning_qat.quantization.region.region import Region, find_regions
from lightning_qat.quantization.region.shared_modules import split_shared_modules
from lightning_qat.reporting.console import show
from lightning_qat.reporting.files import write_csv, write_json
from lightning_qat.tuning.tune import tune

__version__ = "0.1.0"

__all__ = [
    "AccuracyTable",
    "ActivationConfig",
    "ActivationOverride",
    "Calibration",
    "ConvergenceMonitor",
    "FloatFinetune",
    "HTMLReport",
    "HardwareProfile",
    "LayerComparison",
    "LayerStatistics",
    "ModelCheck",
    "Override",
    "PipelineCheck",
    "PipelineFingerprint",
    "PrecisionErrors",
    "ProfileViolation",
    "QConfig",
    "QuantizationAwareTraining",
    "Region",
    "SensitivityAnalysis",
    "Split",
    "WeightConfig",
    "WeightOverride",
    "ZeroLRFinetune",
    "__version__",
    "calibrate",
    "check",
    "compare",
    "compare_runs",
    "diagnose",
    "dynamic_block",
    "export_onnx",
    "export_program",
    "find_bad_cases",
    "find_regions",
    "find_violations",
    "insert",
    "load_quantized",
    "measure_choices",
    "measure_errors",
    "parameter_groups",
    "read_encodings",
    "sensitivity",
    "show",
    "split_shared_modules",
    "tune",
    "write_csv",
    "write_encodings",
    "write_json",
    "write_plan",
]
