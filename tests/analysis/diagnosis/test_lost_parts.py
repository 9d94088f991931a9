"""A part that quantization destroys is found whatever the tensor's energy, and what is printed keeps it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn

from lightning_qat.analysis.comparison.comparison import compare
from lightning_qat.analysis.diagnosis.diagnosis import diagnose
from lightning_qat.analysis.diagnosis.diagnosis_result import DiagnosisResult
from lightning_qat.analysis.diagnosis.remedy import percent
from lightning_qat.analysis.sensitivity.sensitivity import sensitivity
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region

Make = Callable[[], nn.Module]
Rules = list[dict[str, Any]]


class Head(nn.Module):
    """Boxes in pixels beside scores in 0..1."""

    def __init__(self) -> None:
        super().__init__()
        self.box, self.score = nn.Linear(16, 4), nn.Linear(16, 4)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.box(x).sigmoid() * 640, self.score(x).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.parts(x), -1)


class Levels(Head):
    """Joined twice, the second time along the anchors, and moved."""

    def forward(self, x: Tensor) -> Tensor:
        levels = [torch.cat(self.parts(part), -1) for part in (x, 0.5 * x)]
        return torch.cat(levels, 1).transpose(1, 2)


class Stacked(Head):
    def forward(self, x: Tensor) -> Tensor:
        box, score = self.parts(x)
        return torch.stack([box, score], 1)


class Scaled(Head):
    """No join: one op brings each column to its unit."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("unit", torch.tensor([640.0] * 4 + [1.0] * 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.box(x), self.score(x)], -1).sigmoid() * self.unit


class Written(Head):
    """Assigned into one tensor."""

    def forward(self, x: Tensor) -> Tensor:
        box, score = self.parts(x)
        out = torch.zeros(*x.shape[:-1], 8)
        out[..., :4] = box
        out[..., 4:] = score
        return out * 1.0


class Behind(Head):
    """Joined in the middle of the model."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.parts(x), -1).clamp(0, 640).clamp(max=1000)


class Features(nn.Module):
    """Inputs with units of their own, which the first layer evens out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 16), nn.Linear(16, 2)
        with torch.no_grad():
            self.fc.weight[:, 2:] *= 2000

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(x).relu())


def inserted(make: Make, x: list[Tensor], rules: Rules, profile: str | None = None) -> Region:
    torch.manual_seed(0)
    model = make().eval()
    region = insert(model, (x[0],), overrides=rules, qconfig={"activation": {"observer": "minmax"}}, profile=profile)
    calibrate(region, x)
    return region


def pasted(result: DiagnosisResult) -> Rules:
    return [rule for row in result.culprits if row.yaml for rule in yaml.safe_load(row.yaml)["overrides"]]


def error_of_small(region: Region, x: list[Tensor]) -> float:
    """Error of the values up to 1, relative to their spread, of the quantized model."""
    with torch.no_grad():
        with region.state("quantize"):
            got = torch.cat([region.target(b).flatten() for b in x])
        with region.only(()):
            want = torch.cat([region.target(b).flatten() for b in x])
    small = want.abs() <= 1
    return float((got - want)[small].std() / want[small].std())


