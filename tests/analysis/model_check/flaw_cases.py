"""Each flaw that the model check knows, with exactly the findings it has to give."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.analysis.model_check.model_check import check
from lightning_qat.analysis.model_check.model_check_result import ModelCheckResult
from lightning_qat.quantization.planning.hardware_profile_files import hardware_profile
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region
from tests.analysis.model_check import flawed_models as flawed

Expected = tuple[str, str, str, tuple[str, ...]]
"""Severity, kind, requirement and names of a finding."""


def ramp(*shape: int) -> Tensor:
    """Values from -1 to 1."""
    return torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)


NARROW = {
    f"{width} bits": {"activation": {"observer": "minmax"}, "weight": {"dtype": f"int{width}"}} for width in (2, 3, 4)
}
"""Defaults of a region whose weights are narrow."""
_SPREAD: Expected = ("info", "channel spread", "", ())
_WITHOUT_ONNX: Expected = ("info", "type without ONNX", "", ("0.weight", "2.weight"))


@dataclass(frozen=True)
class Case:
    """A model with a flaw, and exactly what has to be found."""

    build: Callable[[], nn.Module]
    expected: tuple[Expected, ...]
    batches: Callable[[], list[Any]] = field(default=lambda: [ramp(16, 4)])
    options: dict[str, Any] = field(default_factory=dict)
    checked_with: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Region], None] = lambda region: None
    calibration: Callable[[], list[Any]] | None = None

    def region(self, overrides: tuple[Any, ...] = ()) -> Region:
        torch.manual_seed(0)
        module, batches = self.build(), self.batches()
        options = {"qconfig": {"activation": {"observer": "minmax"}}, **self.options}
        options["overrides"] = [*options.get("overrides", ()), *overrides]
        region = insert(module, batches=batches, **options)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*was not seen while tracing")
            calibrate(region, self.calibration() if self.calibration is not None else batches)
        self.prepare(region)
        return region

    def check(self, overrides: tuple[Any, ...] = ()) -> ModelCheckResult:
        return check(self.region(overrides), **self.checked_with)


def _camera_batches() -> list[Any]:
    names = (("front", "left"), ("left", "right"), ("front", "right", "left"))
    return [({name: ramp(1, 2, 3, 3) for name in chosen},) for chosen in names]


def _switch_off(region: Region) -> None:
    region.points["1.output"].enabled = False


def _learn(region: Region) -> None:
    region.learn_scales({"weight"})


def _break_scale(region: Region) -> None:
    region.points["1.output"].scale.fill_(0.0)


def _lower(region: Region) -> None:
    region.points["1.output"].change_dtype("int4")


INT16 = {"activation": {"dtype": "int16", "observer": "minmax"}}
OPTIMIZER = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)

CASES: dict[str, Case] = {
    "A2 another consumer": Case(
        flawed.TwoReaders,
        (("info", "unfused", "A2", ("conv", "relu_0")),),
        batches=lambda: [ramp(4, 1, 3, 3)],
        options={"qconfig": {"activation": {"observer": "minmax", "scheme": "affine"}}},
    ),
    "A2 switched off": Case(
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)),
        (("info", "unfused", "A2", ("0", "1")),),
        options={
            "profile": {
                "name": "plain",
                "ops": [
                    {
                        "kinds": ["linear", "relu"],
                        "signatures": [{"input": "int8", "weight": "int8", "output": ["int8", "float32"]}],
                    }
                ],
                "fusions": [],
            },
            "overrides": [{"match": "1.output", "activation": {"fixed_scale": 0.01}}],
        },
    ),
    "A2 A3 varying cameras": Case(
        flawed.VaryingCameras,
        (
            ("warning", "unfused", "A2", ()),
            (
                "warning",
                "varying code",
                "A3",
                ("input_proj.front", "input_proj.right", "add_4", "tanh_2", "add_5"),
            ),
        ),
        batches=_camera_batches,
    ),
    "A3 not traced": Case(
        flawed.Branch,
        (("warning", "not traced", "A3", ()),),
        batches=lambda: [ramp(4, 4) - 2],
        calibration=lambda: [ramp(4, 4) - 2, ramp(4, 4) + 2],
    ),
    "A4 called eight times": Case(
        lambda: flawed.Decoder(8, 1.0),
        (("info", "called several times", "A4", ("embedding",)),),
    ),
    "A4 hidden": Case(
        flawed.Hidden,
        (("warning", "hidden module", "A4", ("inner",)),),
    ),
    "nothing quantized": Case(
        flawed.Floor,
        (("warning", "nothing quantized", "", ("floor_0",)), ("info", "float op", "A12", ("floor_0",))),
    ),
    "A4 unused": Case(flawed.Unused, (("info", "unused module", "A4", ("spare",)),)),
    "A5 ranges apart": Case(
        lambda: flawed.Decoder(3, 4.0, dynamic=True),
        (
            ("warning", "shared scale", "A5", ("embedding.mul_0.input0", "embedding.mul_0.output")),
            ("info", "shared scale", "A5", ("embedding.sin_0.output", "layers.add_0.output")),
        ),
    ),
    "A6 shared module": Case(flawed.SharedActivation, (("info", "shared module", "A6", ("first.1",)),)),
    "A10 int16 output of a GEMM": Case(
        flawed.mlp,
        (("error", "wide integer output", "A10", ("2",)),),
        options={"overrides": [{"match": "2.output", "activation": {"dtype": "int16"}}]},
    ),
    "A11 int8 output of a GEMM": Case(
        flawed.mlp,
        (("warning", "low-precision output", "A11", ("2",)),),
        options={"overrides": [{"match": "2.output", "activation": {"dtype": "int8"}}]},
    ),
    "A11 int8 output behind a tanh": Case(
        lambda: flawed.mlp(nn.Tanh()), (("warning", "low-precision output", "A11", ("3",)),)
    ),
    "A7 float inside": Case(
        flawed.Recurrent, (("info", "float inside", "A7", ("lstm", "gru")),), batches=lambda: [ramp(3, 2, 4)]
    ),
    "A7 attention in one call": Case(
        flawed.FusedAttention,
        (("info", "float inside", "A7", ("scaled_dot_product_attention_0",)),),
        batches=lambda: [ramp(3, 5, 4)],
    ),
    "A12 no quantized form": Case(flawed.FloatOp, (("warning", "float op", "A12", ("i1e_0",)),)),
    "A12 excluded": Case(
        flawed.mlp,
        (("warning", "float op", "A12", ("1",)),),
        options={
            "overrides": [
                {"match": "0.output", "activation": {"dtype": "float32"}},
                {"match": "1.input0", "activation": {"dtype": "float32"}},
            ]
        },
    ),
    "A12 float weight": Case(
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)),
        (("warning", "float op", "A12", ("2",)),),
        options={"overrides": [{"match": "2.weight", "weight": {"dtype": "float32"}}]},
    ),
    "A13 int8 under all int16": Case(
        flawed.mlp,
        (("warning", "configuration not applied", "A13", ("1.output",)),),
        options={"qconfig": INT16, "overrides": [{"match": "1", "activation": {"dtype": "int8"}}]},
    ),
    "A13 changed afterwards": Case(
        flawed.mlp, (("warning", "configuration not applied", "A13", ("1.output",)),), prepare=_lower
    ),
    "A13 switched off": Case(
        flawed.mlp,
        (
            ("warning", "switched off", "A13", ("1.output",)),
            ("info", "float op", "A12", ("1", "2")),
        ),
        prepare=_switch_off,
    ),
    "profile violation": Case(
        flawed.mlp,
        (("warning", "profile violation", "", ("1",)),),
        checked_with={"profile": hardware_profile("onnxruntime_qdq")},
    ),
    "tiny batch": Case(
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)),
        (("warning", "tiny batch", "", ("1",)),),
        checked_with={"batch_size": 4},
    ),
    "active dropout": Case(flawed.HardDropout, (("warning", "active dropout", "", ("dropout_0",)),)),
    "broken scale": Case(flawed.mlp, (("error", "broken scale", "", ("1.output",)),), prepare=_break_scale),
    "degenerate scale": Case(
        lambda: nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 2)),
        (("warning", "degenerate scale", "", ("0.input0", "0.output", "1.output")),),
        batches=lambda: [torch.zeros(4, 4)],
    ),
    "range beyond int16": Case(
        flawed.mlp,
        (("warning", "range beyond int16", "", ("0.input0", "0.output")),),
        options={"qconfig": INT16},
        batches=lambda: [ramp(4, 4) * 1e5],
    ),
    "clipping scale": Case(
        flawed.mlp,
        (("warning", "clipping scale", "", ("0.input0",)),),
        options={"overrides": [{"match": "0.input0", "activation": {"fixed_scale": 0.2 / 127}}]},
    ),
    "divisor that int8 makes zero": Case(
        lambda: flawed.Divided(),
        (
            ("warning", "zero divisor", "", ("div_0.input1",)),
            ("info", "one-sided range", "", ("div_0.input1",)),
        ),
        batches=lambda: [(ramp(4, 4), torch.linspace(0.01, 4, 16).reshape(4, 4))],
    ),
    "divisor that int16 makes zero": Case(
        lambda: flawed.Divided(),
        (
            ("warning", "zero divisor", "", ("div_0.input1",)),
            ("info", "one-sided range", "", ("div_0.input1", "div_0.output")),
        ),
        options={"qconfig": INT16},
        batches=lambda: [(ramp(4, 4) / 10, -torch.linspace(1e-5, 1, 16).reshape(4, 4))],
    ),
    "logarithm of what int8 makes zero": Case(
        lambda: flawed.InverseSigmoid(),
        (
            ("warning", "zero divisor", "", ("clamp_1.output", "clamp_2.output", "div_0.output")),
            (
                "info",
                "one-sided range",
                "",
                ("sigmoid_0.output", "clamp_0.output", "clamp_1.output", "rsub_0.output", "clamp_2.output"),
            ),
        ),
    ),
    "root of what int8 makes zero": Case(
        flawed.Deviation,
        (
            ("warning", "zero divisor", "", ("add_0.output",)),
            ("info", "one-sided range", "", ("var_0.input0", "var_0.output", "add_0.output", "sqrt_0.output")),
        ),
        batches=lambda: [ramp(8, 4) * torch.tensor([[0.0], [1], [1], [1], [1], [1], [1], [20]])],
    ),
    "float16 overflow": Case(
        flawed.mlp,
        (("error", "float16 overflow", "", ("0.input0", "0.output")),),
        batches=lambda: [ramp(4, 4) * 1e5],
        checked_with={"precision": "16-mixed"},
    ),
    "int16 under bf16": Case(
        flawed.mlp,
        (("warning", "precision below dtype", "", ("1.output",)),),
        options={"overrides": [{"match": "1.output", "activation": {"dtype": "int16"}}]},
        checked_with={"precision": "bf16-mixed"},
    ),
    "one-sided": Case(flawed.mlp, (("info", "one-sided range", "", ("0.input0",)),), batches=lambda: [ramp(4, 4) + 2]),
    "dead channel": Case(lambda: flawed.scaled_channel(0.0), (("info", "dead channels", "", ("0.weight",)),)),
    "channel spread": Case(lambda: flawed.scaled_channel(1e3), (("info", "channel spread", "", ("0.weight",)),)),
    "lost channels": Case(
        lambda: flawed.scaled_channel(1e3),
        (("warning", "lost channels", "", ("0.weight",)),),
        options={"overrides": [{"match": "0.weight", "weight": {"granularity": "per_tensor"}}]},
    ),
    "types that ONNX lacks": Case(
        flawed.mlp,
        (("info", "type without ONNX", "", ("1.output",)),),
        options={"overrides": [{"match": "1.output", "activation": {"dtype": "int12"}}]},
    ),
    "float64": Case(
        lambda: flawed.mlp().double(),
        (("info", "float64", "", ("0.weight", "0.bias", "2.weight", "2.bias")),),
        batches=lambda: [ramp(16, 4).double()],
    ),
    "not reached by calibration": Case(
        flawed.Branch,
        (
            ("warning", "varying code", "A3", ("tanh_0",)),
            ("warning", "not calibrated", "", ("tanh_0.output",)),
        ),
        batches=lambda: [ramp(4, 4) - 2, ramp(4, 4) + 2],
        calibration=lambda: [ramp(4, 4) - 2],
        options={"qconfig": {"activation": {"observer": "minmax", "scheme": "affine"}}},
    ),
    "tied weight": Case(
        flawed.Tied,
        (
            ("warning", "configuration not applied", "A13", ("embedding.weight",)),
            ("warning", "tied weight", "", ("embedding.weight", "linear_0.weight")),
        ),
        batches=lambda: [torch.arange(6)],
        options={"overrides": [{"match": "embedding.weight", "weight": {"dtype": "int4"}}]},
    ),
    "scale not trained": Case(
        flawed.mlp,
        (("warning", "scale not trained", "", ("0.weight", "2.weight")),),
        prepare=_learn,
        checked_with={"optimizers": [OPTIMIZER]},
    ),
    "2-bit weights": Case(
        flawed.mlp,
        (("info", "scales not learned", "", ("0.weight", "2.weight")), _SPREAD, _WITHOUT_ONNX),
        options={"qconfig": NARROW["2 bits"]},
    ),
    "2-bit weights, learned activations": Case(
        flawed.mlp,
        (("warning", "activation scales learned alone", "", ("0.weight", "2.weight")), _SPREAD, _WITHOUT_ONNX),
        options={"qconfig": NARROW["2 bits"]},
        prepare=lambda region: region.learn_scales({"activation"}),
    ),
    "3-bit weights, learned activations": Case(
        flawed.mlp,
        (("warning", "activation scales learned alone", "", ("0.weight", "2.weight")), _WITHOUT_ONNX),
        options={"qconfig": NARROW["3 bits"]},
        prepare=lambda region: region.learn_scales({"activation"}),
    ),
}
