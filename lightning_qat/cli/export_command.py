"""``python -m lightning_qat export``: the quantized model of a checkpoint as a file for deployment, proved equal."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import lightning.pytorch as pl
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_qat.analysis.captured_calls import capture_calls
from lightning_qat.callbacks.analyses.chosen_samples import chosen_samples
from lightning_qat.callbacks.analyses.undisturbed_analysis import undisturbed_analysis
from lightning_qat.callbacks.exported_metrics import exported_metrics
from lightning_qat.callbacks.onnx_export import export_onnx
from lightning_qat.callbacks.passes.run_step import run_step
from lightning_qat.callbacks.trainer.output_directory import shared_directory
from lightning_qat.cli.command import Command, add_quantization_options
from lightning_qat.cli.project import Project
from lightning_qat.cli.run_project import run_project
from lightning_qat.export.encodings.written_encodings import FILE_NAMES, write_encodings
from lightning_qat.export.program_export import export_program
from lightning_qat.export.verification_result import ExportResult
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.modules.call import Call
from lightning_qat.quantization.region.region import Region
from lightning_qat.reporting.console import print_note, show
from lightning_qat.reporting.files import write_result


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format",
        choices=list(_WRITERS),
        default="onnx",
        help="onnx (the default), program (an ExportedProgram of torch), or encodings: qnn, horizon, tidl",
    )
    parser.add_argument("--opset", type=int, default=21, metavar="N", help="of ONNX: 21, or 20 for 8-bit models")
    parser.add_argument(
        "--dynamic-batch",
        action="store_true",
        help="axis 0 of every input may have any length, not that of the example",
    )
    parser.add_argument("--no-verify", action="store_true", help="do not prove that the file is what was trained")
    add_quantization_options(parser)


def _run(options: argparse.Namespace, script: str | None, arguments: list[str]) -> int:
    write = _WRITERS[options.format]

    def export(project: Project) -> tuple[list[_Written], list[str]]:
        def work(trainer: pl.Trainer, module: pl.LightningModule) -> list[_Written]:
            directory = options.output or shared_directory(trainer) / "export"
            with undisturbed_analysis(trainer, module, "export") as regions:
                batch = chosen_samples(trainer, module, None)
                calls = capture_calls(regions, partial(run_step, trainer, module, batch, "validate"))
                missing = [path for path in regions if not calls[path]]
                if missing:
                    raise ConfigurationError(
                        f"the validation step does not call {', '.join(missing) or 'the model'}: from Python, "
                        "lightning_qat.export_onnx(model, path, example_inputs) takes inputs of your own."
                    )
                names = {path: path if len(regions) > 1 else "model" for path in regions}
                written = {
                    path: write(region, calls[path][0], directory / names[path], options)
                    for path, region in regions.items()
                }
            return _with_task(trainer, module, regions, written, options)

        return project.before_training(work, options.calibration_batches), project.notes

    results, notes = run_project(script, arguments, export, options.ckpt_path)
    for note in notes:
        print_note(note)
    for result in results:
        if isinstance(result, str):
            print_note(result)
        else:
            show(result, file=str(Path(result.file).with_name(f"{Path(result.file).stem}_export.txt")))
    return 0


_Written: TypeAlias = ExportResult | str
"""What was written: a result to show, or a sentence."""


def _onnx(region: Region, call: Call, file: Path, options: argparse.Namespace) -> _Written:
    shapes = _batch_axes(region, call) if options.dynamic_batch else None
    return export_onnx(region, f"{file}.onnx", call, shapes, options.opset, not options.no_verify)


def _with_task(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    regions: Mapping[str, Region],
    written: Mapping[str, _Written],
    options: argparse.Namespace,
) -> list[_Written]:
    """Add what the task measures, and write the reports again."""
    results = {path: result for path, result in written.items() if isinstance(result, ExportResult)}
    if options.no_verify or not results:
        return list(written.values())
    try:
        rows = exported_metrics(trainer, module, regions, {path: Path(r.file) for path, r in results.items()})
    except ConfigurationError as error:
        return [*written.values(), f"The metrics of the validation data were not compared: {error}"]
    found: list[_Written] = []
    for result in results.values():
        file = Path(result.file)
        found.append(dataclasses.replace(result, task=rows))
        write_result(found[-1], file.parent, f"{file.stem}_export", formats=("txt", "json"))  # type: ignore[arg-type]
    return found


def _program(region: Region, call: Call, file: Path, options: argparse.Namespace) -> _Written:
    shapes = _batch_axes(region, call) if options.dynamic_batch else None
    export_program(region, call, f"{file}.pt2", shapes, not options.no_verify)
    proof = "not compared with the model" if options.no_verify else "its outputs equal those of the model, bit for bit"
    return f"{file}.pt2: for torch.export.load, without lightning_qat; {proof}."


def _encodings(region: Region, call: Call, file: Path, options: argparse.Namespace) -> _Written:
    name = FILE_NAMES[options.format]
    found = write_encodings(
        region, file.with_name(name if file.name == "model" else f"{file.name}.{name}"), options.format
    )
    lost = sorted({one.what for one in found.not_held})
    return f"{found.file}: {found.points} entries. " + (f"It has no place for {'; '.join(lost)}." if lost else "")


_WRITERS: Mapping[str, Callable[[Region, Call, Path, argparse.Namespace], _Written]] = {
    "onnx": _onnx,
    "program": _program,
    "qnn": _encodings,
    "horizon": _encodings,
    "tidl": _encodings,
}


def _batch_axes(region: Region, call: Call) -> Any:
    """Dynamic shapes in which axis 0 of every tensor is the batch."""

    def shape(value: Any) -> Any:
        return {0: "batch"} if isinstance(value, Tensor) and value.dim() else None

    if not call.kwargs:
        return tree_map(shape, tuple(call.args))
    bound = inspect.signature(region.target.forward).bind(*call.args, **call.kwargs)
    return tree_map(shape, dict(bound.arguments))


EXPORT = Command(
    name="export",
    summary="the quantized model of a checkpoint as a file for deployment, proved to be what was trained",
    description="""Export the quantized model of a checkpoint, with the first batch of the validation data.

Written to <output>, with several targets one file for each, under its name:

  onnx     model.onnx and its report, model_export.txt and .json. Every quantizer of the file is computed by onnxruntime
           from the same input as in the model: all codes have to be equal. The validation data are evaluated in float,
           with fake-quant and with onnxruntime. It needs the extra: pip install 'lightning-qat[onnx]'.
  program  model.pt2, for torch.export.load, also where lightning_qat is not installed.
  qnn      model.encodings: encodings JSON 2.0.0 of AIMET, for QNN.
  horizon  quant_config.json of HMCT: the type that each node of model.onnx reads.
  tidl     quant_params.prototxt: the ranges of layers for TI's TIDL.
""",
    example=" --ckpt_path best.ckpt --dynamic-batch",
    add_options=_add_options,
    run=_run,
)
