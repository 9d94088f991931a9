"""Writes ``quantization/functions/torch_functions.md`` (``make tables``).

The list of functions is that of ``torch.overrides``, so it belongs to one torch release.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import get_overridable_functions, get_testing_overrides, resolve_name

from lightning_qat.quantization.functions.canonical_kinds import canonical_kind
from lightning_qat.quantization.functions.float_functions import FLOAT_FUNCTIONS
from lightning_qat.quantization.functions.function_lookup import spec_of
from lightning_qat.quantization.functions.function_table import SOMETIMES_QUANTIZED, TABLE
from lightning_qat.quantization.functions.op_spec import NO_FLOAT_RESULT, TRUE_OR_FALSE, OpSpec

DOCUMENT = Path(__file__).parents[3] / "lightning_qat" / "quantization" / "functions" / "torch_functions.md"
ROW_FILES = "lightning_qat/quantization/functions/function_table.py (or float_functions.py, with a reason)"

CLASSES = {
    "quantized": "Operands, weights and the result have quantization points.",
    "joins": "Brings tensors together. A point on the result only where their scales differ.",
    "passes through": "Moves or selects values, which stay on the grid they are on: no point.",
    "passes through, or quantized": "Moves values; quantized where an option fills with a number other than zero, or "
    "with two tensors.",
    "creates": "Makes a tensor that does not depend on the values of its operands: exact; a point where it joins data.",
    "decomposed": "Runs as the functions it is made of, each with its own row.",
    "float": "Stays in float for the reason given; what reads the result has an input point.",
    "returns no float tensor": "Comparisons, indices, Python numbers, attributes: nothing to quantize.",
}


def overridable_functions() -> dict[str, Callable[..., Any]]:
    """Every function that can meet a torch function mode, by its public name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own deprecated functions while listing them
        listed = [f for functions in get_overridable_functions().values() for f in functions]
        functions = dict.fromkeys([*listed, *get_testing_overrides()])
        return dict(sorted((_public_name(function), function) for function in functions))


def without_row(functions: dict[str, Callable[..., Any]]) -> list[str]:
    """Sentences that say which functions have no row, and where to add it."""
    return [
        f"{name} has no row: decide what quantization does with it, add {canonical_kind(function)!r} to {ROW_FILES} "
        "and a sample to tests/quantization/functions/function_samples.py, and run `make tables`"
        for name, function in functions.items()
        if canonical_kind(function) not in TABLE
    ]


def class_of(spec: OpSpec) -> str:
    """The class of a row, for people."""
    if spec.role == "float":
        return "returns no float tensor" if spec.reason in (NO_FLOAT_RESULT, TRUE_OR_FALSE) else "float"
    if spec.kind in SOMETIMES_QUANTIZED:
        return "passes through, or quantized"
    return {
        "quantize": "quantized",
        "join": "joins",
        "pass": "passes through",
        "create": "creates",
        "composite": "decomposed",
    }[spec.role]


def document(functions: dict[str, Callable[..., Any]]) -> str:
    """The function table as Markdown."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, function in functions.items():
        names[canonical_kind(function)].append(name)
    rows: dict[str, list[OpSpec]] = defaultdict(list)
    for kind in sorted(names, key=str.lower):
        spec = spec_of(functions[names[kind][0]])
        rows[class_of(spec)].append(spec)
    lines = [
        "# What happens to each torch function",
        "",
        f"All {len(functions)} functions of torch {_release()} that a torch function mode can meet "
        "(`torch.overrides`), by what quantization does with them. Functions on one line share a row and the canonical "
        "kind at its start, the `op_type` of overrides. Functions of a newer torch run in float, and the plan says so.",
        "",
        "Written by `make tables` from `function_table.py` and `float_functions.py`. Do not edit.",
        "",
        "| class | kinds | functions |",
        "|---|---:|---:|",
    ]
    for title in CLASSES:
        count = sum(len(names[spec.kind]) for spec in rows[title])
        lines.append(f"| [{title}](#{title.replace(',', '').replace(' ', '-')}) | {len(rows[title])} | {count} |")
    for title, meaning in CLASSES.items():
        lines += ["", f"## {title}", "", meaning]
        by_reason: dict[str, list[OpSpec]] = defaultdict(list)
        for spec in rows[title]:
            by_reason[spec.reason if title == "float" else ""].append(spec)
        for reason in sorted(by_reason):
            lines += ["", f"### {reason}", ""] if reason else [""]
            lines += [_line(spec, names[spec.kind]) for spec in by_reason[reason]]
    return "\n".join(lines) + "\n"


def documented_release(text: str) -> str:
    """The torch release a document was written for."""
    return text.split("functions of torch ", 1)[1].split(" ", 1)[0]


def _release() -> str:
    return ".".join(torch.__version__.split(".")[:2])


def _line(spec: OpSpec, names: Iterable[str]) -> str:
    functions = ", ".join(f"`{name}`" for name in names)
    notes = []
    if spec.weights:
        notes.append(f"weights: {', '.join(spec.weights)}")
    if spec.operands is not None and spec.role == "quantize":
        kept = [name for name in spec.parameters if name not in (*spec.operands, *spec.weights)]
        notes += [f"in float: {', '.join(kept)}"] if kept else []
    if spec.reason and spec.role != "float":
        notes.append(spec.reason)
    note = f" ({'; '.join(notes)})" if notes else ""
    return f"- **{spec.kind}**{note}: {functions}"


def _public_name(function: Callable[..., Any]) -> str:
    name = resolve_name(function)
    if name is not None:
        return str(name)
    module = getattr(function, "__module__", None) or "torch"
    return f"{module.replace('torch._C._nn', 'torch.nn.functional')}.{getattr(function, '__name__', function)}"


def main() -> None:
    functions = overridable_functions()
    missing = without_row(functions)
    if missing:
        raise SystemExit("\n".join(missing))
    temporary = DOCUMENT.with_suffix(".new")
    temporary.write_text(document(functions), encoding="utf-8")
    temporary.replace(DOCUMENT)
    print(f"wrote {DOCUMENT}: {len(functions)} functions, {len(FLOAT_FUNCTIONS)} float rows")


if __name__ == "__main__":
    main()
