"""The evaluate service: the numbers of `trainer.validate`, without touching the run (design.md section 10)."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MaxMetric, MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_qat.callbacks.calibration import Calibration
from lightning_qat.callbacks.passes.evaluation import Evaluation, evaluate
from lightning_qat.callbacks.quantization_aware_training import QuantizationAwareTraining
from tests.harness.classifier import Classifier, ResumableLoader, dataset, loader
from tests.harness.state import assert_same, only_region, state_of
from tests.harness.trainers import trainer


class Logs(Classifier):
    """Validation on 20 images in batches of 8: the last batch is smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(num_classes=4)
        self.forwarded = MulticlassAccuracy(num_classes=4, average="micro")
        self.collection = MetricCollection(
            {"acc": MulticlassAccuracy(num_classes=4), "f1": MulticlassF1Score(num_classes=4)}, prefix="col_"
        )
        self.mean, self.total, self.largest = MeanMetric(), SumMetric(), MaxMetric()
        self.outputs: list[Tensor] = []

    def val_dataloader(self) -> Any:
        return loader(20, seed=1)

    def test_dataloader(self) -> Any:
        return loader(20, seed=1)


class Plain(Logs):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch)
        self.log("loss", loss)
        self.log("number", float(batch_idx))
        self.log("integer", batch_idx + 1.0)
        self.log("both", loss, on_step=True, on_epoch=True)
        self.log("step_only", loss, on_step=True, on_epoch=False)
        self.log("weighted", loss, batch_size=batch_idx + 1)
        for name in ("min", "max", "sum", "mean"):
            self.log(name, loss, reduce_fx=name)
        self.log("torch_max", loss, reduce_fx=torch.max)
        self.log("half", loss.to(torch.bfloat16))
        self.log_dict({"a": loss, "b": loss * 2})


class Metrics(Logs):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        logits = self.net(images)
        self.accuracy.update(logits, labels)
        self.log("accuracy", self.accuracy)
        self.forwarded(logits, labels)
        self.log("forwarded", self.forwarded, on_step=True, on_epoch=True)
        self.collection.update(logits, labels)
        self.log_dict(self.collection)
        self.mean(F.cross_entropy(logits, labels), weight=len(labels))
        self.total(F.cross_entropy(logits, labels))
        self.largest(F.cross_entropy(logits, labels))
        self.log_dict({"mean": self.mean, "total": self.total, "largest": self.largest})


class EpochEnd(Logs):
    def on_validation_epoch_start(self) -> None:
        self.outputs = []

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.outputs.append(loss)
        self.accuracy(self.net(batch[0]), batch[1])
        return loss

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("batch_end", outputs)

    def on_validation_epoch_end(self) -> None:
        self.log("epoch_end", torch.stack(self.outputs).amax())
        self.log("accuracy_by_hand", self.accuracy.compute())
        self.accuracy.reset()


class Several(Logs):
    def val_dataloader(self) -> Any:
        return [loader(20, seed=1), loader(12, seed=2), loader(8, seed=3)]

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        loss = self.loss(batch)
        self.log("loss", loss)
        self.accuracy(self.net(batch[0]), batch[1])
        self.log("accuracy", self.accuracy)
        self.log(f"own_{dataloader_idx}", loss, add_dataloader_idx=False)

    def on_validation_epoch_end(self) -> None:
        self.log("epoch_end", 3.0)


class Evaluates(Callback):
    """Evaluates at the start of training, and checks what it leaves."""

    def __init__(self, stage: str = "validate") -> None:
        self.stage = stage
        self.result: Evaluation | None = None
        self.state: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(getattr(pl_module, "accuracy", None), MulticlassAccuracy):
            pl_module.accuracy(torch.eye(4), torch.arange(4))  # something to lose
            pl_module.outputs.append(torch.ones(()))
        for parameter in pl_module.parameters():
            parameter.grad = torch.ones_like(parameter)
        pl_module.net.bn1.eval()
        before = snapshot(trainer, pl_module)
        self.state = copy.deepcopy(pl_module.state_dict())
        self.result = evaluate(trainer, pl_module, stage=self.stage)
        after = snapshot(trainer, pl_module)
        assert_same(after.pop("tensors"), before.pop("tensors"))
        assert after == before
        pl_module.net.bn1.train()
        pl_module.zero_grad()


def snapshot(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    tensors = state_of(module)
    tensors |= {f"grad {n}": p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    tensors["random"] = torch.random.get_rng_state()
    for name, metric in module.named_modules():
        for state in getattr(metric, "_defaults", {}):
            tensors[f"{name}.{state}"] = getattr(metric, state).clone()
    return {
        "tensors": tensors,
        "modes": [m.training for m in module.modules()],
        "metrics": copy.deepcopy(dict(trainer.callback_metrics)),
        "stage": trainer.state.stage,
        "attributes": sorted(module.__dict__),
        "outputs": list(map(float, getattr(module, "outputs", []))),
        "counts": [m._update_count for m in module.modules() if hasattr(m, "_update_count")],
    }


@pytest.mark.parametrize("module_class", [Plain, Metrics, EpochEnd, Several])
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "quantized"])
def test_numbers_are_exactly_those_of_validate(tmp_path: Path, module_class: type[Logs], quantized: bool) -> None:
    module = module_class()
    evaluates = Evaluates()
    callbacks = [QuantizationAwareTraining(), Calibration(batches=2)] if quantized else []
    run = trainer(tmp_path, *callbacks, evaluates, num_sanity_val_steps=0, limit_train_batches=1)
    run.fit(module)
    module.load_state_dict(evaluates.state)
    again = trainer(tmp_path, *([QuantizationAwareTraining()] if quantized else []))
    again.validate(module, verbose=False)
    assert evaluates.result is not None
    expected = {name: float(value) for name, value in again.callback_metrics.items()}
    assert len(expected) >= 3
    assert evaluates.result.metrics == expected


