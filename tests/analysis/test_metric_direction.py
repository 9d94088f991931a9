"""Which way is up for a metric."""

from __future__ import annotations

from lightning_qat.analysis.metric_direction import higher_is_better


def test_direction_of_a_metric_is_read_from_its_words() -> None:
    costs = ["val_loss", "loss", "val/mse", "RMSE", "valLoss", "test_WER", "val_loss/dataloader_idx_0", "abs.error"]
    scores = ["val_acc", "lossless_acc", "mAP", "F1", "embedding_sim", "terrain_iou", "psnr", "val_CEO"]
    assert not any(map(higher_is_better, costs))
    assert all(map(higher_is_better, scores))
