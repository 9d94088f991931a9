"""Running a region's target in its deployed form: the mode under which it is exported."""

from __future__ import annotations

from collections import Counter
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from lightning_qat.export.deployed_form import DeployedForm, QuantizeUse, use_name
from lightning_qat.export.deployed_ops import CUSTOM_OPS, NO_AXIS, DeployedOps
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.interception.interception import InterceptionMode
from lightning_qat.quantization.interception.op_identity import OpIdentity
from lightning_qat.quantization.modules.tensor_leaves import call_leaves, map_call_leaves
from lightning_qat.quantization.numerics.channel_groups import swap_within_groups
from lightning_qat.quantization.planning.folded_batch_norm import grouped
from lightning_qat.quantization.region.bound_points import BoundPoint, OpQuantizers
from lightning_qat.quantization.region.region import Region
from lightning_qat.quantization.region.region_mode import Operation
from lightning_qat.quantization.region.replaced_forward import InspectingMode, ReplacedForward

CHILD = "deployed"
"""Name of the region's child that holds the codes, scales and biases while the model is exported."""


class DeployedTensors(nn.Module):
    """Codes, scales, zero points and biases as buffers; tensors that are equal are one buffer.

    Args:
        form: the deployed form of the region.
    """

    def __init__(self, form: DeployedForm) -> None:
        super().__init__()
        self.names: dict[str, str] = {}
        """The name in the exported file of each buffer."""
        self._places: dict[tuple[str, str], str] = {}
        self._known: dict[tuple[Any, ...], str] = {}
        for use in form.uses.values():
            self._add(use.name, "scale", use.scale, use.dtype)
            self._add(use.name, "zero_point", use.zero_point, use.dtype)
            if use.codes is not None:
                self._add(use.name, "codes", use.codes, use.dtype)
            if use.factor is not None:
                self._add(use.name, "factor", use.factor, "float32")
        for folding in form.foldings.values():
            self._add(folding.layer, "bias", folding.bias, "float32")

    def of(self, name: str, kind: str) -> Tensor:
        """Return a tensor of a use or of a layer: ``scale``, ``zero_point``, ``codes``, ``factor`` or ``bias``."""
        tensor: Tensor = getattr(self, self._places[name, kind])
        return tensor

    def _add(self, name: str, kind: str, tensor: Tensor, dtype: str) -> None:
        tensor = tensor.detach().contiguous()
        content = tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
        # scales of an activation stay its own: they carry its name. What is worth sharing are the codes.
        key = (kind, dtype, tuple(tensor.shape), content if kind == "codes" else name)
        buffer = self._known.setdefault(key, f"{kind}_{len(self._known)}")
        self._places[name, kind] = buffer
        if buffer not in self.names:
            self.names[buffer] = f"{name}.{kind}"
            self.register_buffer(buffer, tensor)


class DeployedForward(ReplacedForward):
    """Context manager in which a region's target computes its deployed form, in ops that can be exported.

    Args:
        region: the region; it runs in eval mode.
        form: its deployed form.
        prefix: stands in front of the names of the uses: the path of the target and a dot, or nothing.
        ops: how quantizers are computed.
    """

    def __init__(self, region: Region, form: DeployedForm, prefix: str = "", ops: DeployedOps = CUSTOM_OPS) -> None:
        super().__init__(region)
        self.ops = ops
        self.form = form
        self.prefix = prefix
        self.tensors = DeployedTensors(form)

    @override
    def mode(self, identity: OpIdentity) -> InterceptionMode:
        return _DeployedMode(self, identity)

    @override
    def __enter__(self) -> Self:
        self.region.add_module(CHILD, self.tensors)
        return super().__enter__()

    @override
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, value, traceback)
        del self.region._modules[CHILD]


class _DeployedMode(InspectingMode):
    def __init__(self, deployed: DeployedForward, identity: OpIdentity) -> None:
        super().__init__(deployed.region.runner, identity)
        self.deployed = deployed
        self.form = deployed.form
        self._calls: Counter[str] = Counter()

    @override
    def run_op(
        self, quantizers: OpQuantizers, kind: str, func: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if quantizers.inputs:
            if kwargs.get("max_norm") is not None:  # the codes are those of the renormalized weight
                kwargs = {**kwargs, "max_norm": None}
            inputs = quantizers.inputs
            args, kwargs = map_call_leaves(
                args, kwargs, lambda i, tensor: self._deployed(inputs[i], tensor) if i in inputs else tensor
            )
        result = self._run(quantizers.op, func, args, kwargs)
        if quantizers.output is None:
            return result
        if isinstance(result, Tensor):
            return self._deployed(quantizers.output, result)
        if type(result) is tuple and isinstance(result[0], Tensor):
            return (self._deployed(quantizers.output, result[0]), *result[1:])
        return result

    def _run(self, op: str, func: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if op in self.form.folded_norms:
            return call_leaves(args, kwargs)[0]
        if op in self.form.foldings:
            bias = self.deployed.tensors.of(op, "bias")
            if len(args) > 2:
                args = (*args[:2], bias, *args[3:])
            else:
                kwargs = {**kwargs, "bias": bias}
        return func(*args, **kwargs)

    def _deployed(self, point: BoundPoint, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or point.name in self.form.not_calibrated:
            return tensor
        name = use_name(point.name, self._calls[point.name])
        self._calls[point.name] += 1
        use = self.form.uses.get(name)
        if use is None:
            raise ConfigurationError(
                f"{name} runs while the model is exported, but did not run before on the same inputs: the forward "
                "depends on more than its inputs."
            )
        if use.codes is not None:
            return self._weight(use).to(tensor.dtype)
        quantized = self._activation(use, point, tensor.float()).to(tensor.dtype)
        return tensor.copy_(quantized) if point.written else quantized

    def _activation(self, use: QuantizeUse, point: BoundPoint, tensor: Tensor) -> Tensor:
        tensors, fake_quant = self.deployed.tensors, point.fake_quant
        scale, zero_point = tensors.of(use.name, "scale"), tensors.of(use.name, "zero_point")
        codes = (fake_quant.quant_min, fake_quant.quant_max)
        axis = NO_AXIS if use.axis is None else use.axis
        quantized: Tensor = self.deployed.ops.quantize_dequantize(
            tensor, scale, zero_point, *codes, axis, self.deployed.prefix + use.name
        )
        return quantized

    def _weight(self, use: QuantizeUse) -> Tensor:
        tensors = self.deployed.tensors
        parts = [tensors.of(use.name, kind) for kind in ("codes", "scale", "zero_point")]
        axis = NO_AXIS if use.axis is None else use.axis
        weight: Tensor = self.deployed.ops.dequantize(*parts, axis, self.deployed.prefix + use.name)
        if use.groups > 1:
            weight = swap_within_groups(weight, use.groups)
        if use.factor is not None:
            factor = tensors.of(use.name, "factor")
            weight = (grouped(weight, factor) / factor).reshape(weight.shape)
        return weight
