"""Two tasks on the scanned digits: a backbone and two heads, one of which returns numbers a thousand times larger."""

from __future__ import annotations

import functools

from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import R2Score
from torchmetrics.classification import MulticlassAccuracy

from tests.harness.small_digits import MEAN, STD, OnDigits
from tests.harness.trainers import quiet

LARGE = 1000.0


class TwoTasks(OnDigits):
    """Which digit it is (``val_acc``), and how much ink there is in each quarter of the image (``val_r2``).

    Args:
        lr: of Adam.
    """

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__()
        self.lr = lr
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        )
        self.digit = nn.Sequential(nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10))
        self.ink = nn.Sequential(nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 4))
        self.val_acc = MulticlassAccuracy(10, average="micro")
        self.val_r2 = R2Score()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.backbone(x)
        return {"digit": self.digit(features), "ink": LARGE * self.ink(features)}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        outputs = self((images - MEAN) / STD)
        loss: Tensor = F.cross_entropy(outputs["digit"], labels)
        return loss + F.mse_loss(outputs["ink"] / LARGE, ink_of(images) / LARGE)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        outputs = self((images - MEAN) / STD)
        self.val_acc(outputs["digit"], labels)
        self.val_r2(outputs["ink"].flatten(), ink_of(images).flatten())
        self.log("val_acc", self.val_acc)
        self.log("val_r2", self.val_r2)


def ink_of(images: Tensor) -> Tensor:
    """The mean of each quarter of ``(N, 1, 8, 8)`` images, in thousandths of a standard deviation: ``(N, 4)``."""
    return LARGE * F.adaptive_avg_pool2d((images - MEAN) / STD, 2).flatten(1)


def two_task_weights() -> dict[str, Tensor]:
    """Train the float model, once per process."""
    return {name: tensor.clone() for name, tensor in _trained().items()}


@functools.cache
def _trained() -> dict[str, Tensor]:
    seed_everything(0, verbose=False)
    module = TwoTasks(lr=5e-3)
    Trainer(**{**quiet(), "max_epochs": 12}).fit(module)
    return module.state_dict()
