"""Reading hardware profiles: the shipped ones by name, others by path.

The constants at the top list the keys that a file may have.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from typing import Any, get_args

from lightning_qat.quantization.config_values import Granularity, Scheme, positive_number
from lightning_qat.quantization.errors import ConfigurationError, near_names, shown, unknown_choice
from lightning_qat.quantization.functions.function_lookup import known_kinds
from lightning_qat.quantization.numerics.dtypes import DtypeName
from lightning_qat.quantization.planning.fusion_patterns import DEFAULT_PATTERNS, GEMM_LAYERS, FusionPatterns
from lightning_qat.quantization.planning.hardware_profile import HardwareProfile, OpRule, Signature
from lightning_qat.quantization.planning.plan import QuantPlan
from lightning_qat.quantization.reading.files import Document

_PROFILE_KEYS = ("name", "version", "description", "source", "groups", "ops", "unsupported", "fusions", "cost", "bias")
_RULE_KEYS = ("kinds", "signatures", "schemes", "weight_granularity")
_SIGNATURE_KEYS = ("input", "weight", "output")
_BIAS_TYPES = ("float32", "int32")

GROUPS: dict[str, frozenset[str]] = {
    "conv": frozenset(["conv1d", "conv2d", "conv3d"]),
    "conv_transpose": frozenset(["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]),
    "gemm_layer": GEMM_LAYERS,
    "matmul_like": frozenset(["matmul", "rmatmul", "bmm", "mv", "addmm", "baddbmm", "addbmm", "addmv"]),
    "elementwise": frozenset(["add", "sub", "rsub", "mul", "div", "rdiv", "maximum", "minimum", "neg", "abs"]),
    "relu_like": frozenset(["relu", "relu6", "hardtanh"]),
    "join": frozenset(["cat", "stack", "hstack", "vstack", "dstack", "column_stack", "where"]),
    "max_pool": frozenset(f"{a}max_pool{d}d" for a in ("", "adaptive_") for d in (1, 2, 3)),
    "avg_pool": frozenset(f"{a}avg_pool{d}d" for a in ("", "adaptive_") for d in (1, 2, 3)),
    "normalization": frozenset(["batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"]),
}
"""Names that stand for several kinds; a profile can add its own."""


def hardware_profile(
    value: HardwareProfile | str | os.PathLike[str] | Mapping[str, Any] | None,
) -> HardwareProfile | None:
    """Return a profile from a profile, the name of a shipped one, the path of a YAML file, its content, or None.

    Raises:
        ConfigurationError: there is no such profile, or it has unknown keys, kinds or types.

    Example:
        >>> profile = hardware_profile("generic_int8_int16")
        >>> profile.name, hardware_profile(profile) is profile, hardware_profile(None)
        ('generic_int8_int16', True, None)
    """
    if value is None or isinstance(value, HardwareProfile):
        return value
    return parse_profile(value, "profile") if isinstance(value, Mapping) else read_profile(value)


def planned_profile(plan: QuantPlan) -> HardwareProfile | None:
    """Return the profile that a plan was made under, if it is a shipped one that still allows the same."""
    planned = plan.profile
    if planned is None or planned["name"] not in shipped_profiles():
        return None
    shipped = read_profile(planned["name"])
    return shipped if shipped.digest == planned["sha256"] else None


def shipped_profiles() -> tuple[str, ...]:
    """Return the names of the profiles that come with the package.

    Example:
        >>> shipped_profiles()
        ('generic_int8_int16', 'horizon_plugin_pytorch', 'onnxruntime_qdq')
    """
    files = resources.files("lightning_qat").joinpath("profiles").iterdir()
    return tuple(sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml")))


def read_profile(value: str | os.PathLike[str]) -> HardwareProfile:
    """Read a shipped profile by name, or a YAML file by path.

    Raises:
        ConfigurationError: there is no such profile, the file is not YAML, or it has unknown keys, kinds or types.

    Example:
        >>> read_profile("onnxruntime_qdq").name
        'onnxruntime_qdq'
    """
    text = os.fspath(value)
    shipped = shipped_profiles()
    if text in shipped:
        file = resources.files("lightning_qat").joinpath("profiles").joinpath(f"{text}.yaml")
        with resources.as_file(file) as path:
            return parse_profile(Document(path, "a hardware profile", "install lightning_qat again").yaml(), text)
    if not text.endswith((".yaml", ".yml")):
        near = near_names(text, shipped)
        hint = f" Did you mean {', '.join(map(repr, near))}?" if near else ""
        raise ConfigurationError(
            f"unknown profile {text!r}.{hint} Write the path of a .yaml file or one of: {', '.join(shipped)}."
        )
    remedy = f"write one as lightning_qat/profiles/README.md says, or name one of {', '.join(shipped)}"
    return parse_profile(Document(text, "a hardware profile", remedy).yaml(), text)


def parse_profile(data: Any, where: str) -> HardwareProfile:
    """Turn the content of a profile file into a profile.

    Args:
        data: the content, as YAML gives it.
        where: name of the file, for messages.

    Raises:
        ConfigurationError: a key, kind or type is unknown (the message shows near names), missing or given twice.
    """
    _check_keys(data, _PROFILE_KEYS, where, required=("name", "ops"))
    groups = dict(GROUPS)
    for name, kinds in _mapping(data.get("groups") or {}, f"{where}: groups").items():
        if name in groups or name in known_kinds():
            raise ConfigurationError(
                f"{where}: groups: {name!r} is already the name of a group or kind: write another name."
            )
        groups[name] = frozenset(_kinds(kinds, groups, f"{where}: groups.{name}"))
    rules: dict[str, OpRule] = {}
    others: OpRule | None = None
    for index, item in enumerate(_list(data["ops"], f"{where}: ops")):
        place = f"{where}: ops[{index}]"
        _check_keys(item, _RULE_KEYS, place, required=("kinds", "signatures"))
        rule = _rule(item, place)
        if item["kinds"] in ("*", ["*"]):
            if others is not None:
                raise ConfigurationError(f"{place}.kinds: '*' already has a rule: write one rule per kind.")
            others = rule
            continue
        for kind in _kinds(item["kinds"], groups, f"{place}.kinds"):
            if kind in rules:
                raise ConfigurationError(f"{place}.kinds: {kind!r} already has a rule: write one rule per kind.")
            rules[kind] = rule
    unsupported: dict[str, str] = {}
    for name, reason in _mapping(data.get("unsupported") or {}, f"{where}: unsupported").items():
        for kind in _kinds([name], groups, f"{where}: unsupported"):
            if kind in rules:
                raise ConfigurationError(f"{where}: unsupported: {kind!r} has a rule in ops: remove one of the two.")
            unsupported[kind] = _text(reason, f"{where}: unsupported.{name}")
    if others is not None:
        rules |= dict.fromkeys(known_kinds() - rules.keys() - unsupported.keys(), others)
    patterns = DEFAULT_PATTERNS
    if data.get("fusions") is not None:
        fusions = _list(data["fusions"], f"{where}: fusions")
        patterns = FusionPatterns.of(
            [list(_steps(text, groups, f"{where}: fusions[{i}]")) for i, text in enumerate(fusions)]
        )
    keys = [key for key in ("version", "description", "source") if data.get(key) is not None]
    texts = {key: _text(data[key], f"{where}: {key}") for key in keys}
    cost = _costs(data.get("cost"), groups, f"{where}: cost")
    name = _text(data["name"], f"{where}: name")
    bias = data.get("bias", "float32")
    if bias not in _BIAS_TYPES:
        raise unknown_choice(f"{where}: bias", bias, _BIAS_TYPES)
    return HardwareProfile(name, rules, patterns, unsupported=unsupported, cost=cost, bias=bias, **texts)


def _costs(item: Any, groups: Mapping[str, frozenset[str]], where: str) -> dict[str, dict[str, float]]:
    """``{conv: {int8: 1.0, int16: 2.0}, "*": {...}}``: time per operation by kind of op and type."""
    found: dict[str, dict[str, float]] = {}
    for name, times in _mapping({} if item is None else item, where).items():
        place = f"{where}.{name}"
        own = {
            _choices(dtype, get_args(DtypeName), "dtype", place)[0]: positive_number(time, f"{place}.{dtype}")
            for dtype, time in _mapping(times, place).items()
        }
        for kind in [name] if name == "*" else _kinds([name], groups, where):
            if kind in found:
                raise ConfigurationError(f"{place}: {kind!r} already has a cost: write one entry per kind.")
            found[kind] = own
    return found


def _rule(item: Mapping[str, Any], place: str) -> OpRule:
    signatures = []
    for index, given in enumerate(_list(item["signatures"], f"{place}.signatures")):
        where = f"{place}.signatures[{index}]"
        _check_keys(given, _SIGNATURE_KEYS, where, required=("input", "output"))
        types = {
            key: _choices(given.get(key) or [], get_args(DtypeName), "dtype", f"{where}.{key}")
            for key in _SIGNATURE_KEYS
        }
        if not (types["input"] and types["output"]):
            raise ConfigurationError(f"{where}: input and output need at least one dtype, such as int8.")
        signatures.append(Signature(**types))
    if not signatures:
        raise ConfigurationError(f"{place}.signatures is empty: write kinds that cannot run under unsupported instead.")
    options: dict[str, Any] = {}
    for key, choices in (("schemes", get_args(Scheme)), ("weight_granularity", get_args(Granularity))):
        if item.get(key) is not None:
            options[key] = _choices(item[key], choices, key, f"{place}.{key}")
            if not options[key]:
                raise ConfigurationError(f"{place}.{key} is empty: write one of {', '.join(choices)}, or leave it out.")
    return OpRule(tuple(signatures), **options)


def _steps(text: Any, groups: Mapping[str, frozenset[str]], where: str) -> Iterator[list[str | None]]:
    """``conv + batch_norm? + relu|relu6?``: the kinds of each step, None if it may be missing."""
    if not isinstance(text, str) or "+" not in text:
        raise ConfigurationError(f"{where}: write a pattern as 'conv2d + batch_norm? + relu?', got {shown(text)}.")
    for step in text.split("+"):
        names = step.strip().removesuffix("?").split("|")
        kinds: list[str | None] = sorted(_kinds([n.strip() for n in names], groups, where))  # type: ignore[assignment]
        yield [*kinds, None] if step.strip().endswith("?") else kinds


def _kinds(names: Any, groups: Mapping[str, frozenset[str]], where: str) -> list[str]:
    known = known_kinds()
    found: list[str] = []
    for name in [names] if isinstance(names, str) else _list(names, where):
        if isinstance(name, str) and name in groups:
            found += sorted(groups[name])
        elif isinstance(name, str) and name in known:
            found.append(name)
        else:
            near = near_names(name, [*known, *groups])
            hint = f" Did you mean {', '.join(map(repr, near))}?" if near else ""
            raise ConfigurationError(f"{where}: unknown op kind or group {shown(name)}.{hint}")
    return found


def _choices(values: Any, choices: Iterable[str], what: str, where: str) -> tuple[str, ...]:
    found = [values] if isinstance(values, str) else _list(values, where)
    for value in found:
        if value not in choices:
            raise ConfigurationError(f"{where}: {unknown_choice(what, value, choices)}")
    return tuple(found)


def _check_keys(item: Any, keys: tuple[str, ...], where: str, required: tuple[str, ...]) -> None:
    for key in _mapping(item, where):
        if key not in keys:
            raise unknown_choice(f"key in {where}:", key, keys)
    for key in required:
        if item.get(key) is None:
            raise ConfigurationError(f"{where}: {key!r} is missing.")


def _text(item: Any, where: str) -> str:
    """A text; numbers as they are written, and an empty text for nothing."""
    if isinstance(item, (list, tuple, Mapping, set)):
        raise ConfigurationError(f"{where} must be a text, got {shown(item)}.")
    return "" if item is None else str(item).strip()


def _mapping(item: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(item, Mapping):
        raise ConfigurationError(f"{where} must be a mapping, got {shown(item)}.")
    return item


def _list(item: Any, where: str) -> list[Any]:
    if not isinstance(item, (list, tuple)):
        raise ConfigurationError(f"{where} must be a list, got {shown(item)}.")
    return list(item)
