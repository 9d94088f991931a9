"""How a run came about: its command, seed, versions and configuration. What looks like a secret is left out."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning_qat.atomic_files import json_value, write_atomically

FILE_NAME = "provenance.json"
ANY_CHECKPOINT = "best.ckpt"
"""In the place of a checkpoint that is not known."""
_PACKAGES = ("lightning-qat", "torch", "lightning", "torchmetrics", "numpy")
_CONFIGURATIONS = ("config.yaml", "hparams.yaml")
_HASHED = ("quant_plan.json", "pipeline_fingerprint.json")
_LARGEST = 200_000
"""Characters of a configuration that the page holds."""
_LEFT_OUT = "(left out)"
_SECRET = r"(?:\w*[._-])?(?:password|passwd|secret|token|api_?key|access_?key|credentials?)"
_SECRET_LINE = re.compile(rf"(?im)^(?P<head>[ \t-]*['\"]?{_SECRET}['\"]?[ \t]*:[ \t]*)(?P<value>[^\s#].*)$")
_SECRET_OPTION = re.compile(rf"(?i)--?{_SECRET}")


def describe_process(finished: bool, checkpoint: str = "") -> dict[str, Any]:
    """Return what the running process knows about itself.

    Args:
        finished: whether the run is complete.
        checkpoint: the best one of the run; empty without one.
    """
    return {
        "command": without_secrets([os.path.basename(sys.executable), *sys.argv]),
        "seed": os.environ.get("PL_GLOBAL_SEED"),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "finished": finished,
        "checkpoint": _from_here(checkpoint) or None,
        "versions": {"python": platform.python_version(), **_versions()},
        "platform": platform.platform(),
    }


def write_provenance(directory: str | os.PathLike[str], finished: bool, checkpoint: str = "") -> Path:
    """Write ``provenance.json`` into the folder of a run.

    Args:
        directory: the run's ``lightning_qat`` folder.
        finished: whether the run is complete.
        checkpoint: the best one of the run; empty without one.
    """
    text = json.dumps(json_value(describe_process(finished, checkpoint)), indent=2) + "\n"
    return write_atomically(Path(directory) / FILE_NAME, text)


def without_secrets(words: Sequence[str]) -> list[str]:
    """Return a command line without the values of options that are called like a secret.

    Example:
        >>> without_secrets(["fit", "--logger.api_key=x1", "--token", "x2", "--model.width", "16"])
        ['fit', '--logger.api_key=(left out)', '--token', '(left out)', '--model.width', '16']
    """
    found: list[str] = []
    hides_next = False
    for word in words:
        option, equals, _ = word.partition("=")
        is_secret = _SECRET_OPTION.fullmatch(option.replace("-", "_").replace("__", "--", 1)) is not None
        if hides_next:
            found.append(_LEFT_OUT)
        else:
            found.append(f"{option}={_LEFT_OUT}" if is_secret and equals else word)
        hides_next = is_secret and not equals and not hides_next
    return found


def export_command(folder: Path, provenance: Mapping[str, Any]) -> str:
    """Return the command that exports the model of a run, with what is known of its arguments.

    Args:
        folder: the run's ``lightning_qat`` folder.
        provenance: how it was started, see :func:`describe_process`.

    Example:
        >>> export_command(Path("run"), {"command": ["python", "fit.py", "fit", "--config", "a.yaml"]})
        'python -m lightning_qat export fit.py --config a.yaml --ckpt_path best.ckpt'
    """
    script, configs = _sources(provenance)
    config = configs[0] if configs else "" if script else "fit.yaml"
    checkpoint = known_checkpoint(folder, provenance) or ANY_CHECKPOINT
    options = ["--config", config] if config else []
    return shlex.join(
        ["python", "-m", "lightning_qat", "export", script or "train.py", *options, "--ckpt_path", checkpoint]
    )


def known_checkpoint(folder: Path, provenance: Mapping[str, Any]) -> str:
    """Return the path of the checkpoint to export; empty if a run has none, or several and names none.

    Args:
        folder: the run's ``lightning_qat`` folder.
        provenance: how it was started, see :func:`describe_process`.
    """
    checkpoints = list(folder.parent.glob("checkpoints/*.ckpt"))
    return str(provenance.get("checkpoint") or (checkpoints[0] if len(checkpoints) == 1 else ""))


def configuration_of(provenance: Mapping[str, Any]) -> str:
    """Return what a user changes to configure a run: its YAML files, else its script, as far as they are known.

    Args:
        provenance: how it was started, see :func:`describe_process`.

    Example:
        >>> configuration_of({"command": ["python", "fit.py", "fit", "--config", "a.yaml"]})
        'a.yaml'
        >>> configuration_of({"command": ["python", "fit.py"]}), configuration_of({})
        ('fit.py', 'the configuration')
    """
    script, configs = _sources(provenance)
    return " or ".join(configs) or os.path.basename(script) or "the configuration"


def overrides_place(provenance: Mapping[str, Any]) -> str:
    """Say where the overrides that the page offers are to be pasted.

    Args:
        provenance: how the run was started, see :func:`describe_process`.
    """
    script, configs = _sources(provenance)
    if script and not configs:
        return (
            f"Add them to QuantizationAwareTraining(overrides=[...]) in {os.path.basename(script)}, behind those that "
            "are there: the last match wins. In Python they are dictionaries; yaml.safe_load() reads them as they are."
        )
    return (
        f"Add them to overrides of QuantizationAwareTraining in {configuration_of(provenance)}, behind those that are "
        "there: the last match wins."
    )


def _from_here(path: str) -> str:
    """A path as a user writes it: relative if it is below the working directory."""
    return os.path.relpath(path) if path and Path(path).is_relative_to(Path.cwd()) else path


def _sources(provenance: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The script and the configuration files of a command line."""
    words = provenance.get("command")
    given = [str(word) for word in words] if isinstance(words, list) else []
    script = next((word for word in given if word.endswith(".py")), "")
    pairs = [*pairwise(given), *(word.partition("=")[::2] for word in given if "=" in word)]
    return script, [value for option, value in pairs if option in ("--config", "-c")]


def read_configurations(directory: Path) -> dict[str, str]:
    """Return the configuration files that Lightning keeps in a log directory, without secrets.

    Args:
        directory: the log directory.
    """
    found = {}
    for name in _CONFIGURATIONS:
        path = directory / name
        try:
            text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        except OSError:
            continue
        if text.strip() and len(text) <= _LARGEST:
            found[name] = _SECRET_LINE.sub(rf"\g<head>{_LEFT_OUT}", text)
    return found


def read_hashes(folder: Path, root: Path) -> dict[str, str]:
    """Return the SHA-256 of the files that decide what was run.

    Args:
        folder: the run's ``lightning_qat`` folder.
        root: its log directory.
    """
    paths = [*(root / name for name in _CONFIGURATIONS), *(folder / name for name in _HASHED)]
    found = {}
    for path in paths:
        try:
            found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError:
            continue
    return found


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
