"""Freezing parts of regions: a sub-tree stays at its quantized state while the rest trains.

Typical use: train the backbone under quantization first, freeze it, then train the heads on what it will compute when
deployed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from lightning_qat.quantization.errors import ConfigurationError, near_names
from lightning_qat.quantization.fake_quant.fake_quantize import FakeQuantize
from lightning_qat.quantization.modules.module_walk import REGION_NAME
from lightning_qat.quantization.overrides import glob_covers
from lightning_qat.quantization.planning.plan import PointPlan, QuantPlan
from lightning_qat.quantization.planning.target_paths import local_patterns
from lightning_qat.quantization.tracing.op_graph import OpGraph

_CALL_NUMBER = re.compile(r"@\d+")


@dataclass(frozen=True)
class Freezable:
    """The parts of a region that freezing needs.

    Args:
        target: the module whose forward is quantized.
        graph: its ops.
        plan: where its fake-quants are.
        points: the fake-quants by point.
    """

    target: nn.Module
    graph: OpGraph
    plan: QuantPlan
    points: Mapping[str, FakeQuantize]


def patterns_by_target(regions: Mapping[str, Freezable], patterns: str | Iterable[str]) -> dict[str, list[str]]:
    """Return the patterns that apply to each target, relative to that target.

    Args:
        regions: the regions by the path of their target.
        patterns: relative to each target, or beginning with the path of one (``backbone.*``).

    Raises:
        ConfigurationError: a pattern matches nothing.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    local: dict[str, list[str]] = {path: [] for path in regions}
    for pattern in patterns:
        found = local_patterns(pattern, regions, lambda path, rest: bool(_selected(regions[path], [rest])))
        if not any(_selected(regions[path], [rest]) for path, rest in found.items()):
            raise _unmatched(pattern, regions)
        for path, rest in found.items():
            local[path].append(rest)
    return local


@dataclass(frozen=True)
class Selection:
    """Names of the modules, parameters and points of a region that some patterns select."""

    modules: frozenset[str]
    parameters: frozenset[str]
    points: frozenset[str]

    def __bool__(self) -> bool:
        return bool(self.modules or self.parameters or self.points)


