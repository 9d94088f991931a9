"""Fingerprints of pipelines and what differs between two of them (C5)."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_qat.analysis.fingerprint.fingerprint import (
    Fingerprint,
    batch_norm_summary,
    deviating_modes,
    tensor_digest,
    weight_digests,
)
from lightning_qat.analysis.fingerprint.fingerprint_differences import compare_fingerprints
from lightning_qat.analysis.fingerprint.tensor_summary import TensorSummarizer, TensorSummary
from lightning_qat.quantization.errors import ConfigurationError
from lightning_qat.quantization.region.insertion import insert
from lightning_qat.reporting.files import write_fingerprint, write_json


def summary(*batches: torch.Tensor, name: str = "image") -> TensorSummary:
    summarizer = TensorSummarizer(name)
    for batch in batches:
        summarizer.update(batch)
    return summarizer.result()


def images(seed: int, mean: tuple[float, ...] = (0.485, 0.456, 0.406), std: float = 0.229) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(64, len(mean), 4, 4, generator=generator)
    return noise * std + torch.tensor(mean).reshape(1, -1, 1, 1)


def with_input(*batches: torch.Tensor) -> Fingerprint:
    return Fingerprint(model_inputs={"train": (summary(*batches, name="model.0"),)})


@given(st.integers(0, 1000), st.integers(1, 4))
def test_summary_is_that_of_all_values(seed: int, channels: int) -> None:
    """Against torch on the concatenated batches."""
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(n, channels, 3, 2, generator=generator) * 3 + 1 for n in (5, 2, 7)]
    found, whole = summary(*batches), torch.cat(batches).double()
    assert found.samples == 14
    assert found.mean == pytest.approx(whole.mean(dim=(0, 2, 3)).tolist())
    assert found.std == pytest.approx(whole.std(dim=(0, 2, 3), correction=0).tolist())
    assert found.min == pytest.approx(whole.amin(dim=(0, 2, 3)).tolist())
    assert found.max == pytest.approx(whole.amax(dim=(0, 2, 3)).tolist())
    expected = whole.mean(dim=(2, 3)).std(dim=0) / 14**0.5
    assert found.mean_error == pytest.approx(expected.tolist())


def test_labels_are_counted() -> None:
    found = summary(torch.tensor([3, 1, 1]), torch.tensor([3]), name="1")
    assert (found.labels, found.samples, found.shape) == ({"1": 2, "3": 2}, 4, ())


@pytest.mark.parametrize("value", [torch.zeros(0, 3), torch.tensor(2.0), torch.ones(2, dtype=torch.complex64)])
def test_odd_tensors_are_summarized(value: torch.Tensor) -> None:
    assert summary(value).name == "image"


def test_json_keeps_everything(tmp_path: Path) -> None:
    fingerprint = Fingerprint(
        data={"train": (summary(images(0)), summary(torch.arange(4), name="1"))},
        losses={"train_loss": float("nan")},
        optimizers=[{"class": "SGD", "groups": [{"lr": 0.1}]}],
        weights=weight_digests(nn.Linear(2, 2)),
    )
    read = Fingerprint.from_json(write_fingerprint(fingerprint, tmp_path / "fingerprint.json"))
    assert str(read) == str(fingerprint)  # nan is not equal to itself


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "make it in the float project"), ("{", "is not a fingerprint"), ("{}", "has no weights"),
     ('{"weights": {}, "version": 9}', "version 9"), ('{"weights": {}, "version": 1}', "data is missing"),
     ('{"weights": {}, "version": 1, "data": {}, "model_inputs": {}, "losses": {}, "metrics": {}, '
      '"standard_errors": {}, "colour": 1}', "a key that is not known, 'colour'")],
)  # fmt: skip
def test_bad_files_are_refused(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "fingerprint.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        Fingerprint.from_json(path)


def test_digests_are_of_the_float_weights_only() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
    before = weight_digests(model)
    model(torch.ones(1, 1, 8, 8).repeat(2, 1, 1, 1))
    assert set(before) == {"0", "1"}
    moved = weight_digests(model)
    assert moved["0"] == before["0"]
    assert moved["1"] != before["1"]  # running statistics are part of the model
    insert(model, (torch.ones(1, 1, 8, 8),))
    assert weight_digests(model) == moved


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(2.5),
        torch.linspace(-1, 1, 6).view(3, 2).t(),
        torch.linspace(-1, 1, 96).view(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        torch.linspace(-1, 1, 4, dtype=torch.bfloat16),
        torch.linspace(-1, 1, 4).half(),
        torch.tensor([True, False]),
        torch.arange(3, dtype=torch.int16),
        torch.zeros(0, 2),
    ],
    ids=["scalar", "transposed", "channels last", "bfloat16", "float16", "bool", "int16", "empty"],
)
def test_digest_is_that_of_name_shape_type_and_bytes(tensor: torch.Tensor) -> None:
    """Digests of earlier versions stand in files, so they must not change."""
    flat = tensor.contiguous().view(-1)
    content = bytes(flat.view(torch.uint8).tolist()) if tensor.numel() else b""
    head = f"net.w{tuple(tensor.shape)}{tensor.dtype}".encode()
    assert tensor_digest([("net.w", tensor)]) == hashlib.sha256(head + content).hexdigest()[:16]


def test_modes_and_batch_norm_are_noted() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout())
    model[1].eval()
    assert deviating_modes(model) == {"eval": ["1"]}
    assert batch_norm_summary(model) == {"0": {"momentum": 0.1, "running_mean": 0.0, "running_var": 1.0}}


def test_missing_normalization_is_said_in_words() -> None:
    """C5: the example of the issue."""
    normalized = images(0, (0.0, 0.0, 0.0), 1.0)
    (row,) = compare_fingerprints(with_input(normalized), with_input(images(1))).rows
    assert row.suspicion == "strong"
    assert "channel 0: mean" in row.what
    assert row.what.endswith("normalization missing here?")
    (row,) = compare_fingerprints(with_input(images(1)), with_input(normalized)).rows
    assert row.what.endswith("normalization added here?")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (images(1).flip(1), "RGB and BGR"),
        (images(1) * 255, "0..255"),
        (images(1)[:, :, :2], "shape (3, 4, 4) -> (3, 2, 4): resized, cropped or padded otherwise?"),
        (images(1)[:, :1], "other preprocessing: grey, colour or an alpha channel?"),
        (images(1).movedim(1, -1), "axes in another order (channels first or last)?"),
        (torch.full((64, 3, 4, 4), 0.5), "the input is destroyed"),
        (images(1) + 5, "other normalization"),
        (images(1).half(), "type float32 -> float16"),
    ],
)
def test_usual_mistakes_are_recognised(changed: torch.Tensor, words: str) -> None:
    """C5."""
    differences = compare_fingerprints(with_input(images(0)), with_input(changed))
    assert any(words in row.what for row in differences.strong)


CONSTANTS = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).reshape(2, 1, 3, 1, 1)  # of ImageNet


def normalized(seed: int) -> torch.Tensor:
    return images(seed, (0.0, 0.0, 0.0), 1.0)


def uniform(seed: int) -> torch.Tensor:
    return torch.rand(64, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def replaced(x: torch.Tensor, share: float, value: float) -> torch.Tensor:
    """A share of the values becomes one value."""
    chosen = torch.rand(x.shape, generator=torch.Generator().manual_seed(7)) < share
    return torch.where(chosen, value, x)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("value", [-99.0, 255.0])
@pytest.mark.parametrize("clean", [normalized, images])
def test_fill_values_are_named_with_their_share(share: float, value: float, clean: Any) -> None:
    """C5: a mark for what is missing looks like a missing normalization by mean and spread alone."""
    marked = replaced(clean(1), share, value)
    (row,) = compare_fingerprints(with_input(clean(0)), with_input(marked)).rows
    assert row.suspicion == "strong"
    percent = float(row.what.split("about ")[1].split("%")[0])
    assert percent == pytest.approx(100 * float((marked[:, 0] == value).double().mean()), rel=0.1)
    assert f"of the values are {value:g}: a fill value" in row.what
    (row,) = compare_fingerprints(with_input(marked), with_input(clean(0))).rows
    assert f"a fill value is missing here: {value:g}" in row.what


def test_rare_fill_value_is_seen_by_the_range() -> None:
    """B5: it moves neither mean nor spread, and sets the scale of the input."""
    marked = normalized(1)
    marked[0, 2, 0, 0] = -30.0
    (row,) = compare_fingerprints(with_input(normalized(0)), with_input(marked)).rows
    assert row.suspicion == "possible"
    assert "channel 2: values from -30 to" in row.what


@pytest.mark.parametrize(
    ("clean", "changed", "words"),
    [
        (normalized(0), images(1) * 255, "normalization missing here?"),
        (normalized(0), (images(1).flip(1) - CONSTANTS[0]) / CONSTANTS[1], "reversed order before the normalization"),
        (normalized(0), normalized(1) * 0.2, "other normalization?"),
        (images(0), images(1)[:, [1, 0, 2]], "channels in another order (1, 0, 2 of the reference)?"),
        (images(0), images(1) * torch.tensor([1.0, 0.0, 1.0]).reshape(3, 1, 1), "channel 1 is constant here"),
        (images(0), images(1) * 0 + CONSTANTS[0], "all channels are constant here"),
        (uniform(0).square(), 1.0 - uniform(1).square(), "inverted, light for dark?"),
        (normalized(0), replaced(normalized(1), 0.01, math.nan), "nan or inf here"),
        (images(0), images(1)[:, :, :, :2].clamp(max=0.2), "an augmentation that destroys the input"),
        (images(0) * 255, images(1), "scaled by 255"),
    ],
)
def test_traces_are_told_apart(clean: torch.Tensor, changed: torch.Tensor, words: str) -> None:
    """C5: what is named is what was done."""
    differences = compare_fingerprints(with_input(clean), with_input(changed))
    assert words in differences.strong[-1].what


@pytest.mark.parametrize("clean", [normalized, images])
def test_empty_samples_are_counted(clean: Any) -> None:
    """C5: half of a batch that is empty halves the variance and moves no mean of normalized data."""
    half = clean(1)
    half[:32] = 0.0
    rows = compare_fingerprints(with_input(clean(0)), with_input(half)).strong
    assert any("50% of the samples are empty (one value all over), in the reference 0%" in row.what for row in rows)
    assert compare_fingerprints(with_input(half), with_input(half)).rows == ()


def test_lengths_that_vary_are_no_other_shape() -> None:
    """C5: sequences are padded to the longest of their batch."""
    one = summary(torch.ones(4, 7), torch.ones(4, 5), name="0")
    assert one.shape == (-1,)
    other = Fingerprint(data={"train": (summary(torch.ones(4, 6), torch.ones(4, 9), name="0"),)})
    assert compare_fingerprints(Fingerprint(data={"train": (one,)}), other).rows == ()


def test_bytes_of_a_picture_are_no_labels() -> None:
    pictures = [torch.randint(0, 256, (8, 3, 8, 8), generator=torch.Generator().manual_seed(s)).byte() for s in (0, 1)]
    assert summary(pictures[0]).labels is None
    (row,) = compare_fingerprints(with_input(pictures[0]), with_input(pictures[1] // 2)).rows
    assert "std" in row.what
    assert summary(pictures[0] % 20).labels is not None  # classes of pixels


def test_what_is_missing_here_is_said_as_well() -> None:
    one = Fingerprint(data={"train": (summary(images(0)), summary(images(0), name="mask"))})
    other = Fingerprint(data={"train": (summary(images(0)), summary(images(0), name="weight"))})
    whats = [row.what for row in compare_fingerprints(one, other).rows]
    assert whats == ["data (train), weight: exists only here", "data (train), mask: exists only in the reference"]


@pytest.mark.parametrize("seed", range(1, 21))
def test_other_samples_of_the_same_data_are_no_difference(seed: int) -> None:
    """No false alarm from shuffling."""
    generator = torch.Generator().manual_seed(seed)
    labels, other = ([torch.randint(0, 10, (64,), generator=generator) for _ in range(8)] for _ in range(2))
    one = Fingerprint(data={"train": (summary(images(0)), summary(*labels, name="1"))})
    two = Fingerprint(data={"train": (summary(images(seed)), summary(*other, name="1"))})
    assert compare_fingerprints(one, two).rows == ()


def test_other_labels_are_found() -> None:
    labels = torch.arange(640) % 10
    one = Fingerprint(data={"train": (summary(labels, name="1"),)})
    shifted = Fingerprint(data={"train": (summary(labels + 1, name="1"),)})
    (row,) = compare_fingerprints(one, shifted).rows
    assert row.suspicion == "strong"
    assert "values only here: 10; values only in the reference: 0: every label one more than in the refer" in row.what
    (row,) = compare_fingerprints(shifted, one).rows
    assert row.what.endswith("every label one less than in the reference?")
    rolled = Fingerprint(data={"train": (summary(labels.clamp(max=7), name="1"),)})
    (row,) = compare_fingerprints(one, rolled).rows
    assert row.what.endswith("values only in the reference: 8, 9: other labels?")


def test_partly_loaded_weights_are_named() -> None:
    one = Fingerprint(weights={"conv": "1", "head": "2"})
    (row,) = compare_fingerprints(one, replace(one, weights={"conv": "1", "head": "3"})).rows
    assert row.what == "the weights of 1 of 2 modules differ (head): partly loaded?"
    rows = compare_fingerprints(one, replace(one, weights={"conv": "1", "tail": "3"})).rows
    assert {row.name for row in rows} == {"head", "tail"}


def test_loss_scaled_by_a_whole_number_is_guessed_and_follows_from_other_weights() -> None:
    one = Fingerprint(losses={"train_loss": 0.5}, weights={"a": "1"})
    (row,) = compare_fingerprints(one, replace(one, losses={"train_loss": 1.5})).rows
    assert row.what.endswith("0.5 -> 1.5: scaled by 3?")
    assert row.suspicion == "strong"
    rows = compare_fingerprints(one, replace(one, losses={"train_loss": 1.5}, weights={"a": "2"})).rows
    assert [r.suspicion for r in rows] == ["strong", "possible"]
    assert "this follows" in rows[1].what


@pytest.mark.parametrize(
    ("key", "before", "now", "suspicion"),
    [
        ("lr", 0.1, 0.01, "unlikely"),
        ("lr", 0.1, 10.0, "strong"),
        ("lr", 0.1, 1e-6, "possible"),
        ("weight_decay", 0.05, 5.0, "strong"),
        ("momentum", 0.9, 0.0, "possible"),
    ],
)
def test_hyperparameters_are_weighed_as_qat_wants_them(key: str, before: float, now: float, suspicion: str) -> None:
    """F: QAT wants a tenth to a twentieth of the float learning rate."""
    one, other = (Fingerprint(optimizers=[{"class": "SGD", "groups": [{key: value}]}]) for value in (before, now))
    (row,) = compare_fingerprints(one, other).rows
    assert row.suspicion == suspicion


def test_strong_differences_come_first(tmp_path: Path) -> None:
    one = Fingerprint(weights={"a": "1"}, versions={"torch": "1"}, settings={"precision": "32"})
    other = Fingerprint(weights={"a": "2"}, versions={"torch": "2"}, settings={"precision": "16"})
    differences = compare_fingerprints(one, other)
    assert [row.suspicion for row in differences.rows] == ["strong", "possible", "unlikely"]
    assert differences.note == differences.rows[0].what
    stored = json.loads(write_json(differences, tmp_path / "differences.json").read_text())
    assert len(stored["rows"]) == 3
