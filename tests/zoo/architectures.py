"""More architectures of ``transformers``, tiny and of random weights: text, images, detection, video, sound, series.

What is asked of them is less than of ``models.py``: fake-quant goes in, trains and comes out, and the float model is
the same, bit for bit, meanwhile and afterwards. A model whose gradients are not finite has a finding that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Config:
    """A configuration inside another one."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Architecture:
    """How to build a model, and what it takes.

    Args:
        model: its class in ``transformers``.
        options: of its configuration.
        batch: makes a batch.
    """

    model: str
    options: dict[str, Any]
    batch: Callable[[], Batch]

    def build(self) -> nn.Module:
        """Build the model, in eval mode, from the seed that is set."""
        import transformers

        model = getattr(transformers, self.model)
        return model(model.config_class(**_built(self.options))).eval()  # type: ignore[no-any-return]


def _built(options: dict[str, Any]) -> dict[str, Any]:
    import transformers

    return {
        key: getattr(transformers, value.name)(**_built(value.options)) if isinstance(value, Config) else value
        for key, value in options.items()
    }


# -- batches


def ids(length: int = 10, **others: Callable[[], Tensor]) -> Callable[[], Batch]:
    """Token numbers, and what else there is."""
    return lambda: {
        "input_ids": torch.randint(3, 64, (2, length)),
        **{name: make() for name, make in others.items()},
    }


def image(size: int = 32, channels: int = 3, name: str = "pixel_values") -> Callable[[], Batch]:
    """Two images of normal values."""
    return lambda: {name: torch.randn(2, channels, size, size)}


def normal(name: str, *shape: int, **others: Callable[[], Tensor]) -> Callable[[], Batch]:
    """One tensor of normal values, and what else there is."""
    return lambda: {name: torch.randn(shape), **{key: make() for key, make in others.items()}}


def tokens() -> Tensor:
    """Token numbers of a decoder."""
    return torch.randint(3, 64, (2, 10))


def series() -> Batch:
    """A forecast of four values from ten."""
    return {
        "past_values": torch.rand(2, 10),
        "past_time_features": torch.rand(2, 10, 1),
        "past_observed_mask": torch.ones(2, 10),
        "future_values": torch.rand(2, 4),
        "future_time_features": torch.rand(2, 4, 1),
    }


# -- configurations that several share

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "hidden_size": 32}
TEXT = {"vocab_size": 64, "max_position_embeddings": 64, **HEADS, **SPECIAL}
VISION = {"image_size": 32, "patch_size": 8, **HEADS}
TWO_SIDES = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
SEQUENCES = {"vocab_size": 64, **TWO_SIDES, **SPECIAL, "use_cache": False}
CONVOLUTIONS = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
PYRAMID = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]}
WAVES = {
    "vocab_size": 16,
    **HEADS,
    "conv_dim": [16, 16],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
FORECAST = {
    "prediction_length": 4,
    "context_length": 8,
    "lags_sequence": [1, 2],
    "num_time_features": 1,
    **TWO_SIDES,
    "d_model": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "decoder_layers": 1,
}
SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 4, 4]}
STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"], "window_size": 4}
MOE = {"num_key_value_heads": 2, "num_experts_per_tok": 2}


def text(model: str, batch: Callable[[], Batch] | None = None, **options: Any) -> Architecture:
    """A model of token numbers with the usual options."""
    return Architecture(model, {**TEXT, **options}, batch or ids())


