"""Errors of all points at several types: from one sketch, the same as from one sketch per type; and what they predict.

The predictions are compared with measurements of whole models that are planned, calibrated and run as users do it.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional import spearman_corrcoef

from lightning_qat.analysis.mixed_precision.measure_errors import measure_errors
from lightning_qat.analysis.mixed_precision.model_hashes import hash_of_tensors
from lightning_qat.analysis.mixed_precision.precision_errors import PrecisionErrors
from lightning_qat.analysis.sensitivity.sensitivity import sensitivity
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region
from lightning_qat.reporting.files import write_json
from tests.harness.damage import damaged_values, read_or_refused
from tests.harness.state import assert_same
from tests.quantization.models import ResNet, ViT, Wired


def region_at(model: nn.Module, batches: list[Tensor], dtype: str = "int8", **options: Any) -> Region:
    """A calibrated region; the model is copied."""
    qconfig = {"activation": {"dtype": dtype, "observer": "minmax"}, "weight": {"dtype": dtype}}
    region = insert(copy.deepcopy(model).eval(), (batches[0],), **{"qconfig": qconfig, **options})
    calibrate(region, batches)
    region.set_state("quantize")
    return region


def uneven(*sizes: int, seed: int = 0) -> tuple[nn.Sequential, list[Tensor]]:
    """A chain of linear layers in which some channels are much larger than the others: types matter."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for one, other in itertools.pairwise(sizes):
        layer = nn.Linear(one, other)
        layer.weight.data = torch.randn(other, one, generator=generator) / one**0.5
        layer.bias.data = torch.randn(other, generator=generator) / 4
        layer.weight.data[0] *= 1 + 30 * torch.rand((), generator=generator)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]), [torch.randn(64, sizes[0], generator=generator) for _ in range(2)]


def mse_with(
    model: nn.Module, batches: list[Tensor], overrides: Iterable[dict[str, Any]], dtype: str = "int8", **options: Any
) -> float:
    """The output error of the model as a user gets it with these overrides."""
    region = region_at(model, batches, dtype, overrides=list(overrides), **options)
    with torch.no_grad():
        quantized = torch.cat([region.target(x) for x in batches])
        region.set_state("off")
        reference = torch.cat([region.target(x) for x in batches])
    return float((quantized - reference).double().square().mean())


@pytest.mark.parametrize(("make", "channels"), [(ResNet, 1), (ViT, 3)])
def test_one_sketch_gives_what_a_sketch_at_each_type_gives(make: Callable[[], nn.Module], channels: int) -> None:
    """F: from one calibration at int8. The sketches of `sensitivity` run on models inserted at int8 and at int16."""
    torch.manual_seed(0)
    model, batches = make().eval(), [torch.randn(4, channels, 16, 16) for _ in range(2)]
    errors = measure_errors(region_at(model, batches), batches, seed=3, confirm=0)
    for dtype in ("int8", "int16"):
        region = region_at(model, batches, dtype)
        table = sensitivity(region, batches, method="sketch", confirm=0, seed=3)
        expected = {row.point: row.score**2 for row in table.rows}
        found = {p: own[dtype].mse for p, own in errors.by_point.items()}
        assert found.keys() == expected.keys()
        for point, mse in found.items():
            assert mse == pytest.approx(expected[point], rel=1e-4, abs=1e-15), (point, dtype)


@pytest.mark.parametrize("seed", [0, 1])
def test_predicted_errors_of_subsets_rank_as_the_measured_ones(seed: int) -> None:
    """40 random subsets, each planned, calibrated and run on its own: Spearman at least 0.95."""
    model, batches = uneven(16, 32, 32, 32, 8, seed=seed)
    errors = measure_errors(region_at(model, batches), batches)
    drawn, names = random.Random(seed), list(errors.by_point)
    predicted, measured = [], []
    for _ in range(40):
        choice = errors.choose(points=drawn.sample(names, drawn.randint(1, len(names) - 1)))
        predicted.append(choice.predicted)
        measured.append(mse_with(model, batches, choice.overrides))
    correlation = spearman_corrcoef(torch.tensor(predicted).log(), torch.tensor(measured).log())
    assert correlation >= 0.95
    ratios = [abs(math.log(p / m)) for p, m in zip(predicted, measured, strict=True)]
    assert sum(ratios) / len(ratios) < 0.2


