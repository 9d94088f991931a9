"""``export_onnx``: the exported model with its report beside it. It needs no Trainer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from lightning_qat.export.onnx_export import export_model
from lightning_qat.export.verification_result import ExportResult
from lightning_qat.reporting.files import write_result


def export_onnx(
    model_or_region: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    dynamic_shapes: Any = None,
    opset: int = 21,
    verify: bool = True,
) -> ExportResult:
    """Write a quantized model as ONNX, in the form in which it is deployed, and prove that its codes are those trained.

    The file is a QDQ graph. Weights are stored as integer codes with one DequantizeLinear; activations go through
    QuantizeLinear and DequantizeLinear. Fused batch norms are folded. What is in float in the model stays in float.
    Tensors and nodes have the names of the points of the reports, such as ``layers.0.conv1.weight``.

    The proof uses the example inputs. Each quantizer of the file computes in onnxruntime what the model quantizes
    there: all codes must be equal. Then the whole file runs with onnxruntime's optimizations off, basic and full. The
    numbers are written beside the file, as ``<name>_export.txt`` and ``<name>_export.json``.

    It needs onnx, onnxscript and onnxruntime: ``pip install 'lightning-qat[onnx]'``.

    Args:
        model_or_region: a model with one or more calibrated regions, such as :func:`lightning_qat.load_quantized`
            returns; or one region, to export its module alone. The model stays as it is.
        path: the file, such as ``export/model.onnx``; its folder is made if missing.
        example_inputs: of one forward of the model: a tensor, a tuple of arguments, a mapping of keyword arguments, or
            ``(args, kwargs)``. They should be real data, as the proof is about them.
        dynamic_shapes: which axes may have other lengths than in the example, as for ``torch.export.export``, such as
            ``({0: "batch"},)``. None fixes all shapes.
        opset: of ONNX. 19 and 20 have 8-bit codes only, 21 has those of 4, 8 and 16 bits.
        verify: write False to export without the proof.

    Returns:
        Every quantizer with its share of equal codes, and every output with its largest difference; :func:`show` prints
        it.

    Raises:
        ConfigurationError: the model is not calibrated, has types that ONNX lacks, has an op that ONNX cannot express,
            or its forward depends on the values of its inputs; or the extra is missing.
        ExportMismatchError: a quantizer of the file has other codes than the model.
        NotWrittenError: the file cannot be written.

    Example:
        >>> import tempfile, torch, lightning_qat
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> batch = torch.randn(16, 4)
        >>> region = lightning_qat.insert(model, (batch,))
        >>> _ = lightning_qat.calibrate(region, [batch])
        >>> result = lightning_qat.export_onnx(model, f"{tempfile.mkdtemp()}/model.onnx", batch)
        >>> [(row.point, row.dtype, row.equal) for row in result.rows][:2]
        [('0.input0', 'int8', 1.0), ('0.weight', 'int8', 1.0)]
    """
    result = export_model(model_or_region, path, example_inputs, dynamic_shapes, opset, verify)
    file = Path(result.file)
    write_result(result, file.parent, f"{file.stem}_export", formats=("txt", "json"))
    return result
