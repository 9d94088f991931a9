"""The rows of the function table against what torch's functions do (`function_samples.py`)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_qat.quantization.functions.canonical_kinds import canonical_kind
from lightning_qat.quantization.functions.function_lookup import PARALLEL, spec_of, specialise
from lightning_qat.quantization.functions.function_table import TABLE
from lightning_qat.quantization.functions.op_spec import OpSpec
from lightning_qat.quantization.modules.tensor_leaves import call_leaves, is_float, leaves
from tests.quantization.functions.document import (
    DOCUMENT,
    document,
    documented_release,
    overridable_functions,
    without_row,
)
from tests.quantization.functions.function_samples import NOT_SAMPLED, SAMPLES, Sample
from tests.quantization.functions.test_op_spellings import Calls
from tests.quantization.models import calibrated

IDS = [f"{sample.kind}-{number}" for number, sample in enumerate(SAMPLES)]


class Meeting(TorchFunctionMode):
    """Remembers the last call of one kind of function: its refined row, operands and results."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.spec: OpSpec | None = None
        self.operands: list[Tensor] = []
        self.results: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if canonical_kind(func) != self.kind:
            return func(*args, **kwargs)
        self.spec = specialise(spec_of(func), args, kwargs)
        self.operands = [t.detach().clone() for t in call_leaves(args, kwargs)]
        result = func(*args, **kwargs)
        self.results = [t.detach().clone() for t in leaves(list(result) if canonical_kind(func) == "iter" else result)]
        return result


def meet(sample: Sample, *inputs: Tensor) -> Meeting:
    torch.manual_seed(1)
    meeting = Meeting(sample.kind)
    with meeting, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated functions have a row too
        sample.function(*(x.clone() for x in inputs))
    assert meeting.spec is not None, f"{sample.kind} was not called"
    return meeting


def values(tensor: Tensor) -> set[float]:
    parts = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return set(parts.double().flatten().tolist())


def role_of(sample: Sample) -> str:
    spec = meet(sample, *sample.inputs).spec
    assert spec is not None
    return spec.role


BY_ROLE: dict[str, list[Any]] = {}
for _sample, _id in zip(SAMPLES, IDS, strict=True):
    BY_ROLE.setdefault(role_of(_sample), []).append(pytest.param(_sample, id=_id))
INT16 = {"activation": {"dtype": "int16", "observer": "minmax"}, "weight": {"dtype": "int16"}}


# -- the classes are true


@pytest.mark.parametrize("sample", BY_ROLE["pass"])
def test_data_movement_returns_values_of_its_first_operand(sample: Sample) -> None:
    """Or zero. Of the functions in PARALLEL the n-th result holds values of the n-th operand."""
    meeting = meet(sample, *sample.inputs)
    floats = [t for t in meeting.operands if is_float(t) or t.is_complex()]
    checked = 0
    for index, result in enumerate(meeting.results):
        if is_float(result) or result.is_complex():
            source = meeting.operands[index] if sample.kind in PARALLEL else floats[0]
            cast = source if source.is_complex() else source.to(result.dtype)
            assert values(result) <= values(cast) | {0.0}
            checked += 1
    assert checked


@pytest.mark.parametrize("sample", BY_ROLE["join"])
def test_joins_return_values_of_their_operands(sample: Sample) -> None:
    meeting = meet(sample, *sample.inputs)
    allowed = {0.0}.union(*(values(t) for t in meeting.operands))
    assert meeting.results
    assert all(values(result) <= allowed for result in meeting.results)
    assert sum(map(is_float, meeting.operands)) > 1