@pytest.mark.parametrize("sizes", [(8, 16, 4), (8, 16, 16, 4), (6, 12, 12, 12, 4)])
def test_choice_is_within_one_point_of_the_best_of_all_subsets(sizes: tuple[int, ...]) -> None:
    """D6: the best subset is found by measuring all of them (at most 2**10 forwards of small models)."""
    model, batches = uneven(*sizes)
    region = region_at(model, batches)
    errors = measure_errors(region, batches)
    names = list(errors.by_point)
    quantized = {
        dtype: {n: copy.deepcopy(f) for n, f in region_at(model, batches, dtype).points.items()}
        for dtype in ("int8", "int16")
    }
    with region.state("off"), torch.no_grad():
        reference = [region.target(x) for x in batches]

    def measured(raised: set[str]) -> float:
        for name, fake_quant in region.points.items():
            other = quantized["int16" if name in raised else "int8"][name]
            fake_quant.set_dtype(other.dtype)
            fake_quant.scale.copy_(other.scale)
        with torch.no_grad():
            outputs = [region.target(x) for x in batches]
        return float(sum((a - b).double().square().sum() for a, b in zip(outputs, reference, strict=True)))

    whole = measured(set())
    subsets = [set(c) for k in range(len(names) + 1) for c in itertools.combinations(names, k)]
    table = [(len(subset), measured(subset)) for subset in subsets]
    for target in (0.5, 0.2, 0.05):
        best = min(count for count, error in table if error <= target * whole)
        bound = errors.choose(points=names[:1]).narrowest * target
        choice = errors.choose(max_error=bound)
        count = len(choice.rows) + (measured(set(choice.raised)) > target * whole)  # one more if it just misses
        assert count <= best + 1, (target, best, choice.raised)


class Recurrent(nn.Module):
    """A cell that is unrolled: each of its weights is used at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 8)
        for row in x[:, 0].unbind(1):
            state = self.cell(row, state)
        return self.head(state)  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [ResNet, Recurrent])
def test_raising_every_point_is_asking_for_the_wide_type_at_once(make: Callable[[], nn.Module]) -> None:
    """AIMET #4108: bit for bit. Weights that several calls share are raised in all of them."""
    torch.manual_seed(0)
    model, batches = make().eval(), [torch.randn(4, 1, 16, 16) for _ in range(2)]
    errors = measure_errors(region_at(model, batches), batches)
    choice = errors.choose(share="100%")
    raised = region_at(model, batches, overrides=choice.overrides)
    at_once = region_at(model, batches, "int16")
    assert {n: f.dtype for n, f in raised.points.items()} == {n: f.dtype for n, f in at_once.points.items()}
    with torch.no_grad():
        for x in batches:
            assert torch.equal(raised.target(x), at_once.target(x))


