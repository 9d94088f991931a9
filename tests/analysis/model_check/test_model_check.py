"""The model check finds each flaw, and only that one (A2-A13); clean models have none; the cost is linear."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
import yaml
from torch import nn

from lightning_qat.analysis.comparison.comparison import compare
from lightning_qat.analysis.diagnosis.diagnosis import diagnose
from lightning_qat.analysis.model_check.finding import Finding
from lightning_qat.analysis.model_check.long_loops import LONG_LOOP
from lightning_qat.analysis.model_check.model_check import check
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region
from tests.analysis.model_check import flawed_models as flawed
from tests.analysis.model_check.flaw_cases import CASES, NARROW, Case, Expected, ramp
from tests.quantization.models import ZOO, calibrated
from tests.zoo.models import ZOO as MODELS
from tests.zoo.models import inputs


def _as_expected(finding: Finding, expected: Expected) -> Expected:
    """The finding as a row; names are compared only where the table has them."""
    return finding.severity, finding.kind, finding.requirement, finding.names if expected[3] else ()


@pytest.mark.parametrize("name", CASES)
def test_each_flaw_gives_exactly_its_finding(name: str) -> None:
    """A2-A13 and the further checks: each flaw once, and nothing else."""
    case = CASES[name]
    found = case.check().findings
    shown = [(f.severity, f.kind, f.requirement, f.names, f.what) for f in found]
    assert len(found) == len(case.expected), shown
    assert tuple(map(_as_expected, found, case.expected)) == case.expected, shown


@pytest.mark.parametrize("name", CASES)
def test_every_finding_says_what_why_and_what_to_do(name: str) -> None:
    """One sentence each."""
    for finding in CASES[name].check().findings:
        for text in (finding.what, finding.why, finding.action):
            assert text.endswith("."), text
            assert "  " not in text, text
            assert text == text.strip(), text
        assert finding.names or finding.location


REMOVED_BY_YAML = {
    "A10 int16 output of a GEMM",
    "A11 int8 output of a GEMM",
    "A11 int8 output behind a tanh",
    "A12 excluded",
    "A12 float weight",
    "A13 int8 under all int16",
    "clipping scale",
    "divisor that int8 makes zero",
    "divisor that int16 makes zero",
    "logarithm of what int8 makes zero",
    "root of what int8 makes zero",
    "profile violation",
    "one-sided",
    "lost channels",
    "tied weight",
}


@pytest.mark.parametrize("name", sorted(REMOVED_BY_YAML))
def test_pasted_yaml_is_accepted_and_removes_the_finding(name: str) -> None:
    """What a finding says to paste goes behind the overrides that are there."""
    for finding in CASES[name].check().findings:
        pasted = yaml.safe_load(finding.yaml)
        assert set(pasted) == {"overrides"}
        again = CASES[name].check(tuple(pasted["overrides"])).findings
        assert (finding.severity, finding.kind) not in [(f.severity, f.kind) for f in again]


def test_all_findings_with_yaml_are_pasted_by_a_test() -> None:
    """A5 is left out: int16 narrows the loss, and calls that share a scale stay apart."""
    with_yaml = {name for name, case in CASES.items() if any(f.yaml for f in case.check().findings)}
    assert with_yaml - REMOVED_BY_YAML == {"A5 ranges apart"}
    case = CASES["A5 ranges apart"]
    (pasted,) = (yaml.safe_load(f.yaml)["overrides"] for f in case.check().findings if f.yaml)
    assert {p.dtype for n, p in case.region(tuple(pasted)).points.items() if n in {o["match"] for o in pasted}} == {
        "int16"
    }


@pytest.mark.parametrize(
    ("width", "prepare"),
    [
        ("2 bits", lambda region: region.learn_scales({"weight"})),
        ("2 bits", lambda region: region.learn_scales({"activation", "weight"})),
        ("2 bits", lambda region: region.freeze(["0", "2"])),
        ("3 bits", lambda region: None),
        ("3 bits", lambda region: region.learn_scales({"activation", "weight"})),
        ("4 bits", lambda region: region.learn_scales({"activation"})),
    ],
)
def test_what_won_at_its_width_gets_no_advice_about_learned_scales(
    width: str, prepare: Callable[[Region], object]
) -> None:
    """As measured in tests/benchmarks/accuracy.md: 2-bit weights learn both kinds, and above 3 bits either is fine."""
    case = Case(flawed.mlp, (), options={"qconfig": NARROW[width]}, prepare=prepare)
    assert not [finding for finding in case.check().findings if "learned" in finding.kind]


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_what_is_printed_for_a_zero_divisor_makes_the_gradients_finite(learned: bool) -> None:
    """The kind: ``log(x / y)`` with a ``y`` that is at least 1e-5 in float, and 0 at int8.

    In float all gradients are finite. Learned scales get NaN even where a clamp keeps it from the weights.
    """
    case = CASES["logarithm of what int8 makes zero"]
    (yaml_text,) = (f.yaml for f in case.check().findings if f.kind == "zero divisor")
    bad = []
    for rules in ((), tuple(yaml.safe_load(yaml_text)["overrides"])):
        region = case.region(rules)
        if learned:
            region.learn_scales({"activation"})
        region.target(*case.batches()).square().mean().backward()
        bad.append(
            [n for n, p in region.target.named_parameters() if p.grad is not None and bool(p.grad.isnan().any())]
        )
    assert bad[1] == []
    assert bad[0]


# -- clean models, several regions, cost

REVIEWED = {
    "attention_weights": [
        ("warning", "low-precision output", "the averaged attention weights leave the region, as they are asked for")
    ],
    "unet": [("warning", "low-precision output", "the features leave behind an activation, at int8 by default")],
}
"""Findings above info on models without a flaw, each with the reason why it is right."""


@pytest.mark.parametrize("name", ZOO)
def test_clean_models_have_nothing_above_info(name: str) -> None:
    module, args = ZOO[name].make()
    found = [(f.severity, f.kind) for f in check(calibrated(module, *args)).at_least("warning")]
    assert found == [row[:2] for row in REVIEWED.get(name, [])]


REVIEWED_ZOO = {
    "ViT": [
        ("warning", "varying code", "images of two sizes were traced, and position embeddings are resized for one"),
        ("warning", "not calibrated", "and calibration saw the other size only"),
    ],
    "DETR": [("warning", "low-precision output", "boxes leave behind a sigmoid, hidden states behind a norm")],
    "Deformable-DETR": [
        ("warning", "low-precision output", "hidden states leave behind a norm"),
        ("warning", "zero divisor", "inverse_sigmoid clamps at 1e-5: log(0), whose gradient is NaN"),
    ],
    "T5": [("warning", "low-precision output", "the encoder's hidden state leaves behind a norm")],
}
"""The same for models that nobody here wrote."""


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if not model.full])
def test_models_nobody_here_wrote_have_nothing_above_info(name: str) -> None:
    pytest.importorskip("transformers", reason="transformers needs Python 3.11 or newer")
    zoo_model = MODELS[name]
    module = zoo_model.make()
    region = zoo_model.insert(module, observer="minmax")
    calibrate(
        region, [((), inputs(batch)) if zoo_model.own_loss else batch["inputs"] for batch in zoo_model.batches(1, 2)]
    )
    found = [(f.severity, f.kind) for f in check(region).at_least("warning")]
    assert found == [row[:2] for row in REVIEWED_ZOO.get(name, [])]


def test_several_regions_are_told_apart() -> None:
    first, second = (insert(flawed.mlp(nn.Tanh()), (ramp(2, 4),)) for _ in range(2))
    result = check({"backbone": first, "head": second})
    assert [f.region for f in result.findings] == ["backbone", "head"]
    assert {s.region for s in result.sections} == {"backbone", "head"}


def test_extra_findings_are_sorted_in() -> None:
    extra = Finding("error", "EMA before QAT", (), "a.", "b.", "c.")
    result = check(insert(flawed.mlp(nn.Tanh()), (ramp(2, 4),)), extra_findings=[extra])
    assert [f.severity for f in result.findings] == ["error", "warning"]
    assert result.counts == {"error": 1, "warning": 1, "info": 0}


class _Counted:
    """Counts Python calls made inside a block."""

    def __enter__(self) -> _Counted:
        self.calls = 0
        self._before = sys.getprofile()
        sys.setprofile(self._count)
        return self

    def _count(self, frame: object, event: str, argument: object) -> None:
        self.calls += event == "call"

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before)


def test_cost_is_linear_in_the_number_of_ops() -> None:
    """Twice the ops, about twice the calls of Python functions (counted, not timed)."""
    from tests.benchmarks.models import Chain

    counts = []
    for ops in (1000, 2000):
        region = insert(Chain(ops), (torch.randn(2, Chain.WIDTH),))
        with _Counted() as counted:
            check(region)
        counts.append(counted.calls)
    assert counts[1] < 2.2 * counts[0]


@pytest.mark.parametrize("rounds", [LONG_LOOP - 1, LONG_LOOP])
def test_loop_with_many_rounds_is_named(rounds: int) -> None:
    """A3: post-processing in forward gives a quantizer per round and op; cameras and heads are fewer."""
    region = insert(flawed.BoxLoop(rounds), (ramp(rounds, 4),))
    found = [f for f in check(region).findings if f.kind == "long loop"]
    if rounds < LONG_LOOP:
        assert not found
        return
    (finding,) = found
    assert finding.severity == "warning"
    assert finding.location.rpartition(":")[0].endswith("flawed_models.py")
    assert f"runs {rounds} times per forward" in finding.what
    assert finding.names == tuple(f"{kind}_{i}" for kind in ("mul", "tanh") for i in range(rounds))


def test_rule_that_an_older_one_beats_is_raised_for_its_points_alone() -> None:
    """A13: what is printed changes the points of the finding, and no others."""
    rules = [{"match": "0", "activation": {"dtype": "int16"}}, {"match": "*", "activation": {"dtype": "int8"}}]
    model = nn.Sequential(nn.Tanh(), nn.Sigmoid(), nn.Linear(4, 2))
    region = insert(model, (torch.ones(2, 4),), overrides=rules)
    (finding,) = (f for f in check(region).findings if f.kind == "configuration not applied")
    printed = yaml.safe_load(finding.yaml)["overrides"]
    region.remove()
    dtypes = {n: p.dtype for n, p in insert(model, (torch.ones(2, 4),), overrides=[*rules, *printed]).points.items()}
    assert (
        {name for name, dtype in dtypes.items() if dtype == "int16"}
        == set(finding.names)
        == {
            "0.input0",
            "0.output",
        }
    )


def test_what_a_report_prints_about_several_mistakes_can_be_pasted_together() -> None:
    """A12, A13: an input point behind an op that is float by mistake is gone as soon as that mistake is mended."""
    qconfig = {"activation": {"dtype": "int16"}, "weight": {"dtype": "int16"}}
    rules = [
        {"match": "*", "activation": {"dtype": "int8"}, "weight": {"dtype": "int8"}},
        {"match": "1.output", "activation": {"dtype": "float32"}},
    ]
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    region = insert(model, (torch.ones(2, 4),), qconfig=qconfig, overrides=rules)
    findings = check(region).findings
    (lowered,) = (f for f in findings if f.kind == "configuration not applied")
    assert "2.input0" in lowered.names
    printed = [rule for f in findings if f.severity != "info" for rule in yaml.safe_load(f.yaml)["overrides"]]
    region.remove()
    mended = insert(model, (torch.ones(2, 4),), qconfig=qconfig, overrides=[*rules, *printed])
    assert not [f for f in check(mended).findings if f.kind in ("configuration not applied", "float op")]
    assert {point.dtype for point in mended.points.values()} == {"int16"}
    batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    calibrate(mended, [batch])
    assert "config not applied" not in {row.verdict for row in diagnose(compare(mended, [batch])).rows}


def test_overrides_of_several_regions_name_their_target() -> None:
    """Both targets have a ``1.output``: what is printed about one is about that one alone."""
    models = {name: nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()) for name in ("backbone", "head")}
    regions = {name: insert(model, (torch.ones(2, 4),)) for name, model in models.items()}
    matches = [yaml.safe_load(f.yaml)["overrides"][0]["match"] for f in check(regions).findings]
    assert matches == ["backbone.1.output", "head.1.output"]