TOKENS = [torch.randn(4, 20, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]
INT8_OUTPUT: Rules = [
    {"match": f"{name}.output", "activation": {"dtype": "int8"}}
    for name in ("cat_0", "cat_1", "cat_2", "stack_0", "mul_0", "mul_1", "clamp_0", "clamp_1", "box", "score")
]


def rules_for(make: Make) -> Rules:
    """Those of the rules that are about something the model has."""
    torch.manual_seed(0)
    names = [op.name for op in insert(make().eval(), (TOKENS[0],)).graph.ops]
    return [rule for rule in INT8_OUTPUT if rule["match"].removesuffix(".output") in names]


@pytest.mark.parametrize("profile", [None, "generic_int8_int16"])
@pytest.mark.parametrize("make", [Head, Levels, Stacked, Scaled, Written, Behind])
def test_scores_that_vanish_beside_boxes_are_named_and_kept(make: Make, profile: str | None) -> None:
    """Whole-tensor energy hides a destroyed part.

    Siblings: a join, a join of joins, a stack, a multiplication by units, an assignment, a join that other ops follow.
    """
    rules = [rule for rule in rules_for(make) if profile is None or "box" not in rule["match"]]
    region = inserted(make, TOKENS, rules, profile)
    comparison = compare(region, TOKENS)
    before = error_of_small(region, TOKENS)
    assert before > 0.9
    last = comparison.rows[-1]
    assert last.SQNR is not None
    assert last.SQNR > 30  # nothing of it in the energy
    assert comparison.lost_output
    result = diagnose(comparison)
    assert result.culprits
    assert {row.verdict for row in result.culprits} == {"non-uniform"}
    assert any("become zero" in row.evidence for row in result.culprits)
    for row in result.culprits:
        assert row.factor is not None
        assert row.factor >= 4
        assert row.after is not None
        assert f"to {percent(row.after)} (predicted)" in row.action
    assert diagnose(comparison, sensitivity(region, TOKENS)).culprits[0].verdict == "non-uniform"
    after = error_of_small(inserted(make, TOKENS, [*rules, *pasted(result)], profile), TOKENS)
    assert before / after > min(row.factor for row in result.culprits if row.factor is not None)


def test_features_of_small_units_are_named_if_the_model_uses_them() -> None:
    """A sibling: the input itself, and the weights that even it out, whose small columns vanish.

    The same values under small weights do no harm, and are not named.
    """
    x = [torch.randn(256, 4, generator=torch.Generator().manual_seed(1)) * torch.tensor([500.0, 500.0, 0.5, 0.5])]
    region = inserted(Features, x, [])
    result = diagnose(compare(region, x))
    evidence = {row.point: row.evidence for row in result.culprits}
    assert set(evidence) == {"fc.input0", "fc.weight"}
    assert "at indices 2 to 3 of axis 1" in evidence["fc.input0"]
    assert "at indices 0 to 1 of axis 1" in evidence["fc.weight"]
    after = inserted(Features, x, pasted(result))
    assert diagnose(compare(after, x)).culprits == ()
    assert error(after, x) < error(region, x) / 10

    def unused() -> nn.Module:
        model = Features()
        with torch.no_grad():
            model.fc.weight[:, 2:] /= 2000
        return model

    assert diagnose(compare(inserted(unused, x, []), x)).culprits == ()


def error(region: Region, x: list[Tensor]) -> float:
    row = compare(region, x).rows[-1]
    assert row.MSE is not None
    return row.MSE**0.5


class Softmax(nn.Module):
    """Two of twelve classes hardly ever occur."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 12)
        with torch.no_grad():
            self.fc.bias[:2] = -9.0

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).softmax(-1)


class NearlyDead(nn.Module):
    """Two of 32 channels of a feature map hardly do anything."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(16, 32), nn.Linear(32, 4)
        with torch.no_grad():
            self.fc.weight[:2] *= 1e-3
            self.fc.bias[:2] = 1e-3

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.fc(x).relu()
        return features, self.out(features)


class Skip(nn.Module):
    """A join with a part so small that it hardly does anything to what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 4)
        with torch.no_grad():
            for parameter in self.b.parameters():
                parameter *= 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.a(x).relu(), self.b(x).relu()], -1))


class ZeroBranch(nn.Module):
    """A part of a join that is zero so far, as LoRA's branch is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(16, 8), nn.Linear(16, 8, bias=False), nn.Linear(16, 4)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([self.a(x).relu(), self.b(x)], -1))


@pytest.mark.parametrize("make", [Softmax, NearlyDead, Skip, ZeroBranch])
@pytest.mark.parametrize("qconfig", [{}, {"activation": {"scheme": "affine"}}], ids=["symmetric", "affine"])
def test_healthy_models_with_small_parts_have_no_culprit(make: Make, qconfig: dict[str, Any]) -> None:
    torch.manual_seed(0)
    region = insert(make().eval(), (TOKENS[0],), qconfig=qconfig)
    calibrate(region, TOKENS)
    comparison = compare(region, TOKENS)
    assert diagnose(comparison).culprits == ()
    assert diagnose(comparison, sensitivity(region, TOKENS)).culprits == ()


def _on_rank(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    try:
        region = inserted(Head, TOKENS, rules_for(Head))
        comparison = compare(region, [TOKENS[rank]], across_ranks=True)
        found = [[e.point, [vars(p) for p in e.populations]] for e in comparison.evidence]
        Path(directory, f"{rank}.json").write_text(json.dumps([found, comparison.lost_output]))
    finally:
        dist.destroy_process_group()


def test_ranks_find_what_one_process_finds(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_on_rank, (str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    comparison = compare(inserted(Head, TOKENS, rules_for(Head)), TOKENS)
    found, lost_output = first
    assert lost_output
    for e, (point, populations) in zip(comparison.evidence, found, strict=True):
        assert e.point == point
        assert [p["indices"] for p in populations] == [list(p.indices) for p in e.populations]
        assert [p["error"] for p in populations] == pytest.approx([p.error for p in e.populations])
