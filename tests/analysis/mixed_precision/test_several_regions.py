"""Errors of a model whose parts are quantized apart, and of outputs of several tensors in very different units.

Predictions are compared with whole models in which points got the types of other, separately planned models.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics.functional import spearman_corrcoef

from lightning_qat.analysis.mixed_precision.measure_choices import measure_choices
from lightning_qat.analysis.mixed_precision.measure_errors import measure_errors
from lightning_qat.analysis.mixed_precision.op_costs import CostName
from lightning_qat.analysis.mixed_precision.precision_errors import PrecisionErrors
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.planning.make_plan import make_plans
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import attach, insert
from lightning_qat.quantization.region.region import Region, find_regions
from lightning_qat.quantization.tracing.tracer import trace
from lightning_qat.reporting.files import write_json
from tests.harness.state import assert_same, state_of

TARGETS = ("backbone", "near", "far")


class TwoHeads(nn.Module):
    """The second head returns numbers a thousand times larger; between the parts there is float arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.near = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
        self.far = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 40))
        self.spare = nn.Linear(12, 2)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 3
            parameter.data[0] *= 8

    def forward(self, x: Tensor, spare: bool = False) -> dict[str, Tensor]:
        features = 0.3 + self.backbone(x)
        if spare:
            self.spare(x)
        return {"near": self.near(features), "far": 1000 * self.far(features)}


