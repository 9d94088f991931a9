"""What verifying an exported model found: frozen rows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_qat.analysis.results import Block, Result
from lightning_qat.quantization.counts import number_of

EXACT_MATMUL = "session.qdq_matmulnbits_accuracy_level"
"""With "1", onnxruntime keeps the input of a MatMul with quantized weights as it is. Without, it makes 8 bits of it."""
ROUNDED_BIASES = "WeightBiasQuantization"
"""The optimizer of onnxruntime that makes int32 codes of biases, of convolutions that it computes in float too."""
MARGIN = 4.0
"""Differences from end to end vary by factors, as a code that flips makes others flip. Within this factor they are the
same, and so they are below a tenth of what quantization itself changes, where only some codes have flipped."""
INT8_FAULT = "output_dtype INT8 does not match y_zero_point"
"""What onnxruntime says when it has added a QuantizeLinear of int8 in opset 21 behind a Reshape that it made itself."""


@dataclass(frozen=True)
class QuantizerRow:
    """One quantizer of the exported graph, computed by onnxruntime without optimizations.

    Args:
        point: the point; of one that runs several times in a forward, with ``#1``, ``#2``, ... from the second on.
        role: ``weight`` or ``activation``.
        dtype: type of the codes.
        codes: how many codes were compared.
        equal: share of codes that equal those of the region, for the same input of the quantizer. It is 1.
        equal_behind_op: of an activation: the share for the same input of the ops in front of the quantizer, whose
            floating-point sums may differ in their last bits. None for a weight.
        steps_behind_op: the largest difference there, in steps of the scale.
    """

    point: str
    role: str
    dtype: str
    codes: int
    equal: float
    equal_behind_op: float | None = None
    steps_behind_op: int | None = None


@dataclass(frozen=True)
class OutputRow:
    """One output of the exported model, from end to end, under one setting of onnxruntime's optimizations.

    Args:
        output: name of the output.
        optimization: ``off``, ``basic``, ``full`` (what onnxruntime does unless told otherwise); ``basic, float
            biases``, without :data:`ROUNDED_BIASES`; or ``full, exact MatMul``, with :data:`EXACT_MATMUL`.
        equal_codes: share of equal codes; None for an output that is not quantized.
        steps: the largest difference in steps of its scale; None for an output that is not quantized.
        difference: the largest absolute difference to the region's output; ``nan`` if one has NaN where the other has
            a number.
        quantization: the largest absolute difference that quantization itself makes to the float output.
        mean_difference: the mean absolute difference, which single codes that flip hardly change.
        mean_quantization: the same of quantization itself.
        problem: why onnxruntime did not compute it; empty if it did.
    """

    output: str
    optimization: str
    equal_codes: float | None
    steps: int | None
    difference: float
    quantization: float
    mean_difference: float
    mean_quantization: float
    problem: str = ""


@dataclass(frozen=True)
class OpRow:
    """One convolution, matrix product or addition, as onnxruntime computes it with all optimizations.

    Args:
        op: name of its node.
        kind: ``convolution``, ``matrix product`` or ``addition``.
        integer: whether it is computed on integers.
        cause: why it is not; empty if it is.
    """

    op: str
    kind: str
    integer: bool
    cause: str = ""


@dataclass(frozen=True)
class TaskRow:
    """One metric of the validation data.

    Args:
        metric: its name, as it is logged.
        in_float: its value in float.
        fake_quant: its value with fake-quant.
        onnxruntime: its value where onnxruntime computes the exported file, with all optimizations.
    """

    metric: str
    in_float: float
    fake_quant: float
    onnxruntime: float


@dataclass(frozen=True)
class ExportResult(Result[QuantizerRow]):
    """An exported model, and the proof that it computes what the region computes.

    Args:
        rows: every quantizer of the graph.
        outputs: every output, under each setting of the optimizations.
        file: the file that was written.
        opset: of ONNX.
        verified: whether the rows were computed.
        folded: batch norms that are part of the layer in front of them.
        kept: fused batch norms that are ops of their own, with the reason.
        in_float: points without a scale, which are in float as in the region.
        shared: quantizers that the graph computes once, as another one has the same input and scale.
        integer_ops: convolutions, matrix products and additions, as onnxruntime computes them on this machine's CPU.
        bytes: size of the file.
        float_bytes: size of the same graph without quantizers; 0 if not known, as is the time.
        milliseconds: time of one forward by onnxruntime on this machine, with all optimizations.
        float_milliseconds: the same of the graph without quantizers.
        task: what the validation data measure, where a Trainer is at hand.
    """

    outputs: tuple[OutputRow, ...] = ()
    file: str = ""
    opset: int = 0
    verified: bool = True
    folded: tuple[str, ...] = ()
    kept: tuple[tuple[str, str], ...] = ()
    in_float: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    integer_ops: tuple[OpRow, ...] = ()
    bytes: int = 0
    float_bytes: int = 0
    milliseconds: float = 0.0
    float_milliseconds: float = 0.0
    task: tuple[TaskRow, ...] = ()

    title: ClassVar[str] = "ONNX export"
    shown: ClassVar[tuple[str, ...]] = (
        "point",
        "role",
        "dtype",
        "codes",
        "equal",
        "equal_behind_op",
        "steps_behind_op",
    )

    @property
    def note(self) -> str:
        """What was proved."""
        if not self.verified:
            return f"{self.file}: not verified, as verify=False."
        codes = sum(row.codes for row in self.rows)
        parts = [
            f"{self.file}: all {codes} codes of {len(self.rows)} quantizers equal those of the region for the same "
            "input of the quantizer (onnxruntime, optimizations off)."
        ]
        behind = [row for row in self.rows if row.equal_behind_op is not None]
        if behind:
            least = min(behind, key=lambda row: (row.equal_behind_op or 0.0, -(row.steps_behind_op or 0)))
            most = max(row.steps_behind_op or 0 for row in behind)
            share = 100 * (least.equal_behind_op or 0.0)
            parts.append(
                f"With the ops in front of them, which sum in another order, {share:.4g} % of the codes are equal at "
                f"{least.point}, the worst one; the largest difference is {number_of(most, 'step')}."
            )
        parts += self._optimizations()
        parts += [
            f"{row.metric}: {row.in_float:.6g} in float, {row.fake_quant:.6g} with fake-quant, "
            f"{row.onnxruntime:.6g} with onnxruntime."
            for row in self.task
        ]
        parts += self._cost()
        if self.kept:
            parts.append("Not folded: " + "; ".join(f"{name}, as {reason}" for name, reason in self.kept) + ".")
        return " ".join(parts)

    def integer_counts(self) -> dict[str, tuple[int, int]]:
        """Map each kind of op to how many onnxruntime computes on integers, and how many there are."""
        kinds = dict.fromkeys(row.kind for row in self.integer_ops)
        return {
            kind: (
                sum(row.integer for row in self.integer_ops if row.kind == kind),
                sum(row.kind == kind for row in self.integer_ops),
            )
            for kind in kinds
        }

    def _cost(self) -> list[str]:
        """What onnxruntime computes on integers, the size and the time."""
        found = []
        if self.integer_ops:
            counts = ", ".join(f"{some} of {count} {kind}s" for kind, (some, count) in self.integer_counts().items())
            found.append(f"On this CPU, onnxruntime computes {counts} on integers and the others in float.")
        if self.float_bytes:
            found.append(
                f"The file takes {self.bytes / 1000:.4g} kB, and the same model in float {self.float_bytes / 1000:.4g}."
            )
        if self.float_milliseconds:
            found.append(
                f"A forward takes {self.milliseconds:.3g} ms with onnxruntime on this machine, and "
                f"{self.float_milliseconds:.3g} ms in float."
            )
        return found

    def _optimizations(self) -> list[str]:
        """Where onnxruntime's optimizations change the result, and why if the cause is known."""
        refused = {row.optimization: row.problem for row in self.outputs if row.problem}
        if any(INT8_FAULT in why for why in refused.values()):
            return [
                "onnxruntime does not load the file with full optimization. This is a fault of onnxruntime with int8 "
                "in opset 21 (its issue 25526): export with opset=20 if all types have 8 bits, or open the session "
                'with disabled_optimizers=["QDQPropagationTransformer"].'
            ]
        if refused:
            name, why = next(iter(refused.items()))
            return [f"onnxruntime cannot run the file with optimizations {name}: {why}"]
        settings = ("off", "basic", "basic, float biases", "full", "full, exact MatMul")
        off, basic, unrounded, full, exact = (self._worst(name) for name in settings)
        found = []
        if self._is_more(basic, off):
            found.append(
                f"Basic optimization changes the result: the mean difference is {basic:.3g} instead of {off:.3g}."
            )
            if unrounded < basic / 2:
                found.append(
                    "The cause: onnxruntime rounds biases to whole multiples of the input's scale times the weight's, "
                    "and codes that lie near a tie flip. Open the session with "
                    f'disabled_optimizers=["{ROUNDED_BIASES}"]: then the mean difference is {unrounded:.3g}.'
                )
        if self._is_more(full, basic):
            found.append(
                f"Full optimization changes more than basic: the mean difference is {full:.3g} instead of {basic:.3g}."
            )
            if exact < full / 2:
                found.append(
                    "The cause: onnxruntime makes 8 bits of the input of each MatMul with quantized weights "
                    f'(MatMulNBits). Open the session with add_session_config_entry("{EXACT_MATMUL}", "1"): then the '
                    f"mean difference is {exact:.3g}."
                )
        return found

    def _is_more(self, difference: float, before: float) -> bool:
        quantization = max((row.mean_quantization for row in self.outputs if not row.problem), default=0.0)
        return difference > MARGIN * before and difference > quantization / 10

    def _worst(self, optimization: str) -> float:
        return max((row.mean_difference for row in self.outputs if row.optimization == optimization), default=0.0)

    def blocks(self) -> tuple[Block, ...]:
        """Return the outputs only, without columns that are empty: all rows of points say that codes are equal."""
        block = self._outputs(self.title)
        filled = [c for i, c in enumerate(block.columns) if any(row[i] not in (None, "") for row in block.rows)]
        return (block.only([c for c in filled if not c.startswith("mean_")]),)

    def full_blocks(self) -> tuple[Block, ...]:
        """Return the outputs, every quantizer, and which ops are computed on integers."""
        ops = [dataclasses.asdict(row) for row in self.integer_ops]
        columns = [field.name for field in dataclasses.fields(OpRow)]
        return (
            self._outputs(self.title),
            dataclasses.replace(super().full_blocks()[0], title="Quantizers", note=""),
            *([Block.of("Ops on integers", columns, ops)] if ops else []),
        )

    def _outputs(self, title: str) -> Block:
        rows: list[dict[str, Any]] = [dataclasses.asdict(row) for row in self.outputs]
        columns = [field.name for field in dataclasses.fields(OutputRow)] if rows else []
        return Block.of(title, columns, rows, self.note)
