"""A LightningCLI around the bird's-eye-view model::

python examples/bev/main.py fit --config examples/bev/configs/float.yaml
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch.cli import LightningCLI

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script: find examples.bev

from examples.bev.data import BevDataModule
from examples.bev.module import BevModule


def main() -> None:
    torch.set_num_threads(1)  # the model is too small to gain from more
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning 2.6 on torch 2.13, at every data loader
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # the data are in memory
    LightningCLI(BevModule, BevDataModule, seed_everything_default=0)


if __name__ == "__main__":
    main()