def data() -> list[Tensor]:
    return [torch.randn(64, 12, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]


def quantized(
    model: nn.Module, targets: tuple[str, ...] = TARGETS, dtype: str = "int6", overrides: Any = ()
) -> tuple[nn.Module, dict[str, Region]]:
    """A calibrated copy of a model, planned as the callback plans several targets."""
    model, batches = copy.deepcopy(model).eval(), data()
    inputs: dict[str, list[Tensor]] = {path: [] for path in targets}
    handles = [
        model.get_submodule(path).register_forward_hook(lambda m, args, out, path=path: inputs[path].append(args[0]))
        for path in targets
    ]
    with torch.no_grad():
        for x in batches:
            model(x, spare=True)
    for handle in handles:
        handle.remove()
    graphs = {path: trace(model.get_submodule(path), found) for path, found in inputs.items()}
    qconfig = {"activation": {"dtype": dtype, "observer": "minmax"}, "weight": {"dtype": dtype}}
    for path, plan in make_plans(graphs, qconfig, overrides).items():
        region = attach(model.get_submodule(path), graphs[path], plan)
        calibrate(region, inputs[path])
        region.set_state("quantize")
    return model, find_regions(model)


def noise(model: nn.Module, float_model: nn.Module) -> float:
    """Mean over the two outputs of squared error relative to the square: the formula that predictions are about."""
    ratios = []
    with torch.no_grad():
        outputs, wanted = ([one(x) for x in data()] for one in (model, float_model))
    for name in ("near", "far"):
        a, b = (torch.cat([out[name] for out in outs]).double() for outs in (outputs, wanted))
        ratios.append(float((a - b).square().sum() / b.square().sum()))
    return sum(ratios) / 2


@pytest.mark.parametrize(("confirm", "least"), [(None, 0.95), (0, 0.85)])
def test_predicted_errors_of_subsets_rank_as_the_measured_ones(confirm: int | None, least: float) -> None:
    """Spearman over 40 random subsets of the points of all regions, of their effect on both final outputs.

    Sibling: without a measurement at the final outputs, a region weighs its points by its own output.
    """
    float_model = TwoHeads().eval()
    model, regions = quantized(float_model)
    errors = measure_errors(model, data(), dtypes=("int6", "int8"), confirm=confirm)
    wide = quantized(float_model, dtype="int8")[1]
    assert errors.power == 1.0
    assert errors.output == "the outputs of near, far, relative to their mean square"
    assert errors.checks[0].measured == pytest.approx(noise(model, float_model), rel=0.05)  # batches weigh alike there
    drawn, names = random.Random(0), list(errors.together)
    assert {name.split(".")[0] for name in names} == set(TARGETS)
    narrow = copy.deepcopy({path: dict(region.points) for path, region in regions.items()})
    predicted, measured = [], []
    for _ in range(40):
        choice = errors.choose(points=drawn.sample(names, drawn.randint(1, len(names) - 1)))
        for path, region in regions.items():
            for name, point in region.points.items():
                source = wide[path].points if f"{path}.{name}" in choice.raised else narrow[path]
                point.set_dtype(source[name].dtype)
                point.scale.copy_(source[name].scale)
        predicted.append(choice.predicted)
        measured.append(noise(model, float_model))
    assert spearman_corrcoef(torch.tensor(predicted), torch.tensor(measured)) >= least


def test_overrides_of_a_choice_raise_those_points_and_no_others() -> None:
    """Names begin with the path of the region, so a name that two regions have is no trap."""
    errors = measure_errors(quantized(TwoHeads())[0], data(), dtypes=("int6", "int8"))
    choice = errors.choose(points=["far.0.weight", "backbone.1.output"])
    regions = quantized(TwoHeads(), overrides=choice.overrides)[1]
    raised = {
        f"{p}.{n}" for p, region in regions.items() for n, point in region.points.items() if point.dtype == "int8"
    }
    assert raised == set(choice.raised) == {"far.0.weight", "backbone.1.output"}


@pytest.mark.parametrize("cost", ["points", "ops", "bops"])
def test_costs_are_those_of_all_regions(cost: CostName) -> None:
    errors = measure_errors(quantized(TwoHeads())[0], data(), dtypes=("int6", "int8"))
    everything = errors.choose(share="100%", cost=cost).cost
    assert everything == pytest.approx({"points": 1.0, "ops": 1.0, "bops": 64 / 36}[cost])


def test_nothing_of_the_model_is_changed() -> None:
    model, regions = quantized(TwoHeads())
    model.train()
    before = state_of(model)
    measure_errors(model, data(), dtypes=("int6", "int8"))
    assert_same(state_of(model), before)
    assert model.training
    assert all(region.current_state == "quantize" for region in regions.values())


def test_a_named_output_is_the_one_that_counts() -> None:
    """Points of the other head do nothing to it."""
    model, _ = quantized(TwoHeads())
    errors = measure_errors(model, data(), dtypes=("int6", "int8"), output="near")
    gains = {name: own["int6"].mse for name, own in errors.by_point.items()}
    assert max(value for name, value in gains.items() if name.startswith("far")) == 0.0
    assert min(value for name, value in gains.items() if name.startswith("near")) > 0.0
    with pytest.raises(ConfigurationError, match=r"several quantized parts \(backbone, near, far\), so write the path"):
        measure_errors(model, data(), dtypes=("int6", "int8"), output="map")


def test_a_region_that_does_not_run_is_raised_with_all_others() -> None:
    """Nothing is known of its points: they are raised last, and all points raised is the wide type everywhere."""
    targets = (*TARGETS, "spare")
    model, _ = quantized(TwoHeads(), targets)
    errors = measure_errors(model, data(), dtypes=("int6", "int8"))
    assert errors.not_reached == ("spare.linear_0.input0", "spare.linear_0.weight")
    assert {(row.mse, row.standard_error, row.exact) for row in errors.by_point["spare.linear_0.weight"].values()} == {
        (0.0, None, False)
    }
    choice = errors.choose(share="100%")
    assert not set(errors.not_reached) & set(errors.choose(share="50%").raised)
    raised, at_once = (quantized(TwoHeads(), targets, *how)[1] for how in (("int6", choice.overrides), ("int8",)))
    for path, region in raised.items():
        assert {n: p.dtype for n, p in region.points.items()} == {n: p.dtype for n, p in at_once[path].points.items()}
    measured = measure_choices(model, data(), choice, ("int6", "int8"))
    assert measured.rows[0].measured == measured.widest


def test_a_selection_between_regions_leaves_each_its_own_output() -> None:
    """What a quantized first part selects may have another shape: then outputs cannot be compared across parts."""

    class Selecting(TwoHeads):
        def forward(self, x: Tensor, spare: bool = False) -> dict[str, Tensor]:
            features = self.backbone(x)
            return {"near": self.near(features[features[:, 0] > features[:, 0].median() + 1e-3])}

    model, _ = quantized(Selecting(), ("backbone", "near"))
    errors = measure_errors(model, data(), dtypes=("int6", "int8"))
    assert errors.output.startswith("the output of each region")
    assert errors.checks == ()
    assert errors.choose(share="50%").predicted < errors.choose(top=1).predicted


def test_a_small_region_with_a_point_of_zeros_is_measured() -> None:
    """More points are measured at the final outputs than it has; those without a scale have nothing to measure."""

    class Gained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gain = nn.Linear(4, 4), nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layer(x) * self.gain  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = nn.Sequential(Gained(), Gained()).eval(), torch.randn(8, 4)
    regions = [insert(part, (x,)) for part in model]
    for region in regions:
        calibrate(region, [x])
    assert any(point.scale_source is None for region in regions for point in region.points.values())
    errors = measure_errors(model, [x], confirm=100)
    assert all(row.exact for row in errors.rows if row.mse > 0 and row.dtype == "int8")
    assert len(errors.choose(share="100%").rows) == sum(len(region.points) for region in regions)


def test_overrides_that_begin_with_the_path_of_a_target_stay_in_effect() -> None:
    """Siblings: a rule about one of two targets, and the path of the only target."""
    rules = [{"match": "near.0.weight", "weight": {"dtype": "int8"}}]
    for targets in (TARGETS, ("near",)):
        model, _ = quantized(TwoHeads(), targets, overrides=rules)
        errors = measure_errors(model, data(), dtypes=("int6", "int8"))
        name = "near.0.weight" if len(targets) > 1 else "0.weight"
        assert list(errors.by_point[name]) == ["int8"]
        assert name not in errors.together


def test_regions_with_configurations_of_their_own_keep_them() -> None:
    model, batches = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4)).eval(), data()
    fixed = [{"match": "linear_0.weight", "weight": {"dtype": "int8"}}]
    first = insert(model[0], (batches[0],), qconfig={"weight": {"dtype": "int6"}}, overrides=fixed)
    calibrate(first, batches)
    second = insert(model[1], (model[0](batches[0]).detach(),), qconfig={"weight": {"dtype": "int6"}})
    calibrate(second, [model[0](x).detach() for x in batches])
    errors = measure_errors(model, batches, dtypes=("int6", "int8"))
    assert "0.linear_0.weight" not in errors.together
    assert "1.linear_0.weight" in errors.together