def test_test_stage(tmp_path: Path) -> None:
    module = Classifier()
    evaluates = Evaluates("test")
    run = trainer(tmp_path, evaluates, limit_train_batches=1, limit_val_batches=0)
    initial = copy.deepcopy(module)
    run.fit(module)
    again = trainer(tmp_path)
    again.test(initial, verbose=False)
    assert evaluates.result is not None
    assert evaluates.result.metrics["test_loss"] == float(again.callback_metrics["test_loss"])


def test_without_validation_the_training_step_is_evaluated(tmp_path: Path) -> None:
    class OnlyTraining(Classifier):
        validation_step = LightningModule.validation_step
        test_step = LightningModule.test_step
        val_dataloader = LightningModule.val_dataloader
        test_dataloader = LightningModule.test_dataloader

        def train_dataloader(self) -> Any:
            return loader(20)

    module = OnlyTraining()
    with torch.no_grad():
        module.eval()
        batches = [(F.cross_entropy(module.net(x), y), len(y)) for x, y in loader(20)]
        expected = sum(float(loss) * size for loss, size in batches) / 20
        module.train()
    evaluates = Evaluates()
    trainer(tmp_path, evaluates).fit(module)
    assert evaluates.result is not None
    assert evaluates.result.metrics["train_loss"] == pytest.approx(expected, rel=1e-6)


def test_limit_is_the_number_of_batches(tmp_path: Path) -> None:
    found: list[Evaluation] = []

    class Limited(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            found.append(evaluate(trainer, pl_module, limit=1))

    trainer(tmp_path, Limited(), limit_train_batches=1).fit(Plain())
    assert found[0].batches == 1


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(dataset(20))


@pytest.mark.parametrize(
    ("loaders", "limit", "known"),
    [
        ([loader(20)], math.inf, True),
        ([loader(20)], 2, True),
        ([loader(20, drop_last=True)], math.inf, True),
        ([loader(20), loader(12), loader(3)], 5, True),
        ([DataLoader(Stream(), batch_size=8)], math.inf, False),
        ([DataLoader(dataset(20), batch_sampler=[[0, 1, 2], [3]])], math.inf, False),
        ([ResumableLoader(20)], math.inf, False),
        ([loader(20), ResumableLoader(20)], math.inf, False),
    ],
)
def test_the_number_of_samples_is_what_the_loaders_give_or_not_known(
    tmp_path: Path, loaders: list[Any], limit: float, known: bool
) -> None:
    seen = [len(labels) for one in loaders for _, labels in one][: None if limit == math.inf else int(limit)]
    found: list[Evaluation] = []

    class Own(Several):
        def val_dataloader(self) -> Any:
            return loaders if len(loaders) > 1 else loaders[0]

    class Limited(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            found.append(evaluate(trainer, pl_module, limit=limit))

    trainer(tmp_path, Limited(), limit_train_batches=1).fit(Own())
    assert found[0].samples == (sum(seen) if known else None)


def test_standard_errors_are_those_of_the_batch_means(tmp_path: Path) -> None:
    module = Plain()
    with torch.no_grad():
        module.eval()
        losses = torch.stack([F.cross_entropy(module.net(x), y) for x, y in loader(20, seed=1)])
        module.train()
    evaluates = Evaluates()
    trainer(tmp_path, evaluates, limit_train_batches=1).fit(module)
    assert evaluates.result is not None
    errors = evaluates.result.standard_errors
    assert errors["loss"] == pytest.approx(float(losses.std()) / 3**0.5, rel=1e-5)
    assert "max" not in errors


def test_another_module_can_be_evaluated_with_the_run_s_data(tmp_path: Path) -> None:
    found: list[Evaluation] = []

    class Twin(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            twin = copy.deepcopy(pl_module)
            torch.nn.init.zeros_(twin.net.head.weight)
            torch.nn.init.zeros_(twin.net.head.bias)
            found.extend([evaluate(trainer, pl_module), evaluate(trainer, pl_module, module=twin)])

    trainer(tmp_path, Twin(), limit_train_batches=1).fit(Plain())
    assert found[1].metrics["loss"] == pytest.approx(float(torch.tensor(4.0).log()), rel=1e-6)
    assert found[0].metrics["loss"] != found[1].metrics["loss"]


def test_barebones_has_numbers_too(tmp_path: Path) -> None:
    evaluates = Evaluates()
    run = Trainer(barebones=True, accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, callbacks=[evaluates])
    with pytest.warns(UserWarning, match="barebones"):
        run.fit(Plain())
    assert evaluates.result is not None
    assert evaluates.result.metrics["loss"] > 0


def test_float_and_quantized_numbers_differ(tmp_path: Path) -> None:
    found: list[float] = []

    class Both(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            found.append(evaluate(trainer, pl_module).metrics["val_loss"])
            with only_region(pl_module).state("off"):
                found.append(evaluate(trainer, pl_module).metrics["val_loss"])

    qat = QuantizationAwareTraining({"activation": {"dtype": "int4"}})  # type: ignore[arg-type]
    trainer(tmp_path, qat, Calibration(batches=2), Both()).fit(Classifier())
    assert found[0] != found[1]