@pytest.mark.parametrize("sample", BY_ROLE["create"])
def test_created_tensors_do_not_depend_on_operands(sample: Sample) -> None:
    one, other = meet(sample, *sample.inputs), meet(sample, *(x + 1 for x in sample.inputs))
    assert one.results
    for a, b in zip(one.results, other.results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sample", BY_ROLE["quantize"])
def test_quantized_op_has_points_and_is_close_to_float_in_int16(sample: Sample) -> None:
    """A2: inputs and the output have a quantizer, and 16 bits cost little."""
    meeting = meet(sample, *sample.inputs)
    assert meeting.spec is not None
    module = Calls(lambda self, *args: sample.function(*args))
    torch.manual_seed(1)
    expected = sample.function(*(x.clone() for x in sample.inputs))
    torch.manual_seed(1)
    region = calibrated(module, *(x.clone() for x in sample.inputs), qconfig=INT16)
    ops = [op.name for op in region.graph.ops if op.kind == meeting.spec.kind]
    assert [p for p in region.plan.points if p.op in ops and p.role != "output"]
    outputs = [f"{op}.output" for op in ops if region.plan.status[op].status == "quantized"]
    reasons = [region.plan.float_points.get(name, "") for name in outputs if name not in region.points]
    assert outputs
    assert all(reason.startswith("high-precision output") and meeting.spec.gemm for reason in reasons)
    torch.manual_seed(1)
    assert sqnr(module(*(x.clone() for x in sample.inputs)), expected) > 60
    assert region.unplanned == {}


def sqnr(value: Tensor, reference: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB."""
    value, reference = value.detach(), reference.detach()
    noise = (value - reference).square().mean().clamp_min(1e-30)
    return float(10 * torch.log10(reference.square().mean() / noise))


def test_every_row_that_is_not_float_has_a_sample() -> None:
    sampled = {sample.kind for sample in SAMPLES} | {kind for kinds in NOT_SAMPLED for kind in kinds.split()}
    assert sorted(kind for kind, spec in TABLE.items() if spec.role != "float" and kind not in sampled) == []
    assert sorted(sampled - TABLE.keys()) == []


@pytest.mark.parametrize("function", [torch.dropout, torch.alpha_dropout, torch.feature_dropout])
def test_dropout_passes_in_training_too(function: Callable[..., Tensor]) -> None:
    """What it scales in training is noise on purpose, and nothing in inference."""
    assert spec_of(function).role == "pass"


# -- options that change the class


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.parametrize(
    ("role", "function"),
    [
        ("float", lambda x: torch.div(x, 0.3, rounding_mode="floor")),
        ("float", lambda x: x.new_tensor(x[0])),
        ("float", lambda x: x.clone().fill_(x[0])),
        ("create", lambda x: x.clone().fill_(0.5)),
        ("pass", lambda x: torch.as_tensor(x)),
        ("create", lambda x: torch.as_tensor([1.0])),
        ("join", lambda x: x.masked_fill(x > 0, x[0])),
        ("pass", lambda x: x.masked_fill(x > 0, torch.tensor(float("-inf")))),
        ("quantize", lambda x: unpacked(x, 0.5)),
        ("pass", lambda x: unpacked(x, 0.0)),
    ],
)
def test_options_decide_what_an_op_does_to_the_grid(role: str, function: Callable[[Tensor], Tensor]) -> None:
    seen: list[str] = []

    class Roles(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(specialise(spec_of(func), args, kwargs or {}).role)
            return func(*args, **(kwargs or {}))

    with Roles():
        function(torch.linspace(-1.0, 1.0, 5))
    assert seen[-1] == role


def unpacked(x: Tensor, padding: float) -> Tensor:
    return torch._VF._pad_packed_sequence(x, torch.tensor([3, 2]), True, padding, 3)[0]


def test_tensor_given_to_as_tensor_stays_data() -> None:
    """It is the same tensor: taken for a constant, it would become a weight of its consumer."""
    weight = torch.nn.Parameter(torch.randn(4, 4))
    module = Calls(lambda self, x: torch.as_tensor(x) @ self.w, w=weight)
    region = calibrated(module, torch.randn(3, 4))
    assert {p.name: p.role for p in region.plan.points} == {"matmul_0.input0": "input", "matmul_0.weight": "weight"}


def test_integers_made_of_quantized_values_are_new_values() -> None:
    """x.long().float() lies on the grid of integers, not on that of x."""
    module = Calls(lambda self, x: torch.sigmoid((torch.tanh(x) * 3).long().float()))
    region = calibrated(module, torch.randn(3, 4))
    assert region.plan.by_name["sigmoid_0.input0"].reason == "default; float_0 is not quantized"


# -- the table is complete, and so is the document


@pytest.fixture(scope="module")
def functions() -> dict[str, Callable[..., Any]]:
    return overridable_functions()


def test_every_torch_function_has_a_row(functions: dict[str, Callable[..., Any]]) -> None:
    """Done-when 3: a new torch function fails here, with a message that says where to add it."""
    missing = without_row(functions)
    assert not missing, "\n" + "\n".join(missing)
    assert len(functions) > 1000


def test_new_torch_function_is_reported_with_the_file_to_edit() -> None:
    def brand_new(x: Tensor) -> Tensor:
        return x

    (message,) = without_row({"torch.brand_new": brand_new, "torch.add": torch.add})
    assert message.startswith("torch.brand_new has no row")
    assert "add 'brand_new' to lightning_qat/quantization/functions/function_table.py" in message


def test_float_rows_have_a_reason() -> None:
    assert all(spec.reason for spec in TABLE.values() if spec.role == "float")
    assert all(kind == spec.kind for kind, spec in TABLE.items())


def test_document_is_that_of_the_table(functions: dict[str, Callable[..., Any]]) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    release = ".".join(torch.__version__.split(".")[:2])
    if documented_release(text) != release:
        pytest.skip(f"torch_functions.md lists the functions of torch {documented_release(text)}, this is {release}")
    assert text == document(functions), "the document is out of date: run `make tables`"


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (torch.ops.aten.add.Tensor, "add"),
        (torch.ops.aten.mul, "mul"),
        (torch.Tensor.__rfloordiv__, "rfloor_divide"),
        (torch.Tensor.__ilshift__, "bitwise_left_shift"),
        (torch.Tensor.__float__, "__float__"),
        (torch.Tensor.float, "float"),
        (torch.special.expit, "sigmoid"),
        (torch.linalg.vector_norm, "norm"),
        (torch.nn.functional.logsigmoid, "logsigmoid"),
        (torch.Tensor.normal_, "normal_"),
        (torch.normal, "normal"),
        (torch.Tensor.data.__get__, "data"),  # type: ignore[attr-defined]
        (torch.arctan2, "atan2"),
        (torch.distributed.gather, "distributed_gather"),
        (torch.gather, "gather"),
    ],
)
def test_spellings_share_a_kind(function: Callable[..., Any], kind: str) -> None:
    assert canonical_kind(function) == kind
    assert kind in TABLE