def test_several_outputs_of_one_region_count_alike() -> None:
    """The head with small numbers is not lost: errors are relative to each tensor's own mean square."""
    float_model, batches = TwoHeads().eval(), data()
    model = copy.deepcopy(float_model)
    options = {"activation": {"dtype": "int6", "observer": "minmax"}, "weight": {"dtype": "int6"}}
    region = insert(model, (batches[0],), qconfig=options)
    calibrate(region, batches)
    region.set_state("quantize")
    errors = measure_errors(region, batches, dtypes=("int6", "int8"))
    assert errors.power == pytest.approx(1.0)
    assert errors.checks[0].measured == pytest.approx(noise(model, float_model), rel=1e-4)
    mse = {name: own["int6"].mse for name, own in errors.by_point.items()}
    assert mse["near.0.weight"] > 0.1 * mse["far.0.weight"]  # far's squares are a million times larger
    of_far = measure_errors(region, batches, dtypes=("int6", "int8"), output="far")
    assert of_far.power > 1e3  # one tensor stays in its own unit


def test_a_loss_beside_the_output_does_not_count() -> None:
    """Models of transformers return their loss with the logits. Sibling: a loss beside two outputs."""

    class WithLoss(TwoHeads):
        names: tuple[str, ...] = ("near",)

        def forward(self, x: Tensor, spare: bool = False) -> dict[str, Tensor]:
            outputs = super().forward(x)
            return {"loss": outputs["near"].square().mean(), **{name: outputs[name] for name in self.names}}

    for names in (("near",), ("near", "far")):
        model, batches = WithLoss().eval(), data()
        model.names = names
        region = insert(model, (batches[0],), qconfig={"weight": {"dtype": "int6"}})
        calibrate(region, batches)
        whole = measure_errors(region, batches, dtypes=("int6", "int8"))
        chosen = measure_errors(
            region, batches, dtypes=("int6", "int8"), output=lambda out, names=names: [out[name] for name in names]
        )
        expected = {name: own["int6"].mse for name, own in chosen.by_point.items()}
        assert {name: own["int6"].mse for name, own in whole.by_point.items()} == pytest.approx(expected, rel=0.02)


def test_errors_of_regions_are_refused_for_other_weights(tmp_path: Any) -> None:
    model, regions = quantized(TwoHeads())
    path = write_json(measure_errors(model, data(), dtypes=("int6", "int8")), tmp_path / "errors.json")
    assert PrecisionErrors.load(path, regions).power == 1.0
    with torch.no_grad():
        model.far[0].weight += 1  # type: ignore[index, union-attr]
    with pytest.raises(ConfigurationError, match="another model: weights of 'far' of this one differ"):
        PrecisionErrors.load(path, regions)


def test_a_module_without_fake_quants_is_one_error() -> None:
    with pytest.raises(ConfigurationError, match="TwoHeads has no fake-quants"):
        measure_errors(TwoHeads(), data())


def _on_rank(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    model, _ = quantized(TwoHeads())
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    try:
        errors = measure_errors(model, [data()[rank]], dtypes=("int6", "int8"), across_ranks=True)
        write_json(errors, Path(directory, f"{rank}.json"))
    finally:
        dist.destroy_process_group()


def test_ranks_measure_what_one_process_measures(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_on_rank, (str(tmp_path),), nprocs=2)
    first, second = (PrecisionErrors.load(tmp_path / f"{rank}.json") for rank in range(2))
    assert first.rows == second.rows
    alone = measure_errors(quantized(TwoHeads())[0], data(), dtypes=("int6", "int8"))
    assert [row.point for row in first.rows] == [row.point for row in alone.rows]
    assert [row.mse for row in first.rows] == pytest.approx([row.mse for row in alone.rows])
    assert first.checks[0].measured == pytest.approx(alone.checks[0].measured)
