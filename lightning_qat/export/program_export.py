"""Exporting a quantized model as an ExportedProgram in its deployed form."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind

from lightning_qat.atomic_files import write_atomically
from lightning_qat.export.capture import captured, evaluating, quantized_regions, quiet, tensors_of
from lightning_qat.export.deployed_form import check_calibrated, deployed_form
from lightning_qat.export.deployed_mode import CHILD, DeployedForward
from lightning_qat.export.export_errors import ExportMismatchError
from lightning_qat.export.plain_ops import PLAIN_OPS
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.modules.module_walk import REGION_NAME

_HELD = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def export_program(
    model_or_region: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str] | None = None,
    dynamic_shapes: Any = None,
    verify: bool = True,
) -> ExportedProgram:
    """Export a quantized model with ``torch.export``, in the form in which it is deployed.

    Weights are stored as integer codes and dequantized. Activations are quantized to integer codes and dequantized.
    The program consists of torch's own operators, so it is saved with ``torch.export.save`` and loaded where this
    package is not installed. It has no weights in float beside those that the model has in float.

    It computes what the model computes, bit for bit: with ``verify``, the outputs for the example inputs are compared.
    So fused batch norms stay operators of their own. A compiler may fold them, which changes the last bits of sums.

    Args:
        model_or_region: a model with one or more calibrated regions, such as :func:`lightning_qat.load_quantized`
            returns; or one region, to export its module alone. The model stays as it is.
        example_inputs: of one forward of the model: a tensor, a tuple of arguments, a mapping of keyword arguments, or
            ``(args, kwargs)``. They are not stored in the program.
        path: the file to save it in, such as ``export/model.pt2``; its folder is made if missing. None saves nothing.
        dynamic_shapes: which axes may have other lengths than in the example, as for ``torch.export.export``, such as
            ``({0: "batch"},)``. None fixes all shapes.
        verify: write False to export without comparing outputs.

    Returns:
        The program; ``program.module()(*inputs)`` runs it.

    Raises:
        ConfigurationError: the model is not calibrated, or its forward depends on the values of its inputs.
        ExportMismatchError: an output differs.
        NotWrittenError: the file cannot be written.

    Example:
        >>> import torch, lightning_qat
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> batch = torch.randn(16, 4)
        >>> region = lightning_qat.insert(model, (batch,))
        >>> _ = lightning_qat.calibrate(region, [batch])
        >>> program = lightning_qat.export_program(model, batch)
        >>> region.set_state("quantize")
        >>> torch.equal(program.module()(batch), model(batch))
        True
    """
    model, regions = quantized_regions(model_or_region)
    check_calibrated(regions)
    call = Call.of(example_inputs)
    with torch.no_grad(), evaluating(model, regions):
        run = partial(call.run, model)
        forms = {path: deployed_form(region, run, fold=False, references=False) for path, region in regions.items()}
        outputs = tensors_of(run())
        deployed = [DeployedForward(r, forms[at], f"{at}." if at else "", PLAIN_OPS) for at, r in regions.items()]
        with ExitStack() as stack:
            for one in deployed:
                stack.enter_context(one)
            stack.enter_context(quiet())
            program = _finished(captured(model, call.copied(), dynamic_shapes), deployed)
        if verify:
            _verify(program, call, outputs)
    if path is not None:
        file = io.BytesIO()
        with quiet():
            torch.export.save(program, file)
        write_atomically(path, file.getvalue())
    return program


def _finished(program: ExportedProgram, deployed: Iterable[DeployedForward]) -> ExportedProgram:
    """Name codes and scales as in an ONNX file, and leave out what the program does not use.

    That is the weights in float that codes stand for, the observers, the example inputs and the paths of source files.
    """
    graph, signature = program.graph_module.graph, program.graph_signature
    for node in graph.nodes:
        node.meta.pop("stack_trace", None)
    written = {spec.target for spec in signature.output_specs}
    users = {node.name: len(node.users) for node in graph.nodes}
    kept = [s for s in signature.input_specs if s.kind not in _HELD or users[s.arg.name] or s.target in written]
    known = {spec.arg.name for spec in kept}
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name not in known:
            graph.erase_node(node)
    names = {str(spec.target): str(spec.target) for spec in kept if spec.kind in _HELD}
    for one in deployed:
        for buffer, name in one.tensors.names.items():
            held = f"{one.prefix}{REGION_NAME}.{CHILD}.{buffer}"
            if held in names:
                names[held] = one.prefix + name
    specs = [dataclasses.replace(s, target=names.get(str(s.target), s.target)) for s in kept]
    return ExportedProgram(
        root=program.graph_module,
        graph=graph,
        graph_signature=ExportGraphSignature(specs, signature.output_specs),
        state_dict={names[name]: value for name, value in program.state_dict.items() if name in names},
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=None,
        constants={names[name]: value for name, value in program.constants.items() if name in names},
        verifiers=program.verifiers,
    )


def _verify(program: ExportedProgram, call: Call, outputs: list[Tensor]) -> None:
    found = tensors_of(call.run(program.module()))
    for number, (one, other) in enumerate(zip(found, outputs, strict=True)):
        if one.shape != other.shape or not torch.equal(one.nan_to_num(), other.nan_to_num()):
            raise ExportMismatchError(
                f"the exported program is not what was trained: output {number} differs for the same input. Nothing is "
                "written."
            )
