"""Patterns that begin with the path of a target, where a model has several targets.

Names inside a region are relative to its target (``layers.0.conv1.weight``). A pattern may also begin with the path of
one of the targets, written out (``backbone.layers.0.*`` for target ``backbone``): it then applies to that target alone.
If such a pattern matches nothing there, it is read as a relative name. So every point has a unique name, even where
target ``head`` has a submodule called ``backbone``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from lightning_qat.quantization.overrides import Override, yaml_name
from lightning_qat.quantization.tracing.op_graph import Op, OpGraph


def below_target(pattern: str, path: str) -> str | None:
    """Return the part of a pattern after the target's path (``*`` for nothing), or None if it begins differently.

    Example:
        >>> below_target("backbone.layers.*", "backbone"), below_target("backbone", "backbone")
        ('layers.*', '*')
        >>> print(below_target("backbone2.layers", "backbone"))
        None
    """
    if not path:
        return None
    if pattern == path:
        return "*"
    return pattern.removeprefix(f"{path}.") if pattern.startswith(f"{path}.") else None


def local_patterns(pattern: str, paths: Iterable[str], matches: Callable[[str, str], bool]) -> dict[str, str]:
    """Return the pattern to use inside each target that it applies to.

    Args:
        pattern: as the user wrote it.
        paths: paths of all targets.
        matches: whether a relative pattern matches anything in the target of a path.

    Returns:
        Relative patterns by path of the target; targets that the pattern does not apply to are left out.

    Example:
        >>> local_patterns("head.fc", ["backbone", "head"], lambda path, pattern: True)
        {'head': 'fc'}
        >>> local_patterns("fc", ["backbone", "head"], lambda path, pattern: True)
        {'backbone': 'fc', 'head': 'fc'}
    """
    paths = list(paths)
    absolute = {path: rest for path in paths if (rest := below_target(pattern, path)) is not None}
    found = {path: rest for path, rest in absolute.items() if matches(path, rest)}
    if found:
        return found
    relative = dict.fromkeys(paths, pattern)
    if absolute and not any(matches(path, pattern) for path in paths):
        return absolute  # matches nothing either way: the near names of that target help most
    return relative


def with_target_path(overrides: str, path: str) -> str:
    """Put a target's path before every pattern of overrides in YAML, so that they apply to that target alone.

    Example:
        >>> print(with_target_path('- {match: "fc.weight", weight: {dtype: int16}}', "head"))
        - {match: "head.fc.weight", weight: {dtype: int16}}
    """
    quoted = {'"': yaml_name(path)[1:-1], "'": path.replace("'", "''")}
    with_path = re.sub(r"match: ([\"'])", lambda found: f"{found[0]}{quoted[found[1]]}.", overrides)
    return with_path if path else overrides


def local_rules(rules: Iterable[Override], graphs: Mapping[str, OpGraph]) -> dict[str, list[Override]]:
    """Return the rules for each target. Each target gets all rules; rules for another target select nothing there.

    Args:
        rules: as the user wrote them.
        graphs: the traced ops of each target, by its path.
    """
    names = {path: [(n, op.kind) for op in graph.ops for n in possible_points(op)] for path, graph in graphs.items()}
    local: dict[str, list[Override]] = {path: [] for path in graphs}
    for rule in rules:
        found = _patterns_of(rule, names)
        for path, there in local.items():
            there.append(rule if found[path] == rule.match else _LocalRule.of(rule, found[path]))
    return local


def _patterns_of(rule: Override, names: Mapping[str, list[tuple[str, str]]]) -> dict[str, str | None]:
    if rule.match is None:
        return dict.fromkeys(names)
    found = local_patterns(rule.match, names, lambda path, rest: _selects_any(rule, rest, names[path]))
    return {path: found.get(path) for path in names}


@dataclass
class _LocalRule(Override):
    """A rule whose pattern was made relative to a target; reports name it as the user wrote it."""

    written: str = ""
    is_about_this_target: bool = True

    @classmethod
    def of(cls, rule: Override, pattern: str | None) -> _LocalRule:
        match = rule.match if pattern is None else pattern
        return cls(
            match,
            rule.op_type,
            rule.activation,
            rule.weight,
            written=rule.label,
            is_about_this_target=pattern is not None,
        )

    @property
    def label(self) -> str:
        return self.written

    def selects(self, point: str, op_type: str) -> bool:
        return self.is_about_this_target and super().selects(point, op_type)

    def names_exactly(self, point: str) -> bool:
        return self.is_about_this_target and super().names_exactly(point)


def _selects_any(rule: Override, pattern: str, names: Iterable[tuple[str, str]]) -> bool:
    local = dataclasses.replace(rule, match=pattern)
    return any(local.selects(name, kind) for name, kind in names)


def possible_points(op: Op) -> list[str]:
    """Return the names of all points that an op could have."""
    inputs = [f"{op.name}.{role}{operand.index}" for operand in op.operands for role in ("input", "weight")]
    return [f"{op.name}.output", f"{op.name}.weight", *inputs]
