"""The same pipeline with layers that are called through functions which the module keeps: the ladder copies them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.sabotage.pipelines import MISALIGNED, Pipeline, Sabotage

HIDDEN: dict[str, Pipeline] = {}


class InClosures(Pipeline):
    """Calls the first block through what an attribute keeps."""

    def __init__(self, keep: Callable[[Any], Any], normalized: bool) -> None:
        super().__init__()
        self.normalized = normalized
        self.kept = keep(self)

    def prepared(self, x: Tensor, stage: str) -> Tensor:
        return super().prepared(x, stage) if self.normalized or stage == "validate" else x

    def forward(self, x: Tensor) -> Tensor:
        kept = self.kept["first"] if isinstance(self.kept, dict) else self.kept
        h = F.relu(self.bn2(self.conv2(F.relu(kept(x))))).flatten(1)
        logits: Tensor = self.head(self.dropped(h))
        return logits


def _hooked(net: Pipeline) -> Callable[[Tensor], Tensor]:
    net.conv1.register_forward_hook(lambda module, args, result: net.bn1(result))
    return net.conv1.__call__  # a bound method: a module would be a child once more


class Elsewhere(Pipeline):
    """Finds its layers outside of itself, where no copy can be put in their place."""

    def __init__(self) -> None:
        super().__init__()
        HIDDEN["module"] = self

    def forward(self, x: Tensor) -> Tensor:
        return super(Elsewhere, HIDDEN["module"]).forward(x)


KINDS: dict[str, Callable[[Any], Any]] = {
    "a lambda": lambda net: lambda x: net.bn1(net.conv1(x)),
    "a dict of lambdas": lambda net: {"first": lambda x: net.bn1(net.conv1(x))},
    "a forward hook": _hooked,
    "a compiled function": lambda net: torch.compile(lambda x: net.bn1(net.conv1(x)), backend="eager"),
}
CLOSURES = (
    *(
        Sabotage(
            f"normalization missing in training, with {name}",
            MISALIGNED,
            ("(train), model: mean 0", "normalization missing"),
            lambda keep=keep: InClosures(keep, normalized=False),  # type: ignore[misc]
            quick=name == "a dict of lambdas",
        )
        for name, keep in KINDS.items()
    ),
    *(
        Sabotage(
            f"healthy, with {name}",
            "healthy",
            ("every rung holds",),
            lambda keep=keep: InClosures(keep, normalized=True),  # type: ignore[misc]
        )
        for name, keep in KINDS.items()
    ),
    Sabotage("copies call the original", "cannot tell", ("calls the original module",), Elsewhere),
)
"""Layers in closures: whether the check still judges the copy that it trains."""
