"""What ``accuracy.py`` compares: each variant takes a trained float model and returns one that is ready to train."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lightning_qat as lq
from lightning_qat.quantization.config_values import ObserverChoice, SchemeChoice
from lightning_qat.quantization.planning.plan import ScaleRole


@dataclass(frozen=True)
class Width:
    """Bits of weights and activations."""

    weight: int
    activation: int

    @property
    def dtypes(self) -> tuple[Any, Any]:
        """The types of weights and activations."""
        return f"int{self.weight}", f"int{self.activation}"

    def __str__(self) -> str:
        return f"W{self.weight}A{self.activation}"


@dataclass(frozen=True)
class Prepared:
    """A calibrated model, and the parameter groups of its optimizer."""

    model: nn.Module
    groups: list[dict[str, Any]]


Prepare = Callable[[nn.Module, Sequence[Tensor], Width, float], Prepared]


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: as printed.
        prepare: turns a float model, calibration batches, a width and a learning rate into a calibrated model.
        widths: those that it is measured at. NNCF offers no other for PyTorch.
    """

    name: str
    prepare: Prepare
    widths: tuple[Width, ...] = ()

    def can_do(self, width: Width) -> bool:
        """Whether it is measured at a width."""
        return not self.widths or width in self.widths


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": [p for p in model.parameters() if p.requires_grad]}]


def unchanged(model: nn.Module, batches: Sequence[Tensor], width: Width, lr: float) -> Prepared:
    """The float model, trained on."""
    return Prepared(model, _groups(model))


def ours(
    learned: Sequence[ScaleRole] = (), scheme: SchemeChoice = "auto", observer: ObserverChoice = "auto"
) -> Prepare:
    """Ours, with the settings that are the defaults unless they are given.

    Args:
        learned: whose scales training learns, in the same optimizer with the same learning rate.
        scheme: of the activations.
        observer: of the weights.
    """

    def prepare(model: nn.Module, batches: Sequence[Tensor], width: Width, lr: float) -> Prepared:
        config = lq.QConfig(
            activation=lq.ActivationConfig(dtype=width.dtypes[1], scheme=scheme),
            weight=lq.WeightConfig(dtype=width.dtypes[0], observer=observer),
        )
        region = lq.insert(model.eval(), (batches[0],), qconfig=config)
        region.learn_scales(learned)
        lq.calibrate(region, batches)
        region.set_state("quantize", updates=() if "weight" in learned else ("weight",))
        return Prepared(model, lq.parameter_groups(model, lr, scale_lr_factor=1))

    return prepare


def modelopt(model: nn.Module, batches: Sequence[Tensor], width: Width, lr: float) -> Prepared:
    """``INT8_DEFAULT_CFG`` with other numbers of bits."""
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    for rule in config["quant_cfg"]:
        bits = {"*weight_quantizer": width.weight, "*input_quantizer": width.activation}.get(rule["quantizer_name"])
        if bits is not None:
            rule["cfg"]["num_bits"] = bits
    model = mtq.quantize(model.eval(), config, lambda m: [m(batch) for batch in batches])
    return Prepared(model, _groups(model))


def nncf(model: nn.Module, batches: Sequence[Tensor], width: Width, lr: float) -> Prepared:
    """``nncf.quantize`` with other numbers of bits."""
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters

    advanced = AdvancedQuantizationParameters(
        activations_quantization_params=QuantizationParameters(num_bits=width.activation),
        weights_quantization_params=QuantizationParameters(num_bits=width.weight),
    )
    model = nncf.quantize(model.eval(), nncf.Dataset(batches), subset_size=len(batches), advanced_parameters=advanced)
    return Prepared(model, _groups(model))


def brevitas(model: nn.Module, batches: Sequence[Tensor], width: Width, lr: float) -> Prepared:
    """``brevitas.graph.quantize``, weights per channel; BatchNorm is kept."""
    import brevitas.nn as qnn
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import preprocess_for_quantize, quantize
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

    signed = Int8ActPerTensorFloat.let(bit_width=width.activation)
    unsigned = Uint8ActPerTensorFloat.let(bit_width=width.activation)
    layer = {
        "weight_quant": Int8WeightPerChannelFloat.let(bit_width=width.weight),
        "bias_quant": None,
        "return_quant_tensor": True,
    }
    model = quantize(
        preprocess_for_quantize(model.eval(), merge_bn=False),
        quant_identity_map={
            "signed": (qnn.QuantIdentity, {"act_quant": signed, "return_quant_tensor": True}),
            "unsigned": (qnn.QuantIdentity, {"act_quant": unsigned, "return_quant_tensor": True}),
        },
        compute_layer_map={nn.Conv2d: (qnn.QuantConv2d, layer), nn.Linear: (qnn.QuantLinear, layer)},
        quant_act_map={nn.ReLU: (qnn.QuantReLU, {"act_quant": unsigned, "return_quant_tensor": True})},
    )
    with torch.no_grad(), calibration_mode(model.eval()):
        for batch in batches:
            model(batch)
    return Prepared(model, _groups(model))


WIDTHS = (Width(8, 8), Width(4, 8), Width(4, 4), Width(3, 3), Width(2, 4))
NARROW = WIDTHS[2:]
"""Where the defaults are not symmetric with min-max weights."""
FLOAT = Variant("float, trained on", unchanged, WIDTHS[:1])
VARIANTS = (
    Variant("ours, default", ours()),
    Variant("ours, symmetric with min-max weights", ours(scheme="symmetric", observer="minmax"), NARROW),
    Variant("ours, learned activation scales", ours(["activation"])),
    Variant("ours, learned scales", ours(["activation", "weight"])),
    Variant("Brevitas", brevitas),
    Variant("ModelOpt", modelopt),
    Variant("NNCF", nncf, (Width(8, 8),)),
)
