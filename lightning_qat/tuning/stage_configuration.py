"""The configuration of a stage as a file that ``fit`` takes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_qat.atomic_files import write_atomically
from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining

_OURS = "QuantizationAwareTraining"


def write_configuration(folder: Path, quantization: QuantizationAwareTraining, cli: LightningCLI | None) -> Path:
    """Write ``config.yaml``: for LightningCLI the whole configuration of a run, else what the callback is given.

    Args:
        folder: where the file goes.
        quantization: the callback as the stage has configured it.
        cli: the LightningCLI of the project; None for a script of another kind.
    """
    own = {
        "qconfig": _without_none(asdict(quantization.qconfig)),
        "overrides": [_without_none(asdict(rule)) for rule in quantization.overrides],
    }
    if cli is None:
        head = (
            "# For QuantizationAwareTraining(**yaml.safe_load(open(...))), beside the arguments your script gives it.\n"
        )
        return write_atomically(folder / "config.yaml", head + yaml.safe_dump(own, sort_keys=False))
    config = cli.config.get(str(cli.subcommand), cli.config) if cli.subcommand else cli.config
    parser = cli._parser(cli.subcommand) if cli.subcommand else cli.parser
    whole = yaml.safe_load(parser.dump(config, skip_none=False))
    callbacks = whole.setdefault("trainer", {}).get("callbacks") or []
    callbacks = [callbacks] if isinstance(callbacks, dict) else list(callbacks)
    for entry in callbacks:
        if str(entry.get("class_path", "")).rpartition(".")[2] == _OURS:
            entry["init_args"] = {**(entry.get("init_args") or {}), **own}
            break
    else:
        init_from = {"init_from": quantization.init_from} if quantization.init_from else {}
        callbacks = [
            {"class_path": f"lightning_qat.{_OURS}", "init_args": {**own, **init_from}},
            {"class_path": f"lightning_qat.{Calibration.__name__}"},
            *callbacks,
        ]
        if init_from:
            whole["ckpt_path"] = None
    whole["trainer"]["callbacks"] = callbacks
    return write_atomically(folder / "config.yaml", yaml.safe_dump(whole, sort_keys=False))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value
