"""The proof that an exported graph computes the codes of the region.

From end to end, codes flip by one where floating-point sums differ in their last bits, and flips cascade. So the codes
are compared quantizer by quantizer for the same input, where all of them have to be equal, and from end to end it is
measured how many are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_qat.export.deployed_form import NARROW, Reference
from lightning_qat.export.deployed_ops import USE_KEY
from lightning_qat.export.export_errors import ExportMismatchError
from lightning_qat.export.onnx_graph import NamedUse
from lightning_qat.export.onnx_sessions import OPTIMIZATIONS, run
from lightning_qat.export.verification_result import OutputRow, QuantizerRow

Codes = NDArray[np.int64]


class VerifiedGraph:
    """An exported graph, and what the region made of the example inputs.

    Args:
        proto: the ``onnx.ModelProto``.
        uses: the quantizations by name.
        references: what the region made there, by name.
        file: where the graph is, if its weights are in a file beside it.
    """

    def __init__(
        self,
        proto: Any,
        uses: Mapping[str, NamedUse],
        references: Mapping[str, Reference],
        file: Path | None = None,
    ) -> None:
        from onnx import numpy_helper

        self.proto = proto
        self.source: Any = proto if file is None else file
        self.uses = uses
        self.references = references
        nodes = [(node, _use_of(node)) for node in proto.graph.node]
        self.quantize = {use: n for n, use in nodes if use in uses and n.op_type == "QuantizeLinear"}
        self.dequantize = {use: n for n, use in nodes if use in uses and n.op_type == "DequantizeLinear"}
        self._to_array = numpy_helper.to_array
        self._initializers = {tensor.name: tensor for tensor in proto.graph.initializer}

    @property
    def order(self) -> list[str]:
        """The quantizations in the graph, in the order in which the region ran them."""
        return [name for name in self.uses if name in self.dequantize]

    def codes(self) -> dict[str, Codes]:
        """The codes of every quantizer for the region's input of it; those of weights as they are stored."""
        found: dict[str, Codes] = {}
        activations = [name for name in self.order if name in self.quantize]
        if activations:
            found |= self._of_activations(activations)
        for name in self.order:
            if name not in self.quantize:
                found[name] = self._array(self.dequantize[name].input[0]).astype(np.int64)
        return found

    def codes_behind_ops(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, Codes]:
        """The codes of every activation, where all ops in front read what the region read there.

        Args:
            inputs: of the model, by name.
        """
        from onnx import TensorProto, helper

        activations = [name for name in self.order if name in self.quantize]
        replaced = {self.dequantize[name].output[0]: name for name in activations}
        nodes = []
        for node in self.proto.graph.node:
            copied = type(node)()
            copied.CopyFrom(node)
            for i, value in enumerate(node.input):
                if value in replaced:
                    copied.input[i] = f"{value}/region"
            nodes.append(copied)
        fed = {f"{value}/region": self._region_value(name) for value, name in replaced.items()}
        infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in fed]
        wanted = [self.dequantize[name].output[0] for name in activations]
        graph = helper.make_graph(
            nodes,
            "behind_ops",
            [*self.proto.graph.input, *infos],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in wanted],
            self.proto.graph.initializer,
        )
        values = run(self._model(graph), {**inputs, **fed}, "off")
        return {name: self.codes_of(name, value) for name, value in zip(activations, values, strict=True)}

    def _of_activations(self, names: list[str]) -> dict[str, Codes]:
        from onnx import TensorProto, helper

        nodes, needed, outputs = [], set(), []
        for name in names:
            quantize, dequantize = self.quantize[name], self.dequantize[name]
            nodes += [self._with_input(quantize, f"{name}/value"), dequantize]
            needed |= {*quantize.input[1:], *dequantize.input[1:]}
            narrow = self.uses[name].use.dtype in NARROW  # which numpy does not have
            kind = TensorProto.FLOAT if narrow else self._initializers[quantize.input[2]].data_type
            value = dequantize.output[0] if narrow else quantize.output[0]
            outputs.append(helper.make_tensor_value_info(value, kind, None))
        fed = {f"{name}/value": self.references[name].value.cpu().numpy() for name in names}
        infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in fed]
        held = [self._initializers[name] for name in sorted(needed)]
        values = run(self._model(helper.make_graph(nodes, "quantizers", infos, outputs, held)), fed, "off")
        return {
            name: self.codes_of(name, v) if self.uses[name].use.dtype in NARROW else v.astype(np.int64)
            for name, v in zip(names, values, strict=True)
        }

    def _with_input(self, node: Any, value: str) -> Any:
        copied = type(node)()
        copied.CopyFrom(node)
        copied.input[0] = value
        return copied

    def _model(self, graph: Any) -> Any:
        from onnx import helper

        return helper.make_model(
            graph,
            opset_imports=self.proto.opset_import,
            ir_version=self.proto.ir_version,
            functions=self.proto.functions,
        )

    def _array(self, initializer: str) -> NDArray[Any]:
        array: NDArray[Any] = self._to_array(self._initializers[initializer])
        return array

    def _region_value(self, name: str) -> NDArray[Any]:
        reference, use = self.references[name], self.uses[name].use
        zero = use.zero_point.int()
        if use.axis is not None:
            zero = zero.reshape(reference.scale.shape)
        return ((reference.codes - zero) * reference.scale).float().cpu().numpy()

    def codes_of(self, name: str, value: NDArray[Any]) -> Codes:
        """The codes that dequantized values stand for."""
        reference, use = self.references[name], self.uses[name].use
        zero = use.zero_point.int().reshape(reference.scale.shape).cpu().numpy()
        steps: Codes = np.rint(value.astype(np.float64) / reference.scale.double().cpu().numpy()).astype(np.int64)
        result: Codes = steps + zero
        return result

    def scales_equal(self, name: str) -> bool:
        """Whether scale and zero point in the graph are those of the region, bit for bit."""
        node, use = self.dequantize[name], self.uses[name].use
        scale, zero = self._array(node.input[1]), self._array(node.input[2]).astype(np.int64)
        return np.array_equal(scale, use.scale.cpu().numpy()) and np.array_equal(
            zero, use.zero_point.cpu().numpy().astype(np.int64)
        )


