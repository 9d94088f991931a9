"""QuantizationAwareTraining(compile=...): the run is that of eager mode, bit for bit, analyses included."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_qat import LayerComparison, LayerStatistics, ModelCheck, PipelineCheck, SensitivityAnalysis
from tests.harness.classifier import Classifier
from tests.harness.state import only_region, state_of
from tests.harness.trainers import qat_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo itself


@pytest.fixture(autouse=True)
def no_cache() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def run(directory: Path, compile: Any, **qat: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], list[list[str]]]:
    """State, metrics and sensitivity of a run of two epochs."""
    torch.manual_seed(0)
    module = Classifier()
    trainer = qat_trainer(
        directory,
        LayerStatistics(),
        SensitivityAnalysis(),
        qat={"compile": compile, **qat},
        max_epochs=2,
        limit_train_batches=4,
        limit_val_batches=2,
    )
    trainer.fit(module)
    with (directory / "lightning_qat" / "sensitivity.csv").open() as file:
        rows = list(csv.reader(file))
    return state_of(module), dict(trainer.callback_metrics), rows


@pytest.mark.parametrize("qat", [{}, {"activation_scales": "ema"}], ids=["default", "ema"])
def test_a_compiled_run_is_the_eager_run(tmp_path: Path, qat: dict[str, Any]) -> None:
    expected = run(tmp_path / "eager", None, **qat)
    found = run(tmp_path / "compiled", {"backend": "eager"}, **qat)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # train and eval
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert found[2] == expected[2]


@pytest.mark.filterwarnings("ignore:PipelineCheck. cannot tell")  # the model is not trained
@pytest.mark.parametrize("place", ["__init__", "configure_model"])
def test_the_users_own_compile_before_insertion(tmp_path: Path, place: str) -> None:
    """Also with fullgraph=True: only the steps of the run are captured, tracing, calibration and analyses are not.

    `torch.compile(LightningModule)` with `self.log` crashes upstream: compile the part that is the target.
    """

    class Compiled(Classifier):
        def __init__(self, place: str) -> None:
            super().__init__()
            self.place = place
            self._compile_at("__init__")

        def configure_model(self) -> None:
            self._compile_at("configure_model")

        def _compile_at(self, place: str) -> None:
            if self.place == place:
                self.net.compile(backend="eager", fullgraph=True)

    states = []
    for chosen in ("nowhere", place):
        torch.manual_seed(0)
        module = Compiled(chosen)
        analyses = (
            LayerStatistics(),
            SensitivityAnalysis(),
            LayerComparison(),
            ModelCheck(),
            PipelineCheck(at_epoch=0),
        )
        trainer = qat_trainer(tmp_path / chosen, *analyses, limit_train_batches=3, limit_val_batches=2)
        trainer.fit(module)
        states.append(state_of(module))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # train and eval
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_compile_false_keeps_the_target_eager_within_a_compile_of_the_user(tmp_path: Path) -> None:
    module = Classifier()
    qat_trainer(tmp_path, qat={"compile": False}, limit_train_batches=2, limit_val_batches=1).fit(module)
    region = only_region(module)
    torch._dynamo.utils.counters.clear()
    target: nn.Module = region.target.eval()
    x = torch.zeros(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(torch.compile(target, backend="eager")(x), target(x))
    assert torch._dynamo.utils.counters["graph_break"]
