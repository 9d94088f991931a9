"""Reading hardware profiles: the shipped ones, the documented example, and what is wrong with others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_qat
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.planning.hardware_profile import nearest_dtype
from lightning_qat.quantization.planning.hardware_profile_files import hardware_profile, parse_profile, shipped_profiles
from lightning_qat.quantization.planning.profile_violations import find_violations
from tests.quantization.models import calibrated
from tests.quantization.planning.profiles import NARROW, shipped

README = Path(lightning_qat.__file__).parent / "profiles" / "README.md"
IMAGE = torch.linspace(-1, 1, 2 * 4 * 36).reshape(2, 4, 6, 6)


def example_of_the_readme(directory: Path) -> Path:
    (text,) = re.findall(r"```yaml\n(.*?)```", README.read_text(), flags=re.DOTALL)
    path = directory / "my_npu.yaml"
    path.write_text(text)
    return path


def test_example_of_the_readme_is_used(tmp_path: Path) -> None:
    path = example_of_the_readme(tmp_path)
    model = nn.Sequential(
        nn.Conv2d(4, 4, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Softmax(-1), nn.Linear(36, 2)
    )
    region = calibrated(model, IMAGE, profile=path)
    assert {p.name: p.dtype for p in region.plan.points} == {
        "0.input0": "int8", "0.weight": "int8", "1.output": "int8", "4.output": "int16", "5.input0": "int8",
        "5.weight": "int8",
    }  # fmt: skip
    assert region.plan.profile is not None
    assert (region.plan.profile["name"], region.plan.profile["version"]) == ("my_npu", "2")
    assert find_violations(region.plan, region.graph, path) == ()
    assert torch.isfinite(model(IMAGE)).all()


def test_every_shipped_file_says_where_it_is_from() -> None:
    assert len(shipped_profiles()) == 3
    for name in shipped_profiles():
        profile = shipped(name)
        assert profile.name == name
        assert all((profile.version, profile.description, profile.source))
        assert f"[`{name}`]({name}.yaml)" in README.read_text()


def test_digest_is_that_of_what_a_profile_allows() -> None:
    other = parse_profile({**NARROW, "name": "other", "description": "the same"}, "other")
    assert other.digest == parse_profile(NARROW, "narrow").digest
    assert other.digest != parse_profile({**NARROW, "fusions": []}, "narrow").digest


def test_star_is_the_rule_of_all_other_kinds() -> None:
    data = {**NARROW, "ops": [*NARROW["ops"], {"kinds": "*", "signatures": [{"input": "int4", "output": "int4"}]}]}
    rules = parse_profile(data, "narrow").rules
    assert rules["gelu"].outputs() == ("int4",)
    assert rules["softmax"].outputs() == ("int16",)
    assert "tanh" not in rules


def changed(**changes: Any) -> dict[str, Any]:
    return {**NARROW, **changes}


SIGNATURE = {"input": "int8", "output": "int8"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "p.yaml must be a mapping"),
        ({"ops": []}, "p.yaml: 'name' is missing"),
        (changed(op=[]), "unknown key in p.yaml: 'op': did you mean 'ops'"),
        (changed(ops={}), "p.yaml: ops must be a list"),
        (changed(ops=[{"kinds": ["conv2"], "signatures": [SIGNATURE]}]),
         r"ops\[0\].kinds: unknown op kind or group 'conv2'. Did you mean 'conv2d'"),
        (changed(ops=[{"kinds": [["conv2d"], {}], "signatures": [SIGNATURE]}]), r"or group \['conv2d'\]. Did you mean"),
        (changed(ops=[{"kinds": ["conv2d"], "signatures": [{**SIGNATURE, "input": "int18"}]}]),
         r"ops\[0\].signatures\[0\].input: unknown dtype 'int18': did you mean"),
        (changed(ops=[{"kinds": ["conv2d"], "signatures": [{**SIGNATURE, "inputs": "int8"}]}]), "did you mean 'input'"),
        (changed(ops=[{"kinds": ["conv2d"], "signatures": [{"input": "int8"}]}]), "'output' is missing"),
        (changed(ops=[{"kinds": ["conv2d"], "signatures": []}]), "signatures is empty"),
        (changed(ops=[{"kinds": ["conv2d"], "signatures": [{**SIGNATURE, "output": []}]}]), "at least one dtype"),
        (changed(ops=[{"kinds": ["conv2d", "conv"], "signatures": [SIGNATURE]}]), "'conv2d' already has a rule"),
        (changed(ops=[{"kinds": "*", "signatures": [SIGNATURE]}] * 2), r"'\*' already has a rule"),
        (changed(ops=[{"kinds": ["conv2d"], "signatures": [SIGNATURE], "schemes": ["symetric"]}]), "mean 'symmetric"),
        (changed(ops=[{"kinds": ["conv2d"], "signatures": [SIGNATURE], "schemes": []}]), "schemes is empty"),
        (changed(groups={"conv": ["conv2d"]}), "'conv' is already the name of a group or kind"),
        (changed(groups={"mine": ["conv2f"]}), "groups.mine: unknown op kind"),
        (changed(unsupported={"softmax": ""}), "'softmax' has a rule in ops"),
        (changed(unsupported=["tanh"]), "unsupported must be a mapping"),
        (changed(fusions=["conv2d"]), r"fusions\[0\]: write a pattern as 'conv2d \+ batch_norm\? \+ relu\?'"),
        (changed(fusions=["conv2d + rellu"]), "unknown op kind or group 'rellu'. Did you mean 'relu'"),
    ],
)  # fmt: skip
def test_wrong_profile_is_one_clear_error(data: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse_profile(data, "p.yaml")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generic_int8", None, "unknown profile 'generic_int8'. Did you mean 'generic_int8_int16'.*one of: generic"),
        ("missing.yaml", None, "is not a hardware profile: there is no such file; write one as"),
        ("broken.yaml", "name: [", "is not YAML"),
        ("code.yaml", "!!python/object/apply:os.getcwd []", "is not YAML"),
        ("empty.yaml", "", "must be a mapping"),
        ("latin.yaml", "name: caf\u00e9", "byte 9 is no text in UTF-8"),
    ],
)
def test_wrong_file_is_one_clear_error(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content, encoding="latin-1")
    with pytest.raises(ConfigurationError, match=message):
        hardware_profile(path if name.endswith(".yaml") else name)


@pytest.mark.parametrize(
    ("wanted", "options", "nearest"),
    [
        ("int8", ["float32", "int16"], "int16"),
        ("int16", ["int8", "uint16"], "int8"),
        ("int4", ["int16", "int8"], "int8"),
        ("uint8", ["int8", "uint16"], "uint16"),
        ("int16", ["int4", "int8", "float32"], "int8"),
        ("int8", ["float32"], "float32"),
    ],
)
def test_nearest_type(wanted: str, options: list[str], nearest: str) -> None:
    assert nearest_dtype(wanted, options) == nearest
