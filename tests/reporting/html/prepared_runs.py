"""Three runs of the scanned digits whose pages a reader without experience has to understand.

    python -m tests.reporting.html.prepared_runs FOLDER [--pictures]

writes ``FOLDER/{misaligned,clipped,healthy}/lightning_qat/report.html``, and with ``--pictures`` what Chromium makes of
them, wide and narrow, light and dark, and on paper.

The trial: a reader who has never seen the tool gets one page at a time, and no help.

| question | misaligned | clipped | healthy |
|---|---|---|---|
| What is wrong? | training gets other inputs than the float run did | one point clips | nothing |
| What do you do next? | normalize in the training step | leave out its fixed scale, calibrate | export |
| Which points are to blame? | none | `relu_0.output` | none |
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, seed_everything

import lightning_qat
from lightning_qat.callbacks.pipeline_fingerprint import FILE_NAME
from tests.harness import chromium
from tests.harness.chromium import Chromium
from tests.harness.small_digits import Digits
from tests.harness.trainers import trainer

EPOCHS = 3
CLIPPED = "relu_0.output"
PICTURES = {
    "wide": (1280, False, ""),
    "wide-dark": (1280, True, ""),
    "narrow": (380, False, ""),
    "narrow-dark": (380, True, ""),
    "print": (780, False, "print"),
}
"""Width, whether it is dark, and the medium."""


def prepare(folder: Path, epochs: int = EPOCHS) -> dict[str, Path]:
    """Train the three runs, and return their pages by name.

    Args:
        folder: where to.
        epochs: of each run.
    """
    seed_everything(0)
    float_model = Digits(lr=5e-3)
    float_run = trainer(folder / "float", lightning_qat.PipelineFingerprint(), max_epochs=6)
    float_run.fit(float_model)
    float_run.save_checkpoint(folder / "float.ckpt")
    fingerprint = next((folder / "float").rglob(FILE_NAME))
    runs = {
        "misaligned": (Digits(lr=5e-4, normalized_in_training=False), []),
        "clipped": (Digits(lr=5e-4), [{"match": CLIPPED, "activation": {"fixed_scale": 0.0015}}]),
        "healthy": (Digits(lr=5e-4), []),
    }
    return {
        name: _run(folder / name, model, folder / "float.ckpt", overrides, fingerprint, epochs)
        for name, (model, overrides) in runs.items()
    }


def _run(
    folder: Path, model: LightningModule, checkpoint: Path, overrides: list[object], fingerprint: Path, epochs: int
) -> Path:
    report = lightning_qat.HTMLReport()
    callbacks: list[Callback] = [
        lightning_qat.QuantizationAwareTraining(init_from=str(checkpoint), overrides=overrides),
        lightning_qat.Calibration(batches=8),
        lightning_qat.ModelCheck(),
        lightning_qat.ConvergenceMonitor(),
        lightning_qat.PipelineCheck(reference=str(fingerprint), batches=8),
        lightning_qat.LayerStatistics(),
        lightning_qat.SensitivityAnalysis(),
        lightning_qat.LayerComparison(),
        lightning_qat.AccuracyTable(metrics=["val_acc"], target="1%", name=folder.name),
        report,
    ]
    trainer(folder, *callbacks, max_epochs=epochs).fit(model)
    assert report.path is not None
    return report.path


def take_pictures(pages: dict[str, Path], folder: Path) -> None:
    """Take pictures of pages: ``<page>-<picture>.png``.

    Args:
        pages: by name.
        folder: where to.
    """
    with tempfile.TemporaryDirectory() as profile, Chromium(Path(profile)) as browser:
        for name, path in pages.items():
            for picture, (width, dark, media) in PICTURES.items():
                page = browser.page(width, 900, dark)
                page.open(path)
                if media:
                    page.run(f"window.dispatchEvent(new Event('before{media}'))")
                    page.emulate(dark, media)
                page.screenshot(folder / f"{name}-{picture}.png")
                page.close()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    place = Path(sys.argv[1])
    made = prepare(place)
    print(*made.values(), sep="\n")
    if "--pictures" in sys.argv and chromium.EXECUTABLE:
        take_pictures(made, place)
