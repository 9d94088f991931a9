"""Two processes on one machine (done-when 7): scales, plans and weights are the same on all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.insertion.quantized_checkpoint import load_quantized
from lightning_qat.callbacks.layer_comparison import LayerComparison
from lightning_qat.callbacks.passes.evaluation import evaluate
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from lightning_qat.callbacks.sensitivity_analysis import SensitivityAnalysis
from lightning_qat.quantization.region.region import find_regions
from tests.harness.classifier import Classifier, Net, dataset, loader
from tests.harness.state import assert_same, scales, state_of
from tests.harness.trainers import trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks"),
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log"),
    pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders"),
    pytest.mark.filterwarnings("ignore:this strategy trains in child processes"),
]


class InOrder(Classifier):
    """Every run sees the same 32 images, whatever the number of ranks."""

    def train_dataloader(self) -> Any:
        return loader()


class Dump(Callback):
    """Every rank writes what it has."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # the default sampler deals images out in turn
        evaluation = evaluate(trainer, pl_module)
        self._write("start", trainer, pl_module, evaluation=evaluation.metrics, samples=evaluation.samples)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write("end", trainer, pl_module)

    def _write(self, when: str, trainer: Trainer, module: LightningModule, **more: Any) -> None:
        plans = {path: region.plan.to_dict() for path, region in find_regions(module).items()}
        content = {"scales": scales(module), "state": state_of(module), "plans": plans, **more}
        torch.save(content, self.path / f"{when}{trainer.global_rank}of{trainer.world_size}.pt")


def dumps(
    path: Path, devices: int, qat: dict[str, Any], module: LightningModule, *more: Callback, fit: Any = None
) -> dict[str, Any]:
    """Train and return what each rank wrote, as `start0`, `end1` ..."""
    callbacks = [QuantizationAwareTraining(**qat), Calibration(batches=4), Dump(path), *more]
    strategy = {"strategy": "ddp_fork", "devices": devices} if devices > 1 else {}
    trainer(path, *callbacks, max_epochs=2 + bool(fit), **strategy).fit(module, **(fit or {}))
    return {
        f"{when}{rank}": torch.load(path / f"{when}{rank}of{devices}.pt")
        for when in ("start", "end")
        for rank in range(devices)
    }


def seeded(module_class: type[LightningModule]) -> LightningModule:
    torch.manual_seed(0)
    return module_class()


@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_calibration_over_two_ranks_equals_one_rank_over_the_same_data(tmp_path: Path, observer: str) -> None:
    qat = {"qconfig": {"activation": {"observer": observer}}}
    two = dumps(tmp_path, 2, qat, seeded(InOrder))
    one = dumps(tmp_path, 1, qat, seeded(InOrder))
    assert_same(two["start0"]["scales"], two["start1"]["scales"])
    assert_same(two["start0"]["scales"], one["start0"]["scales"])
    assert two["start0"]["plans"] == two["start1"]["plans"] == one["start0"]["plans"]


@pytest.mark.parametrize("activation_scales", ["fixed", "ema"])
def test_scales_and_weights_are_the_same_on_all_ranks_after_training(tmp_path: Path, activation_scales: str) -> None:
    found = dumps(tmp_path, 2, {"activation_scales": activation_scales}, seeded(Classifier))
    assert_same(found["end0"]["scales"], found["end1"]["scales"])
    batch_norm = ("running_mean", "running_var")  # DDP leaves rank 0's
    weights = [{k: v for k, v in found[f"end{rank}"]["state"].items() if not k.endswith(batch_norm)} for rank in (0, 1)]
    assert_same(*weights)
    moved = any(
        not torch.equal(found["start0"]["scales"][name], scale)
        for name, scale in found["end0"]["scales"].items()
        if not name.endswith("weight")
    )
    assert moved == (activation_scales == "ema")


def test_evaluation_is_the_mean_over_ranks(tmp_path: Path) -> None:
    found = dumps(tmp_path, 2, {}, seeded(Classifier))
    assert found["start0"]["evaluation"] == found["start1"]["evaluation"]
    one = dumps(tmp_path, 1, {"qconfig": {}}, seeded(Classifier))
    both = [run["start0"]["evaluation"]["val_loss"] for run in (found, one)]
    assert both[0] == pytest.approx(both[1], rel=0.02)  # shuffled calibration data: not the same scales
    images = sum(len(labels) for _, labels in Classifier().val_dataloader())
    assert found["start0"]["samples"] == found["start1"]["samples"] == one["start0"]["samples"] == images


