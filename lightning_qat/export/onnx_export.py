"""Exporting a quantized model to ONNX in its deployed form."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_qat.atomic_files import write_atomically
from lightning_qat.export.capture import captured, evaluating, quantized_regions, quiet, tensors_of
from lightning_qat.export.deployed_form import (
    FULL_OPSET,
    check_calibrated,
    check_onnx_types,
    deployed_form,
)
from lightning_qat.export.deployed_mode import DeployedForward
from lightning_qat.export.deployed_ops import translations
from lightning_qat.export.export_errors import conversion_error
from lightning_qat.export.external_data import check_onnx, data_file, is_large, with_shapes, write_with_data
from lightning_qat.export.float_twin import float_twin, milliseconds
from lightning_qat.export.integer_ops import integer_ops
from lightning_qat.export.onnx_graph import finish_graph, named_uses
from lightning_qat.export.onnx_verification import VerifiedGraph, verified_outputs, verified_quantizers
from lightning_qat.export.verification_result import ExportResult, OpRow, OutputRow, QuantizerRow
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.modules.call import Call

_EXTRA = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True, eq=False)
class Exported:
    """An exported model with what the regions made of the same inputs.

    Args:
        proto: the ``onnx.ModelProto``.
        deployed: every region as it was exported.
        call: the example inputs.
        outputs: what the quantized model returns for them.
        float_outputs: what the model returns with its regions switched off.
    """

    proto: Any
    deployed: tuple[DeployedForward, ...]
    call: Call
    outputs: Any
    float_outputs: Any


def check_extra() -> None:
    """Refuse to work without the packages of the extra.

    Raises:
        ConfigurationError: one is missing.
    """
    for name in _EXTRA:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigurationError(f"exporting to ONNX needs {name}: pip install 'lightning-qat[onnx]'.") from error


def exported(
    model_or_region: nn.Module,
    example_inputs: Any,
    dynamic_shapes: Any = None,
    opset: int = FULL_OPSET,
    references: bool = True,
) -> Exported:
    """Export a quantized model, without writing it. The model stays as it is.

    Args:
        model_or_region: the model, or one region of it.
        example_inputs: a tensor, a tuple of arguments, a mapping of keyword arguments, or ``(args, kwargs)``.
        dynamic_shapes: as for ``torch.export.export``.
        opset: of ONNX; 19 and 20 have 8-bit codes only.
        references: whether what the regions made of the inputs is kept, for the proof.

    Raises:
        ConfigurationError: the model cannot be exported; the message names the cause.
    """
    check_extra()
    model, regions = quantized_regions(model_or_region)
    check_calibrated(regions)
    check_onnx_types(regions, opset)
    call = Call.of(example_inputs)
    with torch.no_grad(), evaluating(model, regions):
        run = partial(call.run, model)
        forms = {path: deployed_form(region, run, references=references) for path, region in regions.items()}
        outputs = run()
        with ExitStack() as stack:
            for region in regions.values():
                stack.enter_context(region.state("off"))
            float_outputs = run()
        deployed = [DeployedForward(r, forms[path], f"{path}." if path else "") for path, r in regions.items()]
        proto = _proto(model, deployed, call.copied(), dynamic_shapes, opset)
    return Exported(proto, tuple(deployed), call, outputs, float_outputs)


def export_model(
    model_or_region: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    dynamic_shapes: Any = None,
    opset: int = FULL_OPSET,
    verify: bool = True,
) -> ExportResult:
    """Export, write and verify a quantized model: :func:`lightning_qat.export_onnx` without its report."""
    found = exported(model_or_region, example_inputs, dynamic_shapes, opset, references=verify)
    import onnx

    file = write_onnx(found.proto, path)
    uses = named_uses(found.deployed)
    references = {one.prefix + n: r for one in found.deployed for n, r in one.form.references.items()}
    large = is_large(found.proto)
    graph = VerifiedGraph(onnx.load(file), uses, references, file if large else None)  # what a reader of the file gets
    rows: tuple[QuantizerRow, ...] = ()
    outputs: tuple[OutputRow, ...] = ()
    integers: tuple[OpRow, ...] = ()
    cost: dict[str, Any] = {}
    if verify:
        inputs = _graph_inputs(found)
        rows = verified_quantizers(graph, inputs)
        integers = integer_ops(graph.proto, graph.source)
        cost = {} if large else _cost(graph.proto, inputs)
        outputs = verified_outputs(graph, inputs, tensors_of(found.outputs), tensors_of(found.float_outputs))
    return ExportResult(
        rows,
        outputs,
        str(file),
        opset,
        verify,
        folded=tuple(one.prefix + norm for one in found.deployed for norm in sorted(one.form.folded_norms)),
        kept=tuple((one.prefix + n, why) for one in found.deployed for n, why in one.form.kept_norms.items()),
        in_float=tuple(one.prefix + name for one in found.deployed for name in one.form.not_calibrated),
        shared=tuple(name for name in uses if name not in graph.dequantize),
        integer_ops=integers,
        bytes=file.stat().st_size + (data_file(file).stat().st_size if large else 0),
        **cost,
    )


def _cost(proto: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Size and time beside those of the graph without quantizers."""
    twin = float_twin(proto)
    try:
        quantized, in_float = milliseconds((proto, twin), inputs)
    except Exception:  # onnxruntime lacks an op, or does not load the file: the rows of the outputs say so
        quantized, in_float = 0.0, 0.0
    return {"float_bytes": twin.ByteSize(), "milliseconds": quantized, "float_milliseconds": in_float}


def _graph_inputs(found: Exported) -> dict[str, Any]:
    names = [value.name for value in found.proto.graph.input]
    tensors = tensors_of((found.call.args, found.call.kwargs))
    return {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}


def write_onnx(proto: Any, path: str | os.PathLike[str]) -> Path:
    """Check an exported model and write it; an existing file is replaced at once.

    Weights of a model that a single file cannot hold are written beside it, as ``<name>.data``.

    Raises:
        NotWrittenError: the file cannot be written.
        ConfigurationError: torch.onnx has made a graph that is not valid.
    """
    if is_large(proto):
        return write_with_data(proto, Path(path))
    check_onnx(proto)
    return write_atomically(path, proto.SerializeToString())


def _proto(model: nn.Module, deployed: list[DeployedForward], call: Call, dynamic_shapes: Any, opset: int) -> Any:
    import onnx_ir

    with ExitStack() as stack:
        for one in deployed:
            stack.enter_context(one)
        stack.enter_context(quiet())
        program = captured(model, call, dynamic_shapes)
        try:
            found = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=dynamic_shapes,  # for the names
                custom_translation_table=translations(opset),
                verbose=False,
            )
        except Exception as error:
            raise conversion_error(model, program, error) from error
        assert found is not None
        finish_graph(found.model, deployed)
    return with_shapes(onnx_ir.serde.serialize_model(found.model))
