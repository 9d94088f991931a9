"""Which way is up for a metric."""

from __future__ import annotations

from lightning_qat.analysis.metric_direction import higher_is_better, is_quality


def test_direction_of_a_metric_is_read_from_its_words() -> None:
    costs = ["val_loss", "loss", "val/mse", "RMSE", "valLoss", "test_WER", "val_loss/dataloader_idx_0", "abs.error"]
    scores = ["val_acc", "lossless_acc", "mAP", "F1", "embedding_sim", "terrain_iou", "psnr", "val_CEO"]
    assert not any(map(higher_is_better, costs))
    assert all(map(higher_is_better, scores))


def test_what_a_run_takes_is_no_matter_of_quality() -> None:
    """Names that people log beside their metrics, and names of metrics that share words with them."""
    effort = [
        "epoch_seconds", "lr", "lr-AdamW", "lr-SGD/pg1", "learning_rate", "val_time", "inferenceTimeMs", "val/fps",
        "step", "samples_per_second", "throughput", "gpu_mem_gb", "max_memory_allocated", "grad_norm", "num_samples",
        "epoch", "batch_size", "train/tokens_seen", "global_step", "val_latency_ms/dataloader_idx_0", "it_per_s",
    ]  # fmt: skip
    quality = [
        "val_acc", "val_acc_epoch", "val_loss_step", "time_mae", "count_error", "val_success_rate", "mAP", "map_50",
        "step_acc", "speed_rmse", "lrap", "val_f1/dataloader_idx_1", "error_rate", "min_ade", "norm_score", "mean_iou",
        "val_score_1s",
    ]  # fmt: skip
    assert not any(map(is_quality, effort)), list(filter(is_quality, effort))
    assert all(map(is_quality, quality)), [name for name in quality if not is_quality(name)]
