"""Choosing an output of the region (B1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch

from lightning_qat.analysis.outputs import OutputSelector
from lightning_qat.quantization.errors import ConfigurationError


@dataclass
class Heads:
    boxes: Any
    scores: Any


class Pair(NamedTuple):
    left: Any
    right: Any


ONE, TWO, THREE = torch.ones(1), torch.full((1,), 2.0), torch.full((1,), 3.0)
NESTED = {"map": {"layer_3": ONE, "layer.4": TWO}, "heads": [Heads(ONE, Pair(TWO, THREE))], 5: THREE}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("map.layer_3", [1]),
        ("map.layer.4", [2]),
        ("map", [1, 2]),
        ("heads.0.scores", [2, 3]),
        ("heads.0.scores.right", [3]),
        ("heads.0.scores.0", [2]),
        ("5", [3]),
        (None, [1, 2, 1, 2, 3, 3]),
    ],
)
def test_path_picks_a_tensor_or_a_branch(path: str | None, expected: list[float]) -> None:
    """B1."""
    assert [t.item() for t in OutputSelector(path)(NESTED)] == expected


def test_unknown_path_lists_the_paths_there_are() -> None:
    """B1."""
    with pytest.raises(
        ConfigurationError,
        match=r"no output 'map.layer_2'. Did you mean 'map.layer_3'.*Outputs: map.layer_3, map.layer.4",
    ):
        OutputSelector("map.layer_2")(NESTED)
    with pytest.raises(ConfigurationError, match="single tensor: leave `output` out"):
        OutputSelector("logits")(ONE)


def test_callable_and_post_processing_are_applied() -> None:
    """B1: float post-processing such as sigmoid."""
    select = OutputSelector(lambda output: output["map"]["layer_3"] * 0, torch.sigmoid)
    assert select(NESTED)[0].item() == 0.5
    assert "sigmoid" in select.description
    with pytest.raises(ConfigurationError, match="holds no tensor, but int"):
        OutputSelector(post_process=lambda output: 3)(ONE)


def test_indices_count_only_if_nothing_else_is_chosen() -> None:
    """B1."""
    output = {"scores": ONE, "indices": torch.tensor([7])}
    assert OutputSelector()(output) == [ONE]
    assert OutputSelector("indices")(output)[0].item() == 7
