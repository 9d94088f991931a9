"""Configurations of the story as plain dictionaries: read, change, write."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

Settings = dict[str, Any]
Rule = dict[str, Any]


def read(path: Path) -> Settings:
    """Read a YAML file of LightningCLI."""
    content: Settings = yaml.safe_load(path.read_text())
    return content


def write(settings: Settings, path: Path) -> Path:
    """Write settings where ``--config`` can find them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings, sort_keys=False, width=120))
    return path


def callback(settings: Settings, name: str) -> Settings:
    """Return the arguments of a callback of the Trainer, to be changed."""
    found = next(c for c in settings["trainer"]["callbacks"] if c["class_path"].endswith(name))
    arguments: Settings = found.setdefault("init_args", {})
    return arguments


def without(settings: Settings, *names: str) -> Settings:
    """Return settings without some callbacks."""
    changed = copy.deepcopy(settings)
    kept = [c for c in changed["trainer"]["callbacks"] if c["class_path"].rpartition(".")[2] not in names]
    changed["trainer"]["callbacks"] = kept
    return changed


def with_model(settings: Settings, **arguments: Any) -> Settings:
    """Return settings with other arguments of the module."""
    changed = copy.deepcopy(settings)
    changed["model"].update(arguments)
    return changed


def with_overrides(settings: Settings, rules: Iterable[Rule]) -> Settings:
    """Return settings with more overrides, behind those that are there; a rule that is there already moves back."""
    changed = copy.deepcopy(settings)
    quantization = callback(changed, "QuantizationAwareTraining")
    added = list(rules)
    kept = [rule for rule in quantization.get("overrides", []) if rule not in added]
    quantization["overrides"] = kept + added
    return changed


def at_int8(settings: Settings) -> Settings:
    """Return settings with everything at int8: of the overrides, those stay that say nothing about a type."""
    changed = copy.deepcopy(settings)
    quantization = callback(changed, "QuantizationAwareTraining")
    quantization["qconfig"] = {
        "activation": {"dtype": "int8", "observer": "mse"},
        "weight": {"dtype": "int8", "granularity": "per_channel"},
    }
    quantization["overrides"] = [rule for rule in quantization["overrides"] if not _names_a_type(rule)]
    return changed


def _names_a_type(rule: Mapping[str, Any]) -> bool:
    return any("dtype" in rule.get(role, {}) for role in ("activation", "weight"))
