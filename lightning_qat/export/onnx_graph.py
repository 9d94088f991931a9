"""An exported graph gets the names of our points, and the integer types that torch lacks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from lightning_qat.export.deployed_form import NARROW, QuantizeUse
from lightning_qat.export.deployed_mode import CHILD, DeployedForward
from lightning_qat.export.deployed_ops import USE_KEY
from lightning_qat.export.graph_repairs import keep_matrix_products, part_large_biases, register_constants
from lightning_qat.export.integer_biases import quantize_biases
from lightning_qat.export.moved_codes import quantize_moved
from lightning_qat.quantization.modules.module_walk import REGION_NAME

_FOREIGN_METADATA = ("pkg.torch.", "namespace")
"""Begins the metadata of torch's exporter. It holds the paths of source files on this machine."""
_IN_FRONT = ("Transpose", "Reshape")
"""How a weight may be turned before an op reads it."""
_DEFAULTS = {"output_dtype": 0, "block_size": 0, "saturate": 1}
"""Attributes that say nothing. Some versions of onnxruntime refuse a QuantizeLinear with an output_dtype."""


@dataclass(frozen=True, eq=False)
class NamedUse:
    """A quantization under the name it has in the exported graph.

    Args:
        name: with the path of the region in front.
        op: name of the op, likewise.
        use: the quantization.
    """

    name: str
    op: str
    use: QuantizeUse


def named_uses(deployed: Iterable[DeployedForward]) -> dict[str, NamedUse]:
    """Return all quantizations of an exported model by their names."""
    found: dict[str, NamedUse] = {}
    for one in deployed:
        ops = {p.name: p.op for p in one.region.plan.points}
        for use in one.form.uses.values():
            name = one.prefix + use.name
            found[name] = NamedUse(name, one.prefix + ops[use.point] + use.name.removeprefix(use.point), use)
    return found


def finish_graph(model: Any, deployed: Iterable[DeployedForward]) -> None:
    """Name the quantizers of an exported graph, and everything else that belongs to our points, in place.

    Args:
        model: the ``onnx_ir.Model`` that torch exported.
        deployed: the regions as they were exported.
    """
    graph = model.graph
    deployed = list(deployed)
    uses = named_uses(deployed)
    _strip(model)
    register_constants(graph)
    names = _Names(graph)
    nodes: set[str] = {node.name for node in graph}
    for one in deployed:
        held = f"{one.prefix}{REGION_NAME}.{CHILD}."
        for buffer, name in one.tensors.names.items():
            value = graph.initializers.get(held + buffer)
            if value is not None:
                names.rename(value, one.prefix + name)
    for node in list(graph):
        named = uses.get(node.metadata_props.get(USE_KEY, ""))
        if named is None:
            continue
        node.name = f"{named.name}.{node.op_type}"
        if node.op_type == "QuantizeLinear":
            names.rename(node.outputs[0], f"{named.name}.codes")
        else:
            names.rename(node.outputs[0], named.name)
        _name_op(node, named, nodes)
        if named.use.dtype in NARROW:
            _narrow(graph, node, named, names)
    quantize_moved(graph)
    quantize_biases(graph, _uses_with_integer_bias(deployed))
    part_large_biases(graph)
    keep_matrix_products(graph)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _uses_with_integer_bias(deployed: Iterable[DeployedForward]) -> set[str]:
    """The quantizations in regions whose profile asks for biases of int32."""
    return {
        one.prefix + use.name
        for one in deployed
        if (one.region.plan.profile or {}).get("bias") == "int32"
        for use in one.form.uses.values()
    }


class _Names:
    """The names of the values in a graph, each given once."""

    def __init__(self, graph: Any) -> None:
        values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
        self.taken = {value.name for value in values}

    def rename(self, value: Any, name: str) -> None:
        value.name = self.free(name)

    def free(self, name: str) -> str:
        found, number = name, 1
        while found in self.taken:
            found, number = f"{name}.{number}", number + 1
        self.taken.add(found)
        return found


def _name_op(node: Any, named: NamedUse, names: set[str]) -> None:
    """Give the node of the op the op's name: it makes what is quantized, or it reads the weight."""
    found = None
    if node.op_type == "QuantizeLinear" and named.use.point.endswith(".output"):
        found = node.inputs[0].producer()
    elif named.use.codes is not None:
        found = node
        while found is not None and (found is node or found.op_type in _IN_FRONT):
            readers = found.outputs[0].uses()
            found = readers[0].node if len(readers) == 1 else None
    if found is not None and USE_KEY not in found.metadata_props and named.op not in names:
        names.add(named.op)
        found.name = named.op


def _strip(model: Any) -> None:
    for graph in model.graphs():
        for node in graph:
            for key in [key for key in node.metadata_props if key.startswith(_FOREIGN_METADATA)]:
                del node.metadata_props[key]
            if USE_KEY in node.metadata_props:
                for name, default in _DEFAULTS.items():
                    if name in node.attributes and node.attributes[name].value == default:
                        del node.attributes[name]
            for value in node.outputs:
                _strip_metadata(value.metadata_props)
        for value in (*graph.inputs, *graph.initializers.values()):
            _strip_metadata(value.metadata_props)
        _strip_metadata(graph.metadata_props)
    _strip_metadata(model.metadata_props)


def _strip_metadata(properties: Any) -> None:
    for key in [key for key in properties if key.startswith(_FOREIGN_METADATA)]:
        del properties[key]


def _narrow(graph: Any, node: Any, named: NamedUse, names: _Names) -> None:
    """Make 4-bit tensors of what torch holds in 8 bits: the zero point, and codes or the type of the codes."""
    import onnx_ir as ir

    use = named.use
    dtype = ir.DataType[use.dtype.upper()]

    def initializer(kind: str, tensor: torch.Tensor) -> Any:
        found = next((v for v in graph.initializers.values() if v.name == f"{named.name}.{kind}"), None)
        if found is not None and found.dtype == dtype:
            return found
        name = names.free(f"{named.name}.{kind}") if found is None else names.free(f"{named.name}.{kind}.{use.dtype}")
        array = tensor.cpu().numpy().astype(dtype.numpy())
        value = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(dtype),
            const_value=ir.Tensor(array, dtype=dtype, name=name),
        )
        graph.register_initializer(value)
        return value

    node.replace_input_with(2, initializer("zero_point", use.zero_point))
    if use.codes is not None:
        node.replace_input_with(0, initializer("codes", use.codes))
    elif node.op_type == "QuantizeLinear":
        node.outputs[0].type = ir.TensorType(dtype)
