"""What torch says about a model that cannot be exported, as one sentence with the line of the user's code."""

from __future__ import annotations

import os
import re
import traceback
from typing import cast

from torch import nn
from torch.export import ExportedProgram
from torch.fx import Node

from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.interception.code_locations import is_installed, user_location

_DATA_DEPENDENT = ("GuardOnDataDependentSymNode", "DataDependent", "data-dependent", "Dynamic control flow")
_CAUSES = 8


class ExportMismatchError(RuntimeError):
    """An exported model that computes something else than the region; the message names the first difference."""


def capture_error(model: nn.Module, error: Exception) -> ConfigurationError:
    """Return the error about a forward that torch.export cannot follow.

    Args:
        model: whose forward it is.
        error: what torch.export raised.
    """
    where = _location(error)
    text = f"{type(error).__name__} {error}"
    if any(word in text for word in _DATA_DEPENDENT):
        return ConfigurationError(
            f"the forward of {type(model).__name__} depends on the values of its tensors at {where}: an exported graph "
            "is the same for all inputs. Use torch.where in place of the branch, torch.cond, or a number that is "
            "known before the forward."
        )
    unknown = re.search(r"Found <class '([^']+)'> in output, which is not a known type", text)
    if unknown:
        return ConfigurationError(
            f"{type(model).__name__} returns a {unknown.group(1)}, which torch.export does not know: return tensors "
            "only. A language model of transformers returns no cache with use_cache=False among the example inputs, or "
            "in its config."
        )
    place = "" if where == "?" else f"at {where}, "
    return ConfigurationError(
        f"{type(model).__name__} cannot be exported: {place}torch.export says: {_first_line(error)}"
    )


def conversion_error(model: nn.Module, program: ExportedProgram, error: Exception) -> ConfigurationError:
    """Return the error about an op that ONNX cannot express.

    Args:
        model: the exported model.
        program: what torch.export made of it.
        error: what torch.onnx raised.
    """
    causes = _causes(error)
    node = re.search(r"translating node %(\w+)", "\n".join(map(str, causes)))
    found = _node(program, node.group(1)) if node else None
    if found is None:
        return ConfigurationError(f"{type(model).__name__} cannot be expressed in ONNX: {_first_line(causes[-1])}")
    places = re.findall(r'File "([^"]+)", line (\d+)', str(found.meta.get("stack_trace", "")))
    place = next((f"{file}:{line}" for file, line in reversed(places) if not is_installed(file)), "?")
    place = place.removeprefix(os.getcwd() + os.sep)
    return ConfigurationError(
        f"{type(model).__name__} cannot be expressed in ONNX, which has nothing for the op {found.target} at {place}. "
        "Replace this op by others, or export a region that does not contain it."
    )


def _node(program: ExportedProgram, name: str) -> Node | None:
    """A node of the program as torch.onnx sees it, which splits ops up first."""
    for one in (program.run_decompositions(), program):
        for node in one.graph.nodes:
            if node.name == name:
                return cast(Node, node)
    return None


def _location(error: BaseException) -> str:
    """The innermost line of the user's code that the error went through."""
    for cause in reversed(_causes(error)):
        frames = [frame for frame, _ in traceback.walk_tb(cause.__traceback__)]
        place = user_location(frames[-1]) if frames else "?"
        if place != "?":
            return place
    return "?"


def _causes(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = [error]
    while len(found) < _CAUSES:
        cause = found[-1].__cause__ or found[-1].__context__
        if cause is None:
            break
        found.append(cause)
    return found


def _first_line(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if line.endswith(".") else f"{line}."
