"""What is compared: each variant takes a float model and returns one that trains with fake-quant.

A variant that is not installed raises ``ImportError`` when it is prepared; the imports are therefore in the functions.
All of them are int8 with their own defaults, calibrated on the same batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to train.

    Attributes:
        model: what to call.
        quantizers: how many places quantize; a weight counts as one.
    """

    model: nn.Module
    quantizers: int


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: as printed.
        prepare: turns a float model into a quantized one. May change its argument.
        install: what to pass to pip if it is missing.
        moving_scales: what follows the data during a training step.
    """

    name: str
    prepare: Callable[[nn.Module, Tensor], Prepared]
    moving_scales: str
    install: str | None = None


def unchanged(model: nn.Module, x: Tensor) -> Prepared:
    """The float model."""
    return Prepared(model.train(), 0)


def ours_calibrated(model: nn.Module, x: Tensor) -> Region:
    """Insert with defaults and calibrate; the region is left in state ``off``."""
    region = insert(model, (x,))
    with region.state("observe"), torch.no_grad():
        model.eval()
        model(x)
    region.compute_scales()
    model.train()
    return region


def ours_off(model: nn.Module, x: Tensor) -> Prepared:
    """Inserted and calibrated, but off."""
    ours_calibrated(model, x)
    return Prepared(model, 0)


def ours(model: nn.Module, x: Tensor) -> Prepared:
    """As trained by default: activation scales fixed, weight scales follow the weights."""
    return _quantizing(model, x)


def ours_fixed(model: nn.Module, x: Tensor) -> Prepared:
    """No scale moves."""
    region = ours_calibrated(model, x)
    region.set_state("quantize", updates=())
    return Prepared(model, len(region.fake_quants))


def ours_ema(model: nn.Module, x: Tensor) -> Prepared:
    """Activation scales follow the batches, too."""
    region = ours_calibrated(model, x)
    region.set_state("quantize", updates=("weight", "activation"))
    return Prepared(model, len(region.fake_quants))


def ours_learned(model: nn.Module, x: Tensor) -> Prepared:
    """All scales are trained."""
    return _quantizing(model, x, learned=True)


def float_compiled(model: nn.Module, x: Tensor) -> Prepared:
    """The float model under ``torch.compile``."""
    model.train().compile()
    return Prepared(model, 0)


def ours_compiled(model: nn.Module, x: Tensor) -> Prepared:
    """As trained by default, with ``compile: true``."""
    return _quantizing(model, x, compiled=True)


def ours_learned_compiled(model: nn.Module, x: Tensor) -> Prepared:
    """The same with learned scales."""
    return _quantizing(model, x, learned=True, compiled=True)


def _quantizing(model: nn.Module, x: Tensor, learned: bool = False, compiled: bool = False) -> Prepared:
    region = ours_calibrated(model, x)
    if learned:
        region.learn_scales()
    region.set_state("quantize")
    if compiled:
        region.set_compile()
    return Prepared(model, len(region.fake_quants))


def torch_ao_fx(model: nn.Module, x: Tensor) -> Prepared:
    """``prepare_qat_fx`` with the default mapping for x86: observers run in every step."""
    from torch.ao.quantization import FakeQuantizeBase, get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    prepared = prepare_qat_fx(model.train(), get_default_qat_qconfig_mapping("x86"), (x,))
    return Prepared(prepared, _count(prepared, FakeQuantizeBase))


def torch_ao_fx_fixed(model: nn.Module, x: Tensor) -> Prepared:
    """The same after ``disable_observer``, as in the last epochs of training."""
    from torch.ao.quantization import disable_observer

    prepared = torch_ao_fx(model, x)
    prepared.model(x)
    prepared.model.apply(disable_observer)
    return prepared


def torchao_pt2e(model: nn.Module, x: Tensor) -> Prepared:
    """``prepare_qat_pt2e`` with the quantizer for x86 and Inductor, run without compiling."""
    from torchao.quantization.pt2e import FakeQuantizeBase, move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    prepared = prepare_qat_pt2e(torch.export.export(model.train(), (x,)).module(), quantizer)
    move_exported_model_to_train(prepared)
    return Prepared(prepared, _count(prepared, FakeQuantizeBase))


def nncf(model: nn.Module, x: Tensor) -> Prepared:
    """``nncf.quantize``, then training of what it returns."""
    import nncf
    from nncf.torch.quantization.layers import BaseQuantizer

    quantized = nncf.quantize(model.eval(), nncf.Dataset([x]), subset_size=1)
    return Prepared(quantized.train(), _count(quantized, BaseQuantizer))


def brevitas(model: nn.Module, x: Tensor) -> Prepared:
    """``brevitas.graph.quantize``; BatchNorm is kept, so that the step does the same work as the others'."""
    from brevitas.graph.quantize import preprocess_for_quantize, quantize

    return _brevitas_calibrated(quantize(preprocess_for_quantize(model, merge_bn=False)), x)


def brevitas_layerwise(model: nn.Module, x: Tensor) -> Prepared:
    """``brevitas.graph.layerwise_quantize``: inputs and weights of layers only."""
    from brevitas.graph.quantize import layerwise_quantize

    return _brevitas_calibrated(layerwise_quantize(model), x)


def _brevitas_calibrated(model: nn.Module, x: Tensor) -> Prepared:
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.proxy.quant_proxy import QuantProxyFromInjector

    with torch.no_grad(), calibration_mode(model.eval()):
        model(x)
    model.train()
    model(x)  # scales become parameters, and get gradients, at the first calls
    proxies = (m for m in model.modules() if isinstance(m, QuantProxyFromInjector))
    return Prepared(model, sum(bool(proxy.is_quant_enabled) for proxy in proxies))


def modelopt(model: nn.Module, x: Tensor) -> Prepared:
    """``mtq.quantize`` with its int8 default: inputs and weights of layers only, no scale moves."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import TensorQuantizer

    quantized = mtq.quantize(model.eval(), mtq.INT8_DEFAULT_CFG, lambda m: m(x)).train()
    return Prepared(quantized, sum(isinstance(m, TensorQuantizer) and m.is_enabled for m in quantized.modules()))


def _count(model: nn.Module, kind: type[Any]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


FLOAT = Variant("float", unchanged, "-")
VARIANTS = (
    FLOAT,
    Variant("lightning_qat, off", ours_off, "-"),
    Variant("lightning_qat", ours, "weights"),
    Variant("lightning_qat, all scales fixed", ours_fixed, "none"),
    Variant("lightning_qat, EMA", ours_ema, "all"),
    Variant("lightning_qat, learned", ours_learned, "all"),
    Variant("float, compiled", float_compiled, "-"),
    Variant("lightning_qat, compiled", ours_compiled, "weights"),
    Variant("lightning_qat, learned, compiled", ours_learned_compiled, "all"),
    Variant("torch.ao FX", torch_ao_fx, "all"),
    Variant("torch.ao FX, observers off", torch_ao_fx_fixed, "none"),
    Variant("torchao pt2e", torchao_pt2e, "all", "torchao"),
    Variant("NNCF", nncf, "learned", "nncf"),
    Variant("Brevitas", brevitas, "weights; learned activations", "brevitas"),
    Variant("Brevitas, layerwise", brevitas_layerwise, "weights; learned activations", "brevitas"),
    Variant("ModelOpt", modelopt, "none", "nvidia-modelopt requests huggingface_hub"),
)
