"""The package's structure: which layer may import which, where Lightning may appear, how long a file may be.

``quantization <- analysis <- reporting, export <- callbacks <- cli``: a layer imports itself and what stands left of
it. So do the parts of a layer. No file is part of a circle.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "lightning_qat"
ROOT = Path(__file__).parents[1] / PACKAGE
LAYERS = ("quantization", "analysis", "reporting", "export", "callbacks", "cli")
PARTS = {  # folders, and files beside them; "" are the other files
    "quantization": (
        "errors",
        "ranks",
        "modules",
        "numerics",
        "config_values",
        "qconfig",
        "overrides",
        "functions",
        "interception",
        "tracing",
        "planning",
        "fake_quant",
        "region",
    ),
    "analysis": (
        "",
        "statistics",
        "sensitivity",
        "model_check",
        "fingerprint",
        "ladder",
        "convergence",
        "comparison",
        "diagnosis",
        "runs",
    ),
    "callbacks": (
        "trainer",
        "preservation",
        "passes",
        "quantized_run",
        "analyses",
        "schedule",
        "insertion",
        "ladder",
        "",
    ),
}
LIGHTNING_LAYERS = ("callbacks", "cli")
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")
DEPRECATED = ("torch.ao", "torch.quantization")
MAX_LINES = 400


def test_package_keeps_to_its_layers() -> None:
    found = violations(ROOT)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("quantization/a.py", "from lightning_qat.analysis import x", "quantization must not import analysis"),
        ("quantization/a.py", "from ..analysis.check import x", "quantization must not import analysis"),
        ("quantization/tracing/a.py", "from ... import reporting", "quantization must not import reporting"),
        ("quantization/__init__.py", "from ..analysis import x", "quantization must not import analysis"),
        ("analysis/a.py", "import lightning_qat.reporting.tables", "analysis must not import reporting"),
        ("analysis/a.py", "from lightning_qat import reporting", "analysis must not import reporting"),
        ("reporting/a.py", "def f():\n    from ..callbacks import x", "reporting must not import callbacks"),
        ("callbacks/a.py", "import lightning_qat.cli", "callbacks must not import cli"),
        ("analysis/a.py", "from lightning_qat import insert", "analysis must not import the top level"),
        ("quantization/a.py", "import lightning", "only callbacks and cli may import lightning"),
        ("analysis/a.py", "from lightning.pytorch import Trainer", "only callbacks and cli may import lightning"),
        ("reporting/a.py", "import pytorch_lightning as pl", "only callbacks and cli may import pytorch_lightning"),
        ("analysis/a.py", "import importlib\nimportlib.import_module('lightning')", "may import lightning"),
        ("callbacks/a.py", "import torch.ao.quantization", "torch.ao is deprecated"),
        ("quantization/a.py", "from torch import ao", "torch.ao is deprecated"),
        ("quantization/a.py", "import torch\nx = torch.ao.quantization.fuse_modules", "torch.ao is deprecated"),
        ("quantization/a.py", "x = 1\n" * (MAX_LINES + 1), f"{MAX_LINES + 1} lines"),
        (
            "quantization/numerics/a.py",
            "from lightning_qat.quantization.region.regions import x",
            "numerics must not import region (order: errors <- ranks <- modules <- numerics",
        ),
        ("quantization/errors.py", "from .numerics import x", "errors must not import numerics"),
        (
            "analysis/results.py",
            "from lightning_qat.analysis.comparison import x",
            "analysis must not import comparison",
        ),
        ("analysis/helpers/a.py", "x = 1", "helpers belongs to no part"),
        ("helpers.py", "x = 1", "helpers belongs to no layer"),
        ("utils/a.py", "x = 1", "utils belongs to no layer"),
    ],
)
def test_planted_violation_is_reported_with_file_and_line(tmp_path: Path, file: str, source: str, message: str) -> None:
    found = violations(package_with(tmp_path, {file: source}))
    assert len(found) == 1, found
    assert found[0].startswith(f"{PACKAGE}/{file}:")
    assert message in found[0]


def test_imports_in_the_right_direction_are_not_reported(tmp_path: Path) -> None:
    root = package_with(
        tmp_path,
        {
            "__init__.py": "from lightning.pytorch import Callback\nfrom .callbacks import x",
            "quantization/a.py": "import torch\nimport lightning_qat_other\nfrom . import b\nfrom .b import c",
            "analysis/a.py": "from lightning_qat.quantization import x\nfrom .. import quantization",
            "reporting/a.py": "from ..analysis.a import y\nfrom lightning_qat import __version__",
            "callbacks/a.py": "import lightning.pytorch as pl\nfrom ..reporting import z",
            "cli.py": "from lightning.pytorch.cli import LightningCLI\nfrom lightning_qat import callbacks",
            "__main__.py": "from .cli import main",
        },
    )
    assert violations(root) == []


def test_no_file_imports_itself_through_others() -> None:
    """At type-checking time either: what stands under ``if TYPE_CHECKING`` counts."""
    assert circles(ROOT) == []


@pytest.mark.parametrize("guard", ["", "if TYPE_CHECKING:\n    "])
def test_planted_circle_is_found(tmp_path: Path, guard: str) -> None:
    root = package_with(
        tmp_path,
        {
            "quantization/a.py": "from lightning_qat.quantization.b import x",
            "quantization/b.py": "from .c import x",
            "quantization/c.py": f"{guard}from lightning_qat.quantization import a",
            "quantization/d.py": "from .a import x",
        },
    )
    assert circles(root) == [["quantization.a", "quantization.b", "quantization.c"]]


def circles(root: Path) -> list[list[str]]:
    """Groups of files that import each other, directly or through others."""
    paths = {".".join(path.relative_to(root).with_suffix("").parts): path for path in root.rglob("*.py")}
    reached = {}
    for module, path in paths.items():
        package = (PACKAGE, *path.relative_to(root).parent.parts)
        names = (name for _, name in imported_names(ast.parse(path.read_text(encoding="utf-8")), package))
        inner = [name.removeprefix(f"{PACKAGE}.") for name in names if name.startswith(f"{PACKAGE}.")]
        # a name stands for a file, or for what is in one
        reached[module] = {found for name in inner for found in (name, name.rpartition(".")[0]) if found in paths}
    for through in paths:  # Warshall: what is reached through a file
        for imported in reached.values():
            if through in imported:
                imported |= reached[through]
    together = {tuple(sorted(m for m in reached[n] if n in reached[m])) for n in paths if n in reached[n]}
    return [list(group) for group in sorted(together)]


def violations(root: Path) -> list[str]:
    """Sentences ``file:line: what is wrong`` for every rule that a file of the package at ``root`` breaks."""
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        first = relative.parts[0].removesuffix(".py")
        layer = {"__init__": "", "__main__": "cli"}.get(first, first)
        source = path.read_text(encoding="utf-8")
        problems = [(1, f"{layer} belongs to no layer; LAYERS in {Path(__file__).name} names them")]
        part = part_of(relative)
        if part is None:
            problems = [(1, f"{relative.parts[1]} belongs to no part of {layer}; PARTS names them")]
        elif not layer or layer in LAYERS:
            package = (PACKAGE, *relative.parent.parts)
            names = imported_names(ast.parse(source, str(path)), package)
            problems = [(line, text) for line, name in names for text in [broken_rule(layer, part, name)] if text]
        if (lines := len(source.splitlines())) > MAX_LINES:
            problems.append((lines, f"{lines} lines; split it: {MAX_LINES} is the limit"))
        # one statement can name the same thing twice
        found += [f"{PACKAGE}/{relative.as_posix()}:{line}: {text}" for line, text in dict.fromkeys(problems)]
    return found


def part_of(path: Path) -> str | None:
    """The part of its layer that a file belongs to, "" if the layer has none; None for a folder that PARTS lacks."""
    parts = PARTS.get(path.parts[0], ())
    if len(path.parts) > 2 and parts:
        return path.parts[1] if path.parts[1] in parts else None
    return path.stem if path.stem in parts else ""


def broken_rule(layer: str, part: str, name: str) -> str | None:
    """What is wrong with importing the dotted ``name`` in a part of ``layer`` ("" is the top-level ``__init__``)."""
    first, _, rest = name.partition(".")
    if first in LIGHTNING and layer and layer not in LIGHTNING_LAYERS:
        return f"imports {name}; only {' and '.join(LIGHTNING_LAYERS)} may import {first}"
    for deprecated in DEPRECATED:
        if f"{name}.".startswith(f"{deprecated}."):
            return f"imports {name}; {deprecated} is deprecated"
    if first != PACKAGE or not layer:
        return None
    imported = rest.split(".")[0]
    if imported in LAYERS:
        if LAYERS.index(imported) > LAYERS.index(layer):
            return f"imports {name}; {layer} must not import {imported} (order: {' <- '.join(LAYERS)})"
        order, other = PARTS.get(layer, ()), rest.split(".")[1:2]
        if imported == layer and part in order and other and other[0] in order[order.index(part) + 1 :]:
            return f"imports {name}; {part or layer} must not import {other[0]} (order: {' <- '.join(order)})"
    elif imported != "__version__" and layer != "cli":
        return f"imports {name}; {layer} must not import the top level, which imports every layer"
    return None


def imported_names(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything imported, wherever the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in DEPRECATED:
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
            yield from ((node.lineno, name) for name in names if isinstance(name, str))


def package_with(tmp_path: Path, files: dict[str, str]) -> Path:
    root = tmp_path / PACKAGE
    for file, source in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(source, encoding="utf-8")
    return root