ARCHITECTURES: dict[str, Architecture] = {
    # text
    "ALBERT": text("AlbertForSequenceClassification", embedding_size=16),
    "BART": Architecture("BartForConditionalGeneration", SEQUENCES, ids(decoder_input_ids=tokens)),
    "BigBird": text("BigBirdForSequenceClassification", ids(64), block_size=4, num_random_blocks=1),
    "Bloom": text("BloomForCausalLM", n_layer=2, n_head=4),
    "ConvBERT": text("ConvBertForSequenceClassification", embedding_size=32, conv_kernel_size=3),
    "DeBERTa v2": text(
        "DebertaV2ForSequenceClassification",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        share_att_key=True,
    ),
    "DeepSeek v3": text(
        "DeepseekV3ForCausalLM",
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
    "Falcon": text("FalconForCausalLM"),
    "FNet": text("FNetForSequenceClassification"),
    "Funnel": Architecture(
        "FunnelForSequenceClassification",
        {"vocab_size": 64, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48},
        ids(),
    ),
    "Gemma 2": text("Gemma2ForCausalLM", num_key_value_heads=2, head_dim=8),
    "GPT-2": Architecture("GPT2LMHeadModel", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}, ids()),
    "GPT-NeoX": text("GPTNeoXForCausalLM"),
    "gpt-oss": text("GptOssForCausalLM", **MOE, num_local_experts=4, head_dim=8),
    "Longformer": text("LongformerForSequenceClassification", attention_window=4),
    "Mamba": text("MambaForCausalLM", state_size=4, use_cache=False),
    "Mamba 2": text("Mamba2ForCausalLM", state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=8),
    "Mixtral": text("MixtralForCausalLM", **MOE, num_local_experts=4),
    "OPT": text("OPTForCausalLM", ffn_dim=48, word_embed_proj_dim=32),
    "Perceiver": Architecture(
        "PerceiverForSequenceClassification",
        {
            "num_latents": 8,
            "d_latents": 32,
            "d_model": 32,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 4,
            "vocab_size": 64,
            "max_position_embeddings": 16,
        },
        lambda: {"inputs": torch.randint(3, 64, (2, 16))},
    ),
    "Phi": text("PhiForCausalLM"),
    "SqueezeBERT": text("SqueezeBertForSequenceClassification", embedding_size=32),
    "XLNet": Architecture(
        "XLNetForSequenceClassification",
        {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        ids(),
    ),
    # images
    "BEiT": Architecture("BeitForImageClassification", {**VISION, "use_relative_position_bias": True}, image()),
    "BiT": Architecture("BitForImageClassification", {**CONVOLUTIONS, "num_groups": 4}, image()),
    "ConvNeXt v2": Architecture(
        "ConvNextV2ForImageClassification", {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}, image()
    ),
    "DINOv2": Architecture("Dinov2ForImageClassification", VISION, image()),
    "DPT": Architecture(
        "DPTForDepthEstimation",
        {
            **VISION,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 16, 24, 32],
            "fusion_hidden_size": 16,
        },
        image(),
    ),
    "FocalNet": Architecture(
        "FocalNetForImageClassification",
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [1, 1],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
        },
        image(),
    ),
    "LeViT": Architecture(
        "LevitForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        image(64),
    ),
    "Mask2Former": Architecture(
        "Mask2FormerForUniversalSegmentation",
        {
            "backbone_config": Config("SwinConfig", {**SWIN, **STAGES}),
            "hidden_dim": 32,
            "mask_feature_size": 32,
            "feature_size": 32,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "num_attention_heads": 4,
            "encoder_feedforward_dim": 48,
            "dim_feedforward": 48,
            "num_queries": 5,
        },
        image(64),
    ),
    "PoolFormer": Architecture(
        "PoolFormerForImageClassification", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}, image(64)
    ),
    "PVT": Architecture("PvtForImageClassification", {"image_size": 64, **PYRAMID}, image(64)),
    "RegNet": Architecture("RegNetForImageClassification", {**CONVOLUTIONS, "groups_width": 8}, image()),
    "SegFormer": Architecture("SegformerForSemanticSegmentation", {**PYRAMID, "decoder_hidden_size": 16}, image(64)),
    "SuperPoint": Architecture(
        "SuperPointForKeypointDetection",
        {"encoder_hidden_sizes": [8, 8, 16, 16], "decoder_hidden_size": 16, "descriptor_decoder_dim": 16},
        image(64),
    ),
    "Swin2SR": Architecture(
        "Swin2SRForImageSuperResolution",
        {"image_size": 16, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4, "upscale": 2},
        image(16),
    ),
    "SwinV2": Architecture(
        "Swinv2ForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        image(),
    ),
    "UPerNet": Architecture(
        "UperNetForSemanticSegmentation",
        {
            "backbone_config": Config(
                "ConvNextConfig",
                {
                    "hidden_sizes": [8, 16, 24, 32],
                    "depths": [1, 1, 1, 1],
                    "out_features": ["stage1", "stage2", "stage3", "stage4"],
                },
            ),
            "hidden_size": 16,
            "pool_scales": [1, 2],
            "auxiliary_in_channels": 24,
            "auxiliary_channels": 8,
        },
        image(64),
    ),
    # detection
    "Conditional DETR": Architecture(
        "ConditionalDetrForObjectDetection",
        {
            "backbone_config": Config("ResNetConfig", {**CONVOLUTIONS, "out_features": ["stage2"]}),
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            **TWO_SIDES,
            "num_queries": 5,
        },
        image(64),
    ),
    "Grounding DINO": Architecture(
        "GroundingDinoForObjectDetection",
        {
            "backbone_config": Config("SwinConfig", {**SWIN, "window_size": 4, "out_indices": [2, 3, 4]}),
            "text_config": Config("BertConfig", TEXT),
            **TWO_SIDES,
            "num_queries": 5,
            "max_text_len": 10,
        },
        ids(pixel_values=lambda: torch.randn(2, 3, 64, 64)),
    ),
    "RT-DETR": Architecture(
        "RTDetrForObjectDetection",
        {
            "backbone_config": Config(
                "RTDetrResNetConfig",
                {
                    "embedding_size": 16,
                    "hidden_sizes": [16, 16, 24, 32],
                    "depths": [1, 1, 1, 1],
                    "layer_type": "basic",
                    "out_features": ["stage2", "stage3", "stage4"],
                },
            ),
            "encoder_in_channels": [16, 24, 32],
            "encoder_hidden_dim": 32,
            "encoder_ffn_dim": 48,
            "encoder_attention_heads": 4,
            "d_model": 32,
            "decoder_in_channels": [32, 32, 32],
            "decoder_ffn_dim": 48,
            "num_queries": 6,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "num_labels": 3,
        },
        image(64),
    ),
    "YOLOS": Architecture(
        "YolosForObjectDetection", {**VISION, "image_size": [32, 32], "num_detection_tokens": 5}, image()
    ),
    # images and text, video, sound, series
    "AST": Architecture(
        "ASTForAudioClassification", {**HEADS, "max_length": 48, "num_mel_bins": 32}, normal("input_values", 2, 48, 32)
    ),
    "Autoformer": Architecture("AutoformerForPrediction", {**FORECAST, "moving_average": 3, "label_length": 2}, series),
    "BLIP": Architecture(
        "BlipForImageTextRetrieval",
        {
            "text_config": {**TEXT, "encoder_hidden_size": 32, "projection_dim": 16},
            "vision_config": {**VISION, "projection_dim": 16},
            "image_text_hidden_size": 16,
        },
        ids(pixel_values=lambda: torch.randn(2, 3, 32, 32)),
    ),
    "CLIP": Architecture(
        "CLIPModel",
        {
            "text_config": {**TEXT, "projection_dim": 16},
            "vision_config": {**VISION, "projection_dim": 16},
            "projection_dim": 16,
        },
        ids(pixel_values=lambda: torch.randn(2, 3, 32, 32)),
    ),
    "DAC": Architecture(
        "DacModel",
        {
            "encoder_hidden_size": 8,
            "downsampling_ratios": [2, 2],
            "decoder_hidden_size": 16,
            "upsampling_ratios": [2, 2],
            "n_codebooks": 2,
            "codebook_size": 16,
            "codebook_dim": 4,
        },
        normal("input_values", 2, 1, 64),
    ),
    "HiFi-GAN": Architecture(
        "SpeechT5HifiGan",
        {
            "model_in_dim": 16,
            "upsample_initial_channel": 16,
            "upsample_rates": [2, 2],
            "upsample_kernel_sizes": [4, 4],
            "resblock_kernel_sizes": [3],
            "resblock_dilation_sizes": [[1, 3]],
        },
        normal("spectrogram", 2, 10, 16),
    ),
    "PatchTSMixer": Architecture(
        "PatchTSMixerForPrediction",
        {
            "context_length": 32,
            "prediction_length": 4,
            "patch_length": 8,
            "patch_stride": 8,
            "num_input_channels": 2,
            "d_model": 16,
            "num_layers": 2,
        },
        normal("past_values", 2, 32, 2),
    ),
    "Time series": Architecture("TimeSeriesTransformerForPrediction", FORECAST, series),
    "VideoMAE": Architecture(
        "VideoMAEForVideoClassification", {**VISION, "num_frames": 4}, normal("pixel_values", 2, 4, 3, 32, 32)
    ),
    "Wav2Vec 2": Architecture("Wav2Vec2ForCTC", WAVES, normal("input_values", 2, 800)),
    "Whisper": Architecture(
        "WhisperForConditionalGeneration",
        {
            **SEQUENCES,
            "num_mel_bins": 16,
            "max_source_positions": 20,
            "max_target_positions": 32,
            "decoder_start_token_id": 1,
        },
        normal("input_features", 2, 16, 40, decoder_input_ids=tokens),
    ),
}