def test_nothing_of_the_region_is_changed() -> None:
    model, batches = uneven(8, 16, 4)
    region = region_at(model, batches)
    before = copy.deepcopy(region.target.state_dict())
    random_state = torch.get_rng_state()
    modes = [m.training for m in region.target.modules()]
    measure_errors(region, batches, dtypes=("int4", "int8", "int16"))
    assert_same(region.target.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert modes == [m.training for m in region.target.modules()]
    assert region.current_state == "quantize"


def test_points_without_a_gradient_are_measured() -> None:
    """A point that acts only through `round`: a sketch sees nothing, a forward does."""

    def function(module: Any, x: Tensor) -> Tensor:
        return module.last(torch.cat([module.first(x) * 8, module.first(x).mul(8).round()], 1))

    torch.manual_seed(0)
    model = Wired(function, first=nn.Linear(4, 4), last=nn.Linear(8, 4))
    batches = [torch.randn(64, 4)]
    errors = measure_errors(region_at(model, batches, "int4"), batches, dtypes=("int4", "int8"))
    measured = {row.point for row in errors.rows if row.exact}
    assert measured
    assert all(row.standard_error == 0.0 for row in errors.rows if row.exact)


def test_prediction_is_checked_against_all_points_together() -> None:
    model, batches = uneven(16, 32, 32, 8)
    errors = measure_errors(region_at(model, batches), batches)
    for check in errors.checks:
        assert check.measured == pytest.approx(mse_with(model, batches, (), check.dtype), rel=1e-4)
        assert check.predicted == pytest.approx(check.measured, rel=0.3)
    assert errors.power == pytest.approx(
        float(torch.cat([model(x) for x in batches]).detach().square().mean()), rel=1e-5
    )


def test_a_collapsed_output_is_said_to_be_out_of_range() -> None:
    model, batches = uneven(16, 32, 32, 32, 32, 8, seed=1)
    errors = measure_errors(region_at(model, batches, "int2"), batches, dtypes=("int2", "int16"))
    assert "At int2 the output has collapsed" in errors.note
    choice = errors.choose(share=0.01)
    assert not choice.in_range
    assert "larger than the output itself" in choice.note


class Difference(nn.Module):
    """The difference of two layers, and a third."""

    def __init__(self, same: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(16, 16) for _ in range(3))
        if same:
            self.second.load_state_dict(self.first.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) - self.second(x) + 0.2 * self.third(x)


@pytest.mark.parametrize("same", [True, False])
def test_errors_that_cancel_are_said_not_to_add_up(same: bool) -> None:
    """Two equal layers make equal errors, which their difference does not have. Of two other layers nothing is said."""
    model, batches = Difference(same), [torch.randn(32, 16, generator=torch.Generator().manual_seed(1))]
    errors = measure_errors(region_at(model, batches), batches)
    narrowest = errors.checks[0]
    assert max(narrowest.predicted, narrowest.measured) < errors.power  # it has not collapsed
    assert (narrowest.predicted > 2 * narrowest.measured) is same
    assert errors.adds_up is not same
    assert ("At int8 errors do not add up" in errors.note) is same


def test_types_that_an_override_fixes_stay() -> None:
    model, batches = uneven(8, 16, 4)
    fixed = [{"match": "0.weight", "weight": {"dtype": "int6"}}]
    errors = measure_errors(region_at(model, batches, overrides=fixed), batches)
    assert list(errors.by_point["0.weight"]) == ["int6"]
    assert "0.weight" not in errors.choose(share="100%").raised
    with pytest.raises(ConfigurationError, match=r"'0\.weight' has no wider type here"):
        errors.choose(points=["0.weight"])


def test_a_type_of_another_scheme_is_measured_as_it_is() -> None:
    """By default int4 is affine and int8 symmetric: from a region at int8, and back, as from one at int4."""
    model, batches = uneven(8, 16, 16, 4)
    region = region_at(model, batches)
    before = {name: (point.dtype, point.scheme) for name, point in region.points.items()}
    errors = measure_errors(region, batches, dtypes=("int4", "int8"))
    for dtype in ("int4", "int8"):
        check = next(check for check in errors.checks if check.dtype == dtype)
        assert check.measured == pytest.approx(mse_with(model, batches, (), dtype), rel=1e-4)
    assert {name: (point.dtype, point.scheme) for name, point in region.points.items()} == before
    assert {scheme for _, scheme in before.values()} == {"symmetric"}
    assert any(point.scheme == "affine" for point in region_at(model, batches, "int4").points.values())


def test_thresholds_follow_the_type() -> None:
    """A threshold is a fixed scale that depends on the type: 100/127 at int8 and 100/32768 at int16."""
    model, batches = uneven(8, 16, 4)
    rule = [{"match": "0.input0", "activation": {"threshold": 8.0}}]
    errors = measure_errors(region_at(model, batches, overrides=rule), batches)
    own = errors.by_point["0.input0"]
    assert own["int8"].mse / own["int16"].mse == pytest.approx(256.0**2, rel=0.3)


def test_hashes_tell_what_the_errors_belong_to() -> None:
    model, batches = uneven(8, 16, 4)
    first = measure_errors(region_at(model, batches), batches)
    assert first.hashes == measure_errors(region_at(model, batches), batches).hashes
    assert first.hashes["weights"] == hash_of_tensors(model.parameters())
    model[0].weight.data[0, 0] += 1  # type: ignore[index, operator]
    other = measure_errors(region_at(model, batches), [batches[0]])
    assert {name: first.hashes[name] == other.hashes[name] for name in first.hashes} == {
        "plan": True,
        "weights": False,
        "data": False,
    }


def test_a_file_answers_without_data_or_model(tmp_path: Path) -> None:
    model, batches = uneven(8, 16, 4)
    region = region_at(model, batches)
    errors = measure_errors(region, batches)
    path = write_json(errors, tmp_path / "errors.json")
    loaded = PrecisionErrors.load(path, region)
    assert loaded == errors
    for rule in ({"share": 0.5}, {"budget": 1.4, "cost": "bops"}, {"max_error": errors.choose(top=1).predicted}):
        assert loaded.choose(**rule) == errors.choose(**rule)  # type: ignore[arg-type]
    assert loaded.front().rows == errors.front().rows


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    model, batches = uneven(8, 16, 4)
    path = write_json(measure_errors(region_at(model, batches), batches), tmp_path / "errors.json")
    model[0].weight.data.mul_(2)  # type: ignore[operator, union-attr]
    with pytest.raises(ConfigurationError, match="another model: weights of this one differ"):
        PrecisionErrors.load(path, region_at(model, batches))
    with pytest.raises(ConfigurationError, match="plan and weights of this one differ"):
        PrecisionErrors.load(path, region_at(uneven(8, 16, 16, 4)[0], batches))


def test_a_damaged_file_is_one_error(tmp_path: Path) -> None:
    """Every value replaced by one of another kind, every key dropped: it reads, or ends in one sentence."""
    model, batches = uneven(8, 16, 4)
    path = write_json(measure_errors(region_at(model, batches), batches), tmp_path / "errors.json")
    refused = 0
    for what, damaged in damaged_values(json.loads(path.read_text())):
        if "huge" in what or what == "nested":  # json cannot write them; test_damaged_files.py does
            continue
        path.write_text(json.dumps(damaged))
        found = read_or_refused(lambda: PrecisionErrors.load(path), what)
        refused += isinstance(found, ConfigurationError)
        if isinstance(found, PrecisionErrors):
            read_or_refused(found.front, what)
    assert refused > 100


def test_errors_are_measured_from_a_checkpoint_too() -> None:
    """Checkpoints keep no statistics of weights: they are taken again from the weights."""
    model, batches = uneven(8, 16, 4)
    region = region_at(model, batches)
    state = copy.deepcopy(region.target.state_dict())
    expected = measure_errors(region, batches)
    other = region_at(model, [x * 0.5 for x in batches])
    other.target.load_state_dict(state)
    found = measure_errors(other, batches)
    for point, own in expected.by_point.items():
        assert found.by_point[point].keys() == own.keys()
        assert found.by_point[point]["int8"].mse == pytest.approx(own["int8"].mse, rel=1e-6)
        assert found.by_point[point]["int16"].mse == pytest.approx(own["int16"].mse, rel=0.1)  # wider bins


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        (("int8",), "at least two types"),
        ("int8", "at least two types"),
        (("int8", "int12x"), "unknown dtype 'int12x'"),
        (("int8", "float32"), "float32 is not a quantized type"),
    ],
)
def test_types_that_make_no_sense_are_one_error(dtypes: Any, message: str) -> None:
    model, batches = uneven(8, 16, 4)
    with pytest.raises(ConfigurationError, match=message):
        measure_errors(region_at(model, batches), batches, dtypes=dtypes)


def test_what_cannot_be_measured_is_one_error() -> None:
    model, batches = uneven(8, 16, 4)
    with pytest.raises(ConfigurationError, match="calibrate the region"):
        measure_errors(insert(copy.deepcopy(model), (batches[0],)), batches)
    with pytest.raises(ConfigurationError, match="no batch"):
        measure_errors(region_at(model, batches), [])
    with pytest.raises(ConfigurationError, match="holds no finite number on these batches"):
        measure_errors(region_at(model, batches), [batches[0][:0]])
    everything = [{"match": "*", "activation": {"dtype": "int8"}, "weight": {"dtype": "int8"}}]
    with pytest.raises(ConfigurationError, match="nothing to raise"):
        measure_errors(region_at(model, batches, overrides=everything), batches)