class Freezing:
    """The frozen parts of a region and their state before. They are kept by name, as parameters may be replaced."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.patterns: tuple[str, ...] = ()
        self._target_training = True
        self._training: dict[str, bool] = {}
        self._requires_grad: dict[str, bool] = {}
        self._learning: set[str] = set()  # points whose learned scale had a gradient
        self._modules: tuple[nn.Module, ...] = ()
        self._points: dict[str, FakeQuantize] = {}

    def __bool__(self) -> bool:
        return bool(self.patterns)

    def add(self, region: Freezable, patterns: Iterable[str]) -> None:
        """Freeze what the patterns select, in addition to what is frozen already."""
        if not self.patterns:
            self._target_training = region.target.training
        self.patterns = tuple(dict.fromkeys((*self.patterns, *patterns)))
        self.apply(region)

    def apply(self, region: Freezable) -> None:
        """Freeze everything the patterns select now. Call it again after the plan or its fake-quants were replaced."""
        selection = _selected(region, self.patterns)
        modules, parameters = _modules(region.target), _parameters(region.target)
        for name in selection.modules:
            self._training.setdefault(name, modules[name].training)
        self._modules = tuple(modules[name] for name in sorted(self._training) if name in modules)
        for name in selection.parameters:
            self._requires_grad.setdefault(name, parameters[name].requires_grad)
            parameters[name].requires_grad_(False)
            parameters[name].grad = None  # optimizers skip it then: no weight decay, no momentum
        points = region.points
        self._points = {name: points[name] for name in selection.points}
        self.hold()

    def hold(self) -> None:
        """Freeze again after other changes: ``train()`` on a module above, or scales that became parameters."""
        for module in self._modules:
            if module.training:
                module.training = False
        for name, fake_quant in self._points.items():
            if not fake_quant.frozen:  # this runs before every forward, and assigning to a module is slow
                fake_quant.frozen = True
            if fake_quant.learned and fake_quant.scale.requires_grad:
                self._learning.add(name)
                fake_quant.scale.requires_grad_(False)
                fake_quant.scale.grad = None

    @property
    def is_held(self) -> bool:
        """Whether :meth:`hold` would change nothing."""
        return not any(module.training for module in self._modules) and all(f.frozen for f in self._points.values())

    def release_modes(self, target: nn.Module) -> None:
        """Restore the modes until the next forward: Lightning warns of modules in eval mode when training starts."""
        modules = _modules(target)
        for name, training in self._training.items():
            modules[name].training = training

    def undo(self, target: nn.Module) -> None:
        """Put everything back as it was before."""
        modules, parameters = _modules(target), _parameters(target)
        now = self._training.get("", target.training)
        for name, training in self._training.items():
            if name in modules:
                modules[name].training = now if training == self._target_training else training
        for name, flag in self._requires_grad.items():
            if name in parameters:
                parameters[name].requires_grad_(flag)
        for name, fake_quant in self._points.items():
            fake_quant.frozen = False
            if fake_quant.learned and name in self._learning:
                fake_quant.scale.requires_grad_(True)
        self._reset()


def _selected(region: Freezable, patterns: Iterable[str]) -> Selection:
    """A pattern that names a module means its whole sub-tree, and ``backbone.*`` means the same as ``backbone``.

    The scale of a weight belongs to its parameters, wherever they are used: it is frozen if they are.
    """
    covering = [pattern.removesuffix(".*") for pattern in patterns]

    def covered(name: str) -> bool:
        return any(glob_covers(pattern, name) for pattern in covering)

    modules = {name: m for name, m in _modules(region.target).items() if covered(name)}
    held = {id(p) for m in modules.values() for p in m._parameters.values() if p is not None}
    parameters = {name: p for name, p in _parameters(region.target).items() if id(p) in held or covered(name)}
    frozen_ids = {id(p) for p in parameters.values()}
    everywhere = region.target.named_parameters(remove_duplicate=False)
    names_of_frozen = {name for name, p in everywhere if id(p) in frozen_ids}
    identities = {id(m) for m in modules.values()}
    scopes = {name for name, m in region.target.named_modules() if id(m) in identities}

    def is_frozen(point: PointPlan, graph: OpGraph) -> bool:
        op = graph.by_name[point.op]
        sources = [source for o in op.operands if o.index == point.operand for source in o.sources]
        if sources and all(source.kind == "parameter" for source in sources):
            stay = all(source.name in names_of_frozen for source in sources)
            if stay or point.is_weight:
                return stay
        return covered(_CALL_NUMBER.sub("", point.name)) or _CALL_NUMBER.sub("", op.scope) in scopes

    points = {p.name for p in region.plan.points if is_frozen(p, region.graph)}
    return Selection(frozenset(modules), frozenset(parameters), frozenset(points))


def _modules(target: nn.Module) -> dict[str, nn.Module]:
    """Every registration of every submodule, without the region itself."""
    named = target.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if name.partition(".")[0] != REGION_NAME}


def _parameters(target: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in target.named_parameters() if name.partition(".")[0] != REGION_NAME}


def _unmatched(pattern: str, regions: Mapping[str, Freezable]) -> ConfigurationError:
    names = {
        f"{path}.{name}" if path else name
        for path, region in regions.items()
        for name in (*_modules(region.target), *_parameters(region.target), *region.points)
        if name
    }
    inside = {name.removeprefix(f"{path}.") for path in regions for name in names}
    near = near_names(pattern.removesuffix(".*"), sorted(names | inside))
    hint = f" Near names: {', '.join(near)}." if near else ""
    return ConfigurationError(
        f"freeze: {pattern!r} matches no module, parameter or point of the quantized region.{hint} Write a path such "
        "as backbone.*, where only * and ? are special."
    )
