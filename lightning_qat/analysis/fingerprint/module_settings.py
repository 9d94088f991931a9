"""What a module is beside its weights: its class, its settings, and the code of its forward."""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import nn

from lightning_qat.quantization.modules.module_walk import is_in_region

_SCALARS = (int, float, str, bool, type(None))
_MOST_ITEMS = 8
"""A longer list is data, not a setting."""
_FRAMEWORKS = ("torch", "lightning", "torchmetrics")
EXTRA_REPR = "extra_repr"


@dataclass(frozen=True)
class ModuleSettings:
    """What a module is beside its weights.

    Args:
        kind: name of its class.
        settings: its public attributes that are numbers, words or short lists of them; ``extra_repr`` is what it prints
            of itself.
        code: digest of the code of its forward, and of the methods that it calls; empty for classes of torch, and where
            the code is not known.
        library: its class is one of torch.
    """

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    code: str = ""
    library: bool = False


def plain_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every submodule with its path, without regions and as if nothing had been compiled."""
    for name, child in module.named_modules():
        if not is_in_region(name) and "_orig_mod" not in child._modules:
            yield plain_path(name), child


def plain_path(name: str) -> str:
    """Return the path of a module or parameter as if nothing had been compiled.

    Example:
        >>> plain_path("net._orig_mod.conv.weight")
        'net.conv.weight'
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def module_settings(module: nn.Module) -> dict[str, ModuleSettings]:
    """Return what every submodule is.

    Example:
        >>> found = module_settings(nn.Sequential(nn.LeakyReLU(0.2), nn.Dropout(0.9)))
        >>> [(name, m.kind, m.settings.get("negative_slope")) for name, m in found.items()]
        [('', 'Sequential', None), ('0', 'LeakyReLU', 0.2), ('1', 'Dropout', None)]
        >>> found["1"].settings["p"]
        0.9
    """
    codes: dict[type, str] = {}
    found = {}
    for name, child in plain_modules(module):
        kind = type(child)
        if kind not in codes:
            codes[kind] = code_digest(kind)
        library = _package(kind) == "torch"
        found[name] = ModuleSettings(kind.__name__, _settings(child), codes[kind], library)
    return found


def steady_settings(
    before: Mapping[str, ModuleSettings], after: Mapping[str, ModuleSettings]
) -> dict[str, ModuleSettings]:
    """Return the settings that are the same at two times; the others are counters, or follow what was seen."""
    return {
        name: replace(
            found,
            settings={
                key: value
                for key, value in found.settings.items()
                if name not in after or (key in after[name].settings and after[name].settings[key] == value)
            },
        )
        for name, found in before.items()
    }


def code_digest(kind: type) -> str:
    """Return a digest of the code of a class's forward and of the methods of the class that it calls.

    Comments, docstrings and the layout do not count.
    """
    pending, seen, sources = ["forward"], {"forward"}, []
    while pending:
        name = pending.pop()
        function = inspect.unwrap(getattr(kind, name, None))  # type: ignore[arg-type]
        if not isinstance(function, types.FunctionType) or _package(function) in _FRAMEWORKS:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):
            return ""
        _drop_docstrings(tree)
        sources.append(f"{name}: {ast.unparse(tree)}")
        called = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
        }
        pending += sorted(called - seen)
        seen |= called
    return (
        hashlib.sha256("\n".join(sorted(sources)).encode("utf-8", "surrogatepass")).hexdigest()[:16] if sources else ""
    )


def _package(value: Any) -> str:
    return (getattr(value, "__module__", None) or "").split(".")[0]


def _drop_docstrings(tree: ast.AST) -> None:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]


def _settings(module: nn.Module) -> dict[str, Any]:
    found = {}
    attributes = vars(module)
    # attributes only: asking a LightningModule for its hparams would make an empty one
    hparams = attributes.get("_hparams")
    named = {f"hparams.{key}": value for key, value in hparams.items()} if isinstance(hparams, Mapping) else {}
    for name, value in {**attributes, **named}.items():
        if not name.startswith("_") and name != "training" and (plain := _plain(value)) is not _NOT_PLAIN:
            found[name] = plain
    if text := _extra_repr(module):
        found[EXTRA_REPR] = text
    return found


def _extra_repr(module: nn.Module) -> str:
    try:
        text = str(module.extra_repr())
    except Exception:  # code of others, which only printing needs
        return ""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


_NOT_PLAIN = object()


def _plain(value: Any) -> Any:
    """A setting as JSON has it."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, (torch.dtype, torch.Size)):
        return str(value)
    if isinstance(value, _SCALARS):
        return value
    if isinstance(value, (tuple, list)) and len(value) <= _MOST_ITEMS:
        items = [_plain(item) for item in value]
        return _NOT_PLAIN if any(item is _NOT_PLAIN for item in items) else items
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):  # such as an activation
        return value.__name__ if _package(value) in ("torch", "") else _NOT_PLAIN
    return _NOT_PLAIN
