"""Settings of modules that are no weights: the layer that computes something else is named, not what follows from it.

Number 3 of what the field met. Each fault is planted into the QAT project; the float project is healthy.
"""

from __future__ import annotations

import functools
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat.analysis.fingerprint.difference import PipelineDifferences
from lightning_qat.analysis.fingerprint.fingerprint import Fingerprint
from lightning_qat.analysis.fingerprint.fingerprint_differences import compare_fingerprints
from lightning_qat.callbacks.pipeline_fingerprint import PipelineFingerprint, take_fingerprint
from lightning_qat.reporting.files import write_fingerprint
from tests.harness.trainers import qat_trainer, quiet


class Block(nn.Module):
    """Attention over tokens of which some are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8, eps=1e-5)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.norm(x + self.mixed(x, padding))  # type: ignore[no-any-return]

    def mixed(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]  # type: ignore[no-any-return]


class WithoutMask(Block):
    """Ignores the mask in a method that forward calls."""

    def mixed(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


WithoutMask.__name__ = WithoutMask.__qualname__ = "Block"  # the same class, edited


class Net(nn.Module):
    """A picture is halved and brought back, its rows are tokens; one number comes out of each."""

    def __init__(self, block: type[Block] = Block) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)
        self.act, self.drop = nn.LeakyReLU(0.1), nn.Dropout(0.1)
        self.back, self.rows, self.block = nn.Conv2d(4, 1, 1), nn.Linear(8, 8), block()
        self.head = nn.Linear(8, 1)
        self.mode = "nearest"

    def forward(self, x: Tensor) -> Tensor:
        h = F.interpolate(self.act(self.bn(self.conv(x))), scale_factor=2, mode=self.mode)
        rows = self.rows(self.drop(self.back(h)).squeeze(1))
        padding = torch.arange(8).expand(len(x), 8) >= 5
        return self.head(self.block(rows, padding).mean(1)).squeeze(1)  # type: ignore[no-any-return]


class Project(LightningModule):
    """A regression whose targets are a mean of the picture."""

    def __init__(self, lr: float = 1e-3, batch_size: int = 16) -> None:
        super().__init__()
        self.lr, self.batch_size, self.unit = lr, batch_size, 1.0
        self.net = Net()

    def on_train_epoch_end(self) -> None:
        self.net.epochs_seen = getattr(self.net, "epochs_seen", 0) + 1  # type: ignore[assignment]

    def error(self, batch: Any) -> Tensor:
        return F.mse_loss(self.net(batch[0]), self.unit * batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.error(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_mse", self.error(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=self.lr)

    def loader(self, seed: int, **kwargs: Any) -> DataLoader[Any]:
        x = torch.randn(96, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        return DataLoader(TensorDataset(x, 2 * x[:, 0, 2:6, 2:6].mean((1, 2)) + 1), self.batch_size, **kwargs)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(1, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(2)


class AtStart(Callback):
    def __init__(self) -> None:
        self.fingerprint = Fingerprint()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.fingerprint = take_fingerprint(trainer, pl_module)
        trainer.should_stop = True


@functools.cache
def float_run(epochs: int = 3) -> tuple[Fingerprint, dict[str, Tensor]]:
    seed_everything(0, verbose=False)
    callback, model = PipelineFingerprint(), Project(lr=1e-2)
    with TemporaryDirectory() as root:  # the fingerprint is written there too
        Trainer(callbacks=[callback], default_root_dir=root, **(quiet() | {"max_epochs": epochs})).fit(model)
    assert callback.fingerprint is not None
    return callback.fingerprint, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def compared(model: LightningModule, path: Path, quantized: bool = True, seed: int = 3) -> PipelineDifferences:
    """The differences of a QAT project from the float run, ahead of training."""
    reference, weights = float_run()
    model.load_state_dict(weights)
    seed_everything(seed, verbose=False)
    callback = AtStart()
    if quantized:
        qat_trainer(path, callback, logger=False, enable_model_summary=False).fit(model)
    else:
        Trainer(callbacks=[callback], default_root_dir=path, **(quiet() | {"max_epochs": 1})).fit(model)
    return compare_fingerprints(reference, callback.fingerprint)


def changed(path: str, **settings: Any) -> Project:
    project = Project()
    for name, value in settings.items():
        setattr(project.get_submodule(path), name, value)
    return project


def without_mask() -> Project:
    project = Project()
    project.net.block = WithoutMask()
    return project


def in_the_code() -> Project:
    """Another mode in the code of the model."""

    class Other(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = F.interpolate(self.act(self.bn(self.conv(x))), scale_factor=2, mode="bilinear")
            rows = self.rows(self.drop(self.back(h)).squeeze(1))
            padding = torch.arange(8).expand(len(x), 8) >= 5
            return self.head(self.block(rows, padding).mean(1)).squeeze(1)  # type: ignore[no-any-return]

    Other.__name__ = "Net"
    project = Project()
    project.net = Other()
    return project


def lambda_instead() -> Project:
    """What no setting shows: a function of the module itself."""
    project = Project()
    project.net.rows.forward = lambda x: F.linear(x, project.net.rows.weight)  # type: ignore[method-assign]
    return project


@pytest.mark.parametrize(
    ("model", "module", "words"),
    [
        (lambda: changed("net.block.norm", eps=1.0), "net.block.norm", ("LayerNorm", "eps 1e-05 -> 1.0")),
        (lambda: changed("net.bn", eps=0.3), "net.bn", ("BatchNorm2d", "eps 1e-05 -> 0.3")),
        (lambda: changed("net.act", negative_slope=0.5), "net.act", ("LeakyReLU", "negative_slope 0.1 -> 0.5")),
        (lambda: changed("net", mode="bilinear"), "net", ("mode nearest -> bilinear", "before net.back")),
        (in_the_code, "net", ("the code of the forward of net differs", "after net.act and before net.back")),
        (without_mask, "net.block", ("the code of the forward of net.block differs",)),
    ],
    ids=["layer norm eps", "batch norm eps", "slope", "interpolation", "interpolation in code", "mask"],
)  # fmt: skip
def test_first_module_that_computes_something_else_is_named(
    model: Any, module: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    """Data, weights and inputs agree, so the module does it; losses and metrics follow from it."""
    differences = compared(model(), tmp_path)
    first = differences.strong[0]
    assert (first.part, first.name) == ("layers (validate)", module), differences.note
    assert "from the same input with the same weights" in first.what
    assert all(word in first.what for word in words), first.what
    assert not any("labels that belong" in row.what for row in differences.rows)
    assert [row for row in differences.strong if row.part in ("loss", "metric")] == []


def test_what_neither_settings_nor_code_show_is_named_by_what_it_computes(tmp_path: Path) -> None:
    first = compared(lambda_instead(), tmp_path, quantized=False).strong[0]
    assert first.name == "net.rows"
    assert "neither its settings nor its code differ" in first.what


def test_setting_that_only_training_shows_is_named_before_the_loss(tmp_path: Path) -> None:
    """Dropout: its siblings are the drop rates of other layers and the momentum of batch norm."""
    differences = compared(changed("net.drop", p=0.9), tmp_path)
    assert any(
        "Dropout p: 0.1 -> 0.9 (net.drop)" in row.what for row in differences.rows if row.suspicion == "possible"
    )
    assert not any("labels" in row.what for row in differences.rows)
    assert not any(row.part.startswith("layers") for row in differences.rows)


def test_targets_in_other_units_are_named(tmp_path: Path) -> None:
    """In the data, and in the step, where only the loss can show them."""

    class Percent(Project):
        def loader(self, seed: int, **kwargs: Any) -> DataLoader[Any]:
            data = super().loader(seed).dataset.tensors  # type: ignore[attr-defined]
            return DataLoader(TensorDataset(data[0], 100 * data[1]), self.batch_size, **kwargs)

    in_data = compared(Percent(), tmp_path)
    assert any(row.part == "data (train)" and row.name == "1" for row in in_data.strong), in_data.note
    project = Project()
    project.unit = 100.0
    in_step = compared(project, tmp_path / "step")
    assert any("targets in other units" in row.what for row in in_step.strong), in_step.note
    assert any("unit: 1.0 -> 100.0" in row.what for row in in_step.rows)


def test_what_was_frozen_in_the_float_run_is_named(tmp_path: Path) -> None:
    """A backbone in train mode, and weights that training updates; modes that a hook sets count."""

    class Frozen(Project):
        def on_train_epoch_start(self) -> None:
            self.net.bn.eval()

    frozen = Frozen()
    frozen.net.conv.requires_grad_(False)
    _, weights = float_run()
    frozen.load_state_dict(weights)
    callback = AtStart()
    Trainer(callbacks=[callback], default_root_dir=tmp_path, **(quiet() | {"max_epochs": 1})).fit(frozen)
    plain = Project()
    plain.load_state_dict(weights)
    here = AtStart()
    Trainer(callbacks=[here], default_root_dir=tmp_path, **(quiet() | {"max_epochs": 1})).fit(plain)
    differences = compare_fingerprints(callback.fingerprint, here.fingerprint)
    assert any("in eval mode while training, only in the reference: net.bn" in row.what for row in differences.strong)
    assert any("training updates net.conv.weight, net.conv.bias here" in row.what for row in differences.rows)
    back = compare_fingerprints(here.fingerprint, callback.fingerprint)
    assert any("does not update net.conv.weight, net.conv.bias here" in row.what for row in back.rows)


@pytest.mark.parametrize("seed", range(3))
def test_healthy_qat_project_differs_only_in_what_qat_changes(seed: int, tmp_path: Path) -> None:
    differences = compared(Project(), tmp_path, seed=seed)
    assert {row.part for row in differences.rows} <= {"optimizer", "settings", "attribute"}
    assert [row for row in differences.rows if row.suspicion == "strong"] == []


def test_float_run_against_itself_differs_in_nothing(tmp_path: Path) -> None:
    """With another seed and number of threads, and compiled; a counter of epochs is no setting."""
    seed_everything(0, verbose=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        reference, weights = float_run()
        runs = []
        for compiled in (False, True):
            project = Project(lr=1e-2)
            project.load_state_dict(weights)
            if compiled:
                project.net = torch.compile(project.net, backend="eager")  # type: ignore[assignment]
            callback = AtStart()
            Trainer(callbacks=[callback], default_root_dir=tmp_path, **(quiet() | {"max_epochs": 3})).fit(project)
            runs.append(callback.fingerprint)
    finally:
        torch.set_num_threads(threads)
    for run in runs:
        assert compare_fingerprints(reference, run).rows == ()


def test_one_epoch_later_only_the_weights_differ(tmp_path: Path) -> None:
    """What layers compute with other weights says nothing about the layers."""
    differences = compare_fingerprints(float_run()[0], float_run(4)[0])
    assert {row.part for row in differences.rows} <= {"weights", "loss", "metric", "settings", "optimizer"}


def test_file_keeps_everything_and_older_files_are_read(tmp_path: Path) -> None:
    """A missing part is not compared, and the comparison says so."""
    import json

    reference = float_run()[0]
    path = write_fingerprint(reference, tmp_path / "fingerprint.json")
    assert Fingerprint.from_json(path) == reference
    data = json.loads(path.read_text())
    for name in ("modules", "layers", "untrained"):
        del data[name]
    path.write_text(json.dumps(data | {"version": 1}))
    older = Fingerprint.from_json(path)
    (row,) = compare_fingerprints(older, reference).rows
    assert (row.part, row.suspicion) == ("fingerprint", "unlikely")
    assert "are not compared" in row.what
    assert compare_fingerprints(older, older).rows == ()
