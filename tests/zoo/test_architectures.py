"""Fake-quant goes into many architectures that nobody here wrote, trains, and comes out again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.analysis.model_check.model_check import check
from lightning_qat.analysis.sensitivity.sensitivity import sensitivity
from lightning_qat.quantization.modules.tensor_leaves import is_float, leaves
from lightning_qat.quantization.region.calibration import calibrate
from lightning_qat.quantization.region.insertion import insert
from tests.harness.state import assert_same
from tests.zoo.architectures import ARCHITECTURES, Batch

pytest.importorskip("transformers", reason="transformers needs Python 3.11 or newer")
QUICK = ("GPT-2", "RegNet", "Wav2Vec 2")
"""The quick relatives; the others are for ``make test-full``."""


def outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    torch.manual_seed(5)  # some draw
    return [tensor for tensor in leaves(model(**batch)) if is_float(tensor)]


@pytest.mark.parametrize(
    "name", [pytest.param(n, id=n, marks=[] if n in QUICK else [pytest.mark.full]) for n in ARCHITECTURES]
)
@pytest.mark.filterwarnings("ignore")
def test_goes_in_trains_and_comes_out(name: str) -> None:
    """Every step is a promise of the README; the float model is compared bit for bit."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name].build()
    torch.manual_seed(1)
    batches = [ARCHITECTURES[name].batch() for _ in range(3)]
    calls = [((), batch) for batch in batches]
    with torch.no_grad():
        expected = outputs(model, batches[0])
    state = copy.deepcopy(model.state_dict())

    region = insert(model, batches=calls[:2])
    region.set_state("off")
    with torch.no_grad():
        assert_same(outputs(model, batches[0]), expected)
    calibrate(region, calls)
    region.set_state("quantize")
    with torch.no_grad():
        quantized = outputs(model, batches[0])
    assert all(bool(tensor.isfinite().all()) for tensor in quantized)
    assert not all(map(torch.equal, quantized, expected))
    found = {finding.kind for finding in check(region).findings}
    assert sensitivity(region, calls[:1], max_points=8).rows

    region.learn_scales()
    model.train()
    trained = [tensor for tensor in outputs(model, batches[1]) if tensor.requires_grad]
    torch.stack([tensor.square().mean() for tensor in trained]).sum().backward()  # type: ignore[no-untyped-call]
    finite = all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert finite or "zero divisor" in found

    region.remove()
    model.load_state_dict(state)  # the step in train mode has moved batch norms
    model.eval()
    with torch.no_grad():
        assert_same(outputs(model, batches[0]), expected)