class BranchNet(Net):
    """Which ops run depends on the data."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return torch.tanh(logits) if float(images.sum()) > 0 else logits


class Branches(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = BranchNet()


@pytest.mark.filterwarnings("ignore:.*was not seen while tracing")
@pytest.mark.filterwarnings("ignore:Calibration. ")
def test_ranks_that_trace_different_batches_agree_on_one_plan(tmp_path: Path) -> None:
    """Rank 0's plan is broadcast."""
    found = dumps(tmp_path, 2, {"trace_batches": 1}, seeded(Branches))
    assert found["end0"]["plans"] == found["end1"]["plans"]
    assert_same(found["end0"]["scales"], found["end1"]["scales"])


class FailsOnOneRank(Classifier):
    def loss(self, batch: Any) -> Tensor:
        if self.trainer.global_rank == 1:
            raise RuntimeError("only here")
        return super().loss(batch)


def test_a_rank_that_cannot_trace_stops_all_instead_of_hanging(tmp_path: Path) -> None:
    run = trainer(tmp_path, QuantizationAwareTraining(), Calibration(), strategy="ddp_fork", devices=2)
    with pytest.raises(Exception, match=r"could not be traced|another rank could not trace"):
        run.fit(FailsOnOneRank())


class NaNOnOneRank(Classifier):
    """What is analysed holds NaN on one of the ranks, from the first step on."""

    def calibration_dataloader(self) -> Any:
        images, labels = dataset().tensors
        factor = float("nan") if self.trainer.global_rank == 1 and self.trainer.global_step else 1.0
        return DataLoader(TensorDataset(images * factor, labels), batch_size=8)


class Arrived(Callback):
    """Every rank writes down that it came to the end."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (self.path / f"rank{trainer.global_rank}").touch()


@pytest.mark.filterwarnings("ignore:(SensitivityAnalysis|LayerComparison), epoch")
@pytest.mark.parametrize(
    "analysis",
    [
        SensitivityAnalysis(method="isolation"),
        SensitivityAnalysis(method="sketch"),
        LayerComparison(every_n_epochs=1),
    ],
    ids=["isolation", "sketch", "comparison"],
)
def test_a_rank_that_cannot_analyse_does_not_leave_the_other_waiting(tmp_path: Path, analysis: Callback) -> None:
    callbacks = [QuantizationAwareTraining(), Calibration(batches=4), analysis, Arrived(tmp_path)]
    trainer(tmp_path, *callbacks, strategy="ddp_fork", devices=2, limit_train_batches=2).fit(NaNOnOneRank())
    assert {path.name for path in tmp_path.glob("rank*")} == {"rank0", "rank1"}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_the_checkpoint_of_two_ranks_is_an_ordinary_one(tmp_path: Path) -> None:
    """Saved by two ranks, tested and loaded by one, resumed by two."""
    found = dumps(tmp_path, 2, {}, seeded(InOrder), ModelCheckpoint(tmp_path, filename="ddp"))
    checkpoint = tmp_path / "ddp.ckpt"
    tested = InOrder()
    trainer(tmp_path, QuantizationAwareTraining()).test(tested, ckpt_path=str(checkpoint), verbose=False)
    assert_same(scales(tested), found["end0"]["scales"])
    images = torch.randn(4, 1, 6, 6)
    assert torch.equal(load_quantized(InOrder, checkpoint)(images), tested.eval()(images))
    resumed = dumps(tmp_path, 2, {}, seeded(InOrder), ModelCheckpoint(tmp_path), fit={"ckpt_path": str(checkpoint)})
    assert_same(resumed["start0"]["scales"], resumed["start1"]["scales"])
    assert_same(resumed["start0"]["scales"], found["end0"]["scales"])


def test_strategies_that_train_in_child_processes_say_where_the_result_is(tmp_path: Path) -> None:
    """Lightning brings back the weights only."""
    run = trainer(tmp_path, QuantizationAwareTraining(), Calibration(), strategy="ddp_fork", devices=2)
    with pytest.warns(UserWarning, match=r"no fake-quants. Add ModelCheckpoint, and go on with ckpt_path="):
        run.callbacks[0].setup(run, Classifier(), "fit")
