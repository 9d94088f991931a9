"""Fixtures for every test: fixed seeds, one thread, and the float digits model that is trained once."""

from __future__ import annotations

import fcntl
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# A change is judged by examples that are the same in every run; `make test-full` draws new ones, and finds more.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def isolated_torch_state() -> Iterator[None]:
    """Seeds every generator, and takes back the global switches that a Trainer may have thrown."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def digits_float_checkpoint(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Checkpoint of `examples/digits.py` trained in float as in `configs/digits_float.yaml`; never write to it."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent  # the parent is common to all workers of xdist
    checkpoint = shared / "digits_float.ckpt"
    with open(shared / "digits_float.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first worker trains, the others wait
        if not checkpoint.exists():
            train_digits_float(checkpoint)
    return checkpoint


def train_digits_float(checkpoint: Path) -> None:
    from lightning.pytorch import Trainer, seed_everything

    from examples.digits import DigitsClassifier, DigitsDataModule

    seed_everything(0, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=40,
        default_root_dir=checkpoint.parent,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(DigitsClassifier(), DigitsDataModule())
    partial = checkpoint.with_suffix(".partial")
    trainer.save_checkpoint(partial)
    partial.replace(checkpoint)
