"""The package's structure: which layer may import which, where Lightning may appear, how long code may be.

``quantization <- analysis <- atomic_files <- reporting, export <- callbacks <- tuning <- cli``: a layer imports itself
and what stands left of it, but ``export`` not ``reporting``. So do the parts of a layer. No files, folders or layers
import one another in a circle, whether at run time, inside a function or for type checkers only.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "lightning_qat"
ROOT = Path(__file__).parents[1] / PACKAGE
LAYERS = ("quantization", "analysis", "atomic_files", "reporting", "export", "callbacks", "tuning", "cli")
PARTS = {  # folders, and files beside them; "" are the other files
    "quantization": (
        "errors",
        "reading",
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
        "mixed_precision",
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
LIGHTNING_LAYERS = ("callbacks", "tuning", "cli")
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")
DEPRECATED = ("torch.ao", "torch.quantization")
SIBLINGS = ("reporting", "export")  # neither imports the other
MAX_LINES = 300
TABLES = ("quantization/functions/function_table.py", "quantization/functions/float_functions.py")  # may be longer
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 12
LETTERS = ", ".join("abcdefghijklmnopqrstuvwxyz"[: MAX_PARAMETERS + 1])
_ENTRY = "a public entry point: its arguments are what users configure"
LONG_FUNCTIONS = {
    "analysis/sensitivity/sensitivity.py:sensitivity": _ENTRY,
    "callbacks/sensitivity_analysis.py:__init__": _ENTRY,
    "tuning/tune.py:tune": _ENTRY,
    "callbacks/quantization_aware_training.py:__init__": _ENTRY,
    "quantization/fake_quant/fake_quantize.py:__init__": "the configuration of a point: one argument for each field",
    "callbacks/passes/evaluation.py:log": "takes what LightningModule.log takes",
}
"""Functions that may take more parameters or have more lines, with the reason."""


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
        ("export/a.py", "import lightning_qat.reporting.tables", "export must not import reporting"),
        ("reporting/a.py", "from ..export import x", "reporting must not import export"),
        ("callbacks/a.py", "import lightning_qat.cli", "callbacks must not import cli"),
        ("analysis/a.py", "from lightning_qat import insert", "analysis must not import the top level"),
        ("quantization/a.py", "import lightning", "may import lightning"),
        (
            "analysis/a.py",
            "from lightning.pytorch import Trainer",
            "may import lightning",
        ),
        (
            "reporting/a.py",
            "import pytorch_lightning as pl",
            "may import pytorch_lightning",
        ),
        ("analysis/a.py", "import importlib\nimportlib.import_module('lightning')", "may import lightning"),
        ("callbacks/a.py", "import torch.ao.quantization", "torch.ao is deprecated"),
        ("quantization/a.py", "from torch import ao", "torch.ao is deprecated"),
        ("quantization/a.py", "import torch\nx = torch.ao.quantization.fuse_modules", "torch.ao is deprecated"),
        ("quantization/a.py", "x = 1\n" * (MAX_LINES + 1), f"{MAX_LINES + 1} lines"),
        (
            "quantization/a.py",
            "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES,
            f"f has {MAX_FUNCTION_LINES + 1} lines",
        ),
        ("quantization/a.py", f"def f({LETTERS}): ...", f"f takes {MAX_PARAMETERS + 1} parameters"),
        ("reporting/a.py", "from lightning_qat.export import x", "reporting must not import export"),
        ("export/a.py", "from lightning_qat.reporting import x", "export must not import reporting"),
        (
            "callbacks/passes/a.py",
            "from lightning_qat.callbacks import calibration",
            "passes must not import calibration",
        ),
        ("callbacks/trainer/a.py", "from ..passes import x", "trainer must not import passes"),
        (
            "quantization/numerics/a.py",
            "from lightning_qat.quantization.region.regions import x",
            "numerics must not import region (order: errors <- reading <- ranks <- modules <- numerics",
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


@pytest.mark.parametrize(
    ("files", "circle"),
    [
        (
            {
                "analysis/a.py": "from lightning_qat.analysis.b import x",
                "analysis/b.py": "def f():\n    from lightning_qat.analysis import a",
            },
            "analysis.a -> lightning_qat.analysis.b -> lightning_qat.analysis.a",
        ),
        (
            {
                "analysis/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import x",
                "analysis/b.py": "from .c import x",
                "analysis/c.py": "from .a import x",
            },
            "analysis.b -> lightning_qat.analysis.a -> lightning_qat.analysis.c -> lightning_qat.analysis.b",
        ),
        (  # no file is in a circle, but two folders of one level are
            {
                "analysis/statistics/a.py": "from lightning_qat.analysis.b import x",
                "analysis/b.py": "from lightning_qat.analysis.statistics.c import x",
                "analysis/statistics/c.py": "",
            },
            "lightning_qat.analysis.statistics",
        ),
    ],
)
def test_planted_circle_is_reported(tmp_path: Path, files: dict[str, str], circle: str) -> None:
    found = [text for text in violations(package_with(tmp_path, files)) if "circle" in text]
    assert len(found) == 1, found
    names = circle.split(" -> ")
    assert all(name in found[0] for name in names), found


def violations(root: Path) -> list[str]:
    """Sentences ``file:line: what is wrong`` for every rule that a file of the package at ``root`` breaks."""
    found = circles(root)
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
            tree = ast.parse(source, str(path))
            names = imported_names(tree, package)
            problems = [(line, text) for line, name in names for text in [broken_rule(layer, part, name)] if text]
            problems += long_functions(tree, relative.as_posix())
        if (lines := len(source.splitlines())) > MAX_LINES and relative.as_posix() not in TABLES:
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
        if LAYERS.index(imported) > LAYERS.index(layer) or {imported, layer} == set(SIBLINGS):
            return f"imports {name}; {layer} must not import {imported} (order: {' <- '.join(LAYERS)})"
        order, other = PARTS.get(layer, ()), "".join(rest.split(".")[1:2])
        later = order[order.index(part) + 1 :] if part in order else ()
        if imported == layer and other and (other if other in order else "") in later:
            return f"imports {name}; {part or layer} must not import {other} (order: {' <- '.join(order)})"
    elif imported != "__version__" and layer != "cli":
        return f"imports {name}; {layer} must not import the top level, which imports every layer"
    return None


def long_functions(tree: ast.AST, file: str) -> Iterator[tuple[int, str]]:
    """Functions with too many lines of code (the docstring does not count) or too many parameters."""
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or f"{file}:{node.name}" in LONG_FUNCTIONS:
            continue
        docstring = ast.get_docstring(node, clean=False)
        lines = (node.end_lineno or 0) - node.lineno + 1 - (len(docstring.splitlines()) if docstring else 0)
        if lines > MAX_FUNCTION_LINES:
            yield node.lineno, f"{node.name} has {lines} lines; split it: {MAX_FUNCTION_LINES} is the limit"
        taken = len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
        if taken > MAX_PARAMETERS:
            yield node.lineno, f"{node.name} takes {taken} parameters; {MAX_PARAMETERS} is the limit"


def circles(root: Path) -> list[str]:
    """One sentence for each level (files, parts, layers) at which something imports itself through others."""
    files = {module_name(path, root): path for path in root.rglob("*.py")}
    imports: dict[str, set[str]] = {}
    for module, path in files.items():
        package = (PACKAGE, *path.relative_to(root).parent.parts)
        names = (name for _, name in imported_names(ast.parse(path.read_text(encoding="utf-8")), package))
        imports[module] = {found for name in names if (found := longest_module(name, files)) not in ("", module)}
    found = {}
    for level, depth in (("files", None), ("parts", 3), ("layers", 2)):
        graph: dict[str, set[str]] = {}
        for module, others in imports.items():
            name = room(module, files, depth)
            graph.setdefault(name, set()).update(room(other, files, depth) for other in others)
            graph[name].discard(name)
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            found[level] = f"{PACKAGE}: {level} import one another in a circle: {' -> '.join(error.args[1])}"
    return [found[level] for level in ("files", "parts", "layers") if level in found][:1]


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join((PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts)))


def longest_module(name: str, files: dict[str, Path]) -> str:
    """The module that an imported dotted name is in, "" for what is not of the package."""
    while name and name not in files:
        name = name.rpartition(".")[0]
    return name


def room(module: str, files: dict[str, Path], depth: int | None) -> str:
    """What a module counts as at a level: itself, its folder in a layer (or the layer's own files), its layer."""
    parts = module.split(".")
    if (
        depth == 3
        and len(parts) == 3
        and files[module].name != "__init__.py"
        and parts[2] not in PARTS.get(parts[1], ())
    ):
        return ".".join((*parts[:2], "(files)"))
    return ".".join(parts[:depth])


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
