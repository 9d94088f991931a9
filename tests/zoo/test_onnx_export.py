"""What `onnx_export.md` is made of, and its claim on the example."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from sklearn.datasets import load_digits

pytest.importorskip("onnxruntime", reason="the extra 'onnx' is missing")
pytest.importorskip("transformers", reason="transformers needs Python 3.11 or newer")

from tests.zoo.mixed_models import Subject, with_new_head
from tests.zoo.onnx_export import FILE, PROFILE, Row, cases, digits, document, line, lite0_on_mnist, measure, wanted

ROW = Row(
    "digits (examples)",
    "int8",
    "trained",
    quantizers=3,
    codes=1000,
    equal=1.0,
    behind=(0.999, 1),
    changes={"off": 0.0, "basic": 0.5, "full": 0.25},
    output_codes={"off": (1.0, 0), "basic": (0.98, 2), "full": (0.99, 1)},
    integer={"convolution": (2, 9)},
    smaller=3.5,
    faster=0.5,
    task=(0.99, 0.98, 0.975),
    task_name="accuracy",
    torch_task=0.978,
)


def test_line_holds_every_number() -> None:
    assert line(ROW) == (
        "| digits (examples) | int8, trained | 100 % of 1,000 | 99.9 %, 1 | 0 (100 %, 0) | 50 (98 %, 2) | "
        "25 (99 %, 1) | accuracy: 99.00 / 98.00 / 97.50 (97.80) | 2 of 9 convolutions | 3.50, 0.50 |"
    )
    failed = Row("BERT", "mix", "learned", why_not="no such op")
    assert "not exported: no such op" in line(failed)


def test_document_says_what_holds_and_what_is_missing() -> None:
    text = document([ROW])
    assert "All 1,000 codes of 1 exports of 1 models are equal in (a)." in text
    assert "from fake-quant's: digits (examples) 0.50." in text
    assert "without oneDNN: digits (examples) 0.20." in text
    assert "BERT (int8, trained)" in text
    assert "**Codes differ in (a).**" in document([dataclasses.replace(ROW, equal=0.5)])


def test_committed_table_has_equal_codes_of_every_model() -> None:
    text = FILE.read_text()
    assert "codes differ" not in text.lower()
    for name in cases():
        assert f"| {name} |" in text, name


def on_small_digits() -> Subject:
    """EfficientNet-Lite0 with a new head, on scikit-learn's digits in the place of those of MNIST."""
    found = load_digits()
    images, labels = torch.from_numpy(found.images[:150]).float()[:, None] / 16, torch.from_numpy(found.target[:150])
    return with_new_head(images, labels, seen=100, size=25)


def test_the_new_head_is_trained_on_the_labels_of_its_images() -> None:
    """The float model, whose head was fitted to these images, gives just the labels that come with them."""
    case = lite0_on_mnist(on_small_digits())
    target = torch.from_numpy(load_digits().target)
    assert torch.equal(torch.cat([batch["labels"] for batch in case.batches]), target[:100])
    with torch.no_grad():
        classes = torch.cat([case.model(batch["inputs"]).argmax(1) for batch in case.batches])
    assert torch.equal(classes, target[:100])


@pytest.mark.full
def test_the_new_head_is_judged_by_accuracy() -> None:
    """All codes are equal under the profile, and each task is a number of the 50 digits that are held out."""
    row = measure("EfficientNet", lambda: lite0_on_mnist(on_small_digits()), PROFILE, "trained")
    assert row.equal == 1.0
    assert row.task is not None
    assert min(row.task) > 0.7
    assert all(50 * share == pytest.approx(round(50 * share)) for share in row.task)


@pytest.mark.full
@pytest.mark.parametrize(("types", "scales"), wanted("digits"))
def test_the_example_computes_the_task_of_fake_quant(types: str, scales: str) -> None:
    """All codes are equal, and the accuracy is that of fake-quant within 0.1 points; integers under the profile."""
    row = measure("digits", digits, types, scales)
    assert row.equal == 1.0
    assert row.task is not None
    assert abs(row.task[1] - row.task[2]) <= 0.001
    integer, count = row.integer["convolution"]
    assert types != PROFILE or integer >= 0.9 * count
