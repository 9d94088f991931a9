"""Models that a single ONNX file cannot hold: their weights go to a file beside it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from lightning_qat.atomic_files import NotWrittenError, remove_left_over, unfinished_path
from lightning_qat.quantization.errors import ConfigurationError

_LARGEST_FILE = 2**31 - 1
_SMALL = 1024
"""Bytes below which a tensor stays in the file: onnx's shape inference reads the small ones."""


def is_large(proto: Any) -> bool:
    """Whether the weights of a model have to go to a file of their own."""
    return sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > _LARGEST_FILE // 2


def data_file(file: Path) -> Path:
    """Return the file for the weights of a model."""
    return file.with_name(f"{file.name}.data")


def with_shapes(proto: Any) -> Any:
    """Infer the shapes of all values of a model, whatever its size.

    Args:
        proto: the ``onnx.ModelProto``.
    """
    import onnx

    if not is_large(proto):
        return onnx.shape_inference.infer_shapes(proto, data_prop=True)
    held = {tensor.name: tensor.raw_data for tensor in proto.graph.initializer if len(tensor.raw_data) > _SMALL}
    for tensor in proto.graph.initializer:
        if tensor.name in held:
            tensor.ClearField("raw_data")
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    for tensor in inferred.graph.initializer:
        if tensor.name in held:
            tensor.raw_data = held[tensor.name]
    return inferred


def check_onnx(proto_or_path: Any) -> None:
    """Check a model, or a file.

    Raises:
        ConfigurationError: it is not valid.
    """
    import onnx

    try:
        onnx.checker.check_model(proto_or_path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        line = " ".join(str(error).split())
        raise ConfigurationError(
            f"torch.onnx made a graph that is not valid ONNX, so nothing is written: {line}"
        ) from error


def write_with_data(proto: Any, path: Path) -> Path:
    """Write a model and the file with its weights, and move both into place. The model keeps its weights in memory.

    A file of the same name is removed before its weights are replaced: killed between the two, there is no model, and
    never one with the weights of another. What killed exports have left in the folder is removed.

    Args:
        proto: the ``onnx.ModelProto``.
        path: the file.

    Raises:
        NotWrittenError: a file cannot be written.
        ConfigurationError: the model is not valid.
    """
    import onnx

    data, folder = data_file(path), unfinished_path(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_left_over(path.parent)
        folder.mkdir()
        whole = type(proto)()
        whole.CopyFrom(proto)
        unfinished = folder / path.name
        onnx.save_model(
            whole,
            str(unfinished),
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            location=data.name,
            size_threshold=_SMALL,
        )
        check_onnx(str(unfinished))
        path.unlink(missing_ok=True)
        os.replace(unfinished.with_name(data.name), data)
        os.replace(unfinished, path)
    except OSError as error:
        raise NotWrittenError.of(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return path