def verified_quantizers(graph: VerifiedGraph, inputs: Mapping[str, NDArray[Any]]) -> tuple[QuantizerRow, ...]:
    """Compare every quantizer of a graph with the region.

    Args:
        graph: the exported graph.
        inputs: of the model, by name.

    Raises:
        ExportMismatchError: one has other codes for the same input.
    """
    found = graph.codes()
    for name in graph.order:
        expected = graph.references[name].codes.cpu().numpy()
        different = int((found[name] != expected).sum()) if found[name].shape == expected.shape else expected.size
        if different or not graph.scales_equal(name):
            what = f"{different} of {expected.size} codes" if different else "the scale or the zero point"
            raise ExportMismatchError(
                f"the exported graph is not what was trained: at {name}, the first quantizer that differs, {what} "
                f"differ for the same input (node {graph.dequantize[name].name}). The file was written for you to "
                "look at; do not ship it."
            )
    try:
        behind = graph.codes_behind_ops(inputs)
    except Exception:  # an op that onnxruntime lacks: the outputs say so
        behind = {}
    rows = []
    for name in graph.order:
        expected = graph.references[name].codes.cpu().numpy()
        share, steps = _compared(behind[name], expected) if name in behind else (None, None)
        role = "activation" if name in graph.quantize else "weight"
        rows.append(QuantizerRow(name, role, graph.uses[name].use.dtype, expected.size, 1.0, share, steps))
    return tuple(rows)


def verified_outputs(
    graph: VerifiedGraph,
    inputs: Mapping[str, NDArray[Any]],
    quantized: Iterable[Tensor],
    in_float: Iterable[Tensor],
) -> tuple[OutputRow, ...]:
    """Compare the outputs of the whole model, under each setting of onnxruntime's optimizations.

    Args:
        graph: the exported graph.
        inputs: of the model, by name.
        quantized: what the model returns with its regions quantized, in the order of the graph's outputs.
        in_float: what it returns in float.
    """
    names = [value.name for value in graph.proto.graph.output]
    uses = {node.output[0]: use for use, node in graph.dequantize.items()}
    expected = [tensor.detach().cpu() for tensor in quantized]
    original = [tensor.detach().cpu() for tensor in in_float]
    rows: list[OutputRow] = []
    for optimization in OPTIMIZATIONS:
        try:
            values = run(graph.source, inputs, optimization)
        except Exception as error:  # onnxruntime has faults of its own: the file may still be what others need
            nan, why = math.nan, str(error).strip().splitlines()[0]
            rows += [OutputRow(name, optimization, None, None, nan, nan, nan, nan, why) for name in names]
            continue
        for name, value, one, other in zip(names, values, expected, original, strict=True):
            share, steps = None, None
            if name in uses:
                reference = graph.references[uses[name]].codes.cpu().numpy()
                share, steps = _compared(graph.codes_of(uses[name], value), reference)
            found = torch.from_numpy(value)
            largest, mean = _difference(found, one)
            quantization, mean_quantization = _difference(other, one)
            rows.append(OutputRow(name, optimization, share, steps, largest, quantization, mean, mean_quantization))
    return tuple(rows)


def _compared(found: Codes, expected: NDArray[Any]) -> tuple[float, int]:
    """The share of equal codes, and the largest difference."""
    difference = np.abs(found - expected)
    return (float((difference == 0).mean()), int(difference.max())) if difference.size else (1.0, 0)


def _difference(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest and the mean absolute difference; ``nan`` where only one of the two has a number."""
    if found.shape != expected.shape:
        return math.nan, math.nan
    difference = (found.double() - expected.double()).abs()
    same = (found == expected) | (found.isnan() & expected.isnan())  # infinities of the same sign, too
    difference = difference.masked_fill(same, 0.0)
    return (float(difference.max()), float(difference.mean())) if difference.numel() else (0.0, 0.0)


def _use_of(node: Any) -> str:
    return next((entry.value for entry in node.metadata_props if entry.key == USE_KEY), "")
