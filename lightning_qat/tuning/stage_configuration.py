"""The configuration of a stage as a file that ``fit`` takes."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_qat.atomic_files import write_atomically
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.quantization.overrides import Override
from lightning_qat.tuning.stage_callbacks import Configured

_NAME = "QuantizationAwareTraining"


def write_configuration(
    folder: Path, configured: Configured, cli: LightningCLI | None, rules: Iterable[Override]
) -> Path:
    """Write ``config.yaml``: for LightningCLI the whole configuration of a run, else what the callback is given.

    It stands alone: sensitivity tables that the project's rules name are not read again.

    Args:
        folder: where the file goes.
        configured: what the stage has made of the run.
        cli: the LightningCLI of the project; None for a script of another kind.
        rules: the overrides in effect.
    """
    own = {
        "qconfig": _without_none(asdict(configured.quantization.qconfig)),
        "overrides": [_without_none(asdict(rule)) for rule in rules],
    }
    path = folder / "config.yaml"
    if cli is None:
        head = (
            "# Arguments of QuantizationAwareTraining, in the place of the same ones that your script gives it:\n"
            "# QuantizationAwareTraining(**yaml.safe_load(open(<this file>)), init_from=...)\n"
        )
        return write_atomically(path, head + yaml.safe_dump(own, sort_keys=False))
    config = cli.config.get(str(cli.subcommand), cli.config) if cli.subcommand else cli.config
    parser = cli._parser(cli.subcommand) if cli.subcommand else cli.parser
    whole = yaml.safe_load(parser.dump(config, skip_none=False))
    trainer = whole.setdefault("trainer", {})
    callbacks = trainer.get("callbacks") or []
    callbacks = [callbacks] if isinstance(callbacks, dict) else list(callbacks)
    if configured.adds_quantization:
        init_from = configured.quantization.init_from
        callbacks.insert(0, _entry(_NAME, {**own, **({"init_from": init_from} if init_from else {})}))
    else:
        arguments = _arguments_of_quantization(whole, callbacks)
        if arguments is None:
            head = (
                "# The script makes QuantizationAwareTraining itself: give it these arguments, or name the callback in "
                "the\n# configuration under trainer.callbacks.\n"
            )
            return write_atomically(path, head + yaml.safe_dump(own, sort_keys=False))
        arguments.update(own)
    if configured.adds_calibration:
        callbacks.append(_entry("Calibration", {}))
    trainer["callbacks"] = callbacks
    trainer |= {"devices": 1, "num_nodes": 1}  # as the stage ran
    if str(trainer.get("strategy", "auto")).startswith("ddp"):
        trainer["strategy"] = "auto"
    if "ckpt_path" in whole:
        whole["ckpt_path"] = configured.ckpt_path
    return write_atomically(path, yaml.safe_dump(whole, sort_keys=False))


def _arguments_of_quantization(whole: dict[str, Any], callbacks: list[Any]) -> dict[str, Any] | None:
    """Return the arguments of the callback that quantizes, where the configuration has them; None if it has none."""
    for entry in callbacks:
        if isinstance(entry, dict) and _is_ours(str(entry.get("class_path", ""))):
            entry["init_args"] = dict(entry.get("init_args") or {})
            found: dict[str, Any] = entry["init_args"]
            return found
    for group in whole.values():  # parser.add_lightning_class_args(QuantizationAwareTraining, "qat")
        if isinstance(group, dict) and {"qconfig", "overrides", "weight_scales"} <= group.keys():
            return group
    return None


def _is_ours(class_path: str) -> bool:
    """Whether a class of a configuration is QuantizationAwareTraining or derives from it."""
    if class_path.rpartition(".")[2] == _NAME:
        return True
    try:
        found = _import_object(class_path)
    except (ImportError, ValueError, AttributeError):
        return False
    return isinstance(found, type) and issubclass(found, QuantizationAwareTraining)


def _import_object(name: str) -> Any:
    """Import an object by its dotted name."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def _entry(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"class_path": f"lightning_qat.{name}", **({"init_args": arguments} if arguments else {})}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value
