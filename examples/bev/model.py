"""The network: cameras to a bird's-eye view, and two heads that look at it.

It is what such models are made of: a loop over the cameras that picks modules from a dictionary, reference points that
are -99 where a camera does not see them, decoders that refine reference points layer by layer, and one position
embedding that all layers of a decoder share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.bev.scenes import CAMERAS, LINE_CLASSES, LINE_POINTS, VEHICLE_CLASSES
from lightning_qat import dynamic_block

CELLS = 12
"""The bird's-eye view has CELLS x CELLS cells."""
PILLAR = (0.0, 1.2)
"""Heights, in metres, at which a cell looks into the cameras."""
NOT_VISIBLE = -99.0
ANCHORS = 6
"""The obstacle head starts from ANCHORS x ANCHORS places."""
POLYLINES = 6
_EPS = 0.02


def inverse_sigmoid(x: Tensor) -> Tensor:
    """Logits of places from 0 to 1; what is closer than 0.02 to an end counts as 0.02 away from it."""
    return torch.logit(x, eps=_EPS)


def conv(in_channels: int, channels: int, stride: int = 1, size: int = 3) -> nn.Sequential:
    """A convolution with batch norm and a rectifier."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, size, stride=stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


class Backbone(nn.Module):
    """Two levels of features, at an eighth and a quarter of the image's size.

    Args:
        width: channels of both levels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = conv(3, 16, stride=2)
        self.stage1 = nn.Sequential(conv(16, 32, stride=2), conv(32, 32))
        self.stage2 = nn.Sequential(conv(32, 48, stride=2), conv(48, 48))
        self.lateral1, self.lateral2 = nn.Conv2d(32, width, 1), nn.Conv2d(48, width, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``(N, 3, H, W)`` to ``(N, width, H/4, W/4)`` and ``(N, width, H/8, W/8)``."""
        fine = self.stage1(self.stem(images))
        coarse = self.stage2(fine)
        return self.lateral1(fine), self.lateral2(coarse)


class FeedForward(nn.Module):
    """Two linear layers around a rectifier, beside a shortcut, and a layer norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x + self.linear2(F.relu(self.linear1(x))))
        return out


class SelfAttention(nn.Module):
    """Attention of the queries among themselves, with their positions in queries and keys."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """``(N, queries, width)`` to the same."""
        located = x + position
        q, k, v = (self._split(part) for part in (self.query(located), self.key(located), self.value(x)))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        seen = (weights @ v).transpose(1, 2).flatten(2)
        out: Tensor = self.norm(x + self.out(seen))
        return out

    def _split(self, x: Tensor) -> Tensor:
        out: Tensor = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return out


class DeformableAttention(nn.Module):
    """Each query looks at the bird's-eye view at a few places around its reference point."""

    def __init__(self, width: int, points: int = 4) -> None:
        super().__init__()
        self.points = points
        self.sampling_offsets = nn.Linear(width, points * 2)
        self.attention_weights = nn.Linear(width, points)
        self.value_proj, self.output_proj = nn.Conv2d(width, width, 1), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        nn.init.zeros_(self.sampling_offsets.weight)
        corners = torch.tensor([[-1.0, -1], [-1, 1], [1, -1], [1, 1]]) / CELLS
        self.sampling_offsets.bias.data = corners.repeat(points // 4, 1).flatten()

    def forward(self, x: Tensor, position: Tensor, reference_points: Tensor, bev: Tensor) -> Tensor:
        """Queries ``(N, queries, width)`` with reference points ``(N, queries, 2)``, 0 to 1, to queries."""
        located = x + position
        offsets = self.sampling_offsets(located).unflatten(-1, (self.points, 2))
        weights = self.attention_weights(located).softmax(-1)
        grid = (2 * reference_points - 1)[:, :, None] + offsets
        seen = F.grid_sample(self.value_proj(bev), grid, align_corners=False)
        seen = (seen * weights[:, None]).sum(-1).transpose(1, 2)
        out: Tensor = self.norm(x + self.output_proj(seen))
        return out


class ViewTransformation(nn.Module):
    """From the cameras to the bird's-eye view: every cell samples the features where the cameras see it.

    Args:
        width: channels.
        annotate: mark the loop over the cameras as a dynamic block.
    """

    def __init__(self, width: int, annotate: bool) -> None:
        super().__init__()
        self.annotate = annotate
        self.input_proj = nn.ModuleDict(
            {str(camera): nn.Sequential(nn.Conv2d(width, width, 1)) for camera in range(CAMERAS)}
        )
        self.cams_embeds = nn.Parameter(0.1 * torch.randn(CAMERAS, width))
        self.level_embeds = nn.Parameter(0.1 * torch.randn(2, width))
        self.queries = nn.Parameter(0.5 * torch.randn(CELLS * CELLS, width))
        self.points = len(PILLAR)
        self.sampling_offsets = nn.Linear(width, 2 * self.points * 2)
        self.attention_weights = nn.Linear(width, 2 * self.points)
        self.output_proj, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.ffn = FeedForward(width)
        self.blocks = nn.Sequential(conv(width, width), conv(width, width))
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.uniform_(self.sampling_offsets.bias, -0.1, 0.1)

    def process_input(self, level: int, features: Tensor, cameras: Sequence[int]) -> Tensor:
        """Features ``(N, cameras, C, h, w)`` with the projection and the embeddings of each camera."""
        processed = []
        for index, camera in enumerate(cameras):
            with dynamic_block(self, f"process_input_{level}") if self.annotate else nullcontext():
                src = self.input_proj[str(camera)](features[:, index])
                src = src + self.cams_embeds[camera][None, :, None, None]
                src = src + self.level_embeds[level][None, :, None, None]
                processed.append(src)
        return torch.stack(processed, dim=1)

    def forward(self, levels: Sequence[Tensor], reference_points: Tensor, cameras: Sequence[int]) -> Tensor:
        """Two levels ``(N, cameras, C, h, w)`` and points ``(1, cameras, cells, 2, 2)`` to ``(N, C, CELLS, CELLS)``."""
        count = len(levels[0])
        offsets = self.sampling_offsets(self.queries).unflatten(-1, (2, self.points, 2))
        weights = self.attention_weights(self.queries).softmax(-1).unflatten(-1, (2, self.points))
        grid = reference_points[:, :, :, None] + offsets  # (1, cameras, cells, levels, points, 2)
        seen = []
        for level, features in enumerate(levels):
            value = self.process_input(level, features, cameras).flatten(0, 1)
            here = grid[:, :, :, level].expand(count, -1, -1, -1, -1).flatten(0, 1)
            sampled = F.grid_sample(value, here, align_corners=False)  # (N cameras, C, cells, points)
            seen.append((sampled * weights[:, level]).sum(-1))
        bev = (seen[0] + seen[1]).unflatten(0, (count, -1)).sum(1).transpose(1, 2)
        bev = self.ffn(self.norm(self.output_proj(bev) + self.queries))
        bev = bev.transpose(1, 2).unflatten(-1, (CELLS, CELLS))
        out: Tensor = self.blocks(bev)
        return out


class PositionEmbedding(nn.Module):
    """Sines and cosines of places, at wavelengths that ``dim_t`` divides by.

    Args:
        features: numbers per coordinate.
        force_sharing: mark the code as a dynamic block, so that all of its calls share their scales.
    """

    def __init__(self, features: int = 64, force_sharing: bool = False) -> None:
        super().__init__()
        self.features, self.force_sharing = features, force_sharing

    def forward(self, places: Tensor) -> Tensor:
        """Places ``(N, queries, 2)`` from 0 to 1 to ``(N, queries, 2 * features)``."""
        with dynamic_block(self, "position_embedding") if self.force_sharing else nullcontext():
            dim_t = torch.arange(self.features, dtype=torch.float32, device=places.device)
            dim_t = 10000 ** (2 * (dim_t // 2) / self.features)
            angles = (places - 0.5) * (2 * math.pi)
            angles = angles[..., None] / dim_t
            both = torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1)
            return both.flatten(2)


class DecoderLayer(nn.Module):
    """Self-attention, attention to the bird's-eye view, and a feed-forward network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.self_attn, self.cross_attn, self.ffn = SelfAttention(width), DeformableAttention(width), FeedForward(width)

    def forward(self, x: Tensor, position: Tensor, reference_points: Tensor, bev: Tensor) -> Tensor:
        out: Tensor = self.ffn(self.cross_attn(self.self_attn(x, position), position, reference_points, bev))
        return out


def branch(width: int, outputs: int) -> nn.Sequential:
    """A small network on every query."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))


def class_branch(width: int, classes: int) -> nn.Linear:
    """A classifier that finds everything improbable at first."""
    made = nn.Linear(width, classes)
    nn.init.constant_(made.bias, -2.0)
    return made


class ObstacleHead(nn.Module):
    """Finds vehicles: queries start at the places of a grid, and each layer moves them.

    Args:
        width: channels.
        layers: of the decoder.
    """

    anchors: Tensor

    def __init__(self, width: int, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(width) for _ in range(layers))
        self.cls_branches = nn.ModuleList(class_branch(width, len(VEHICLE_CLASSES)) for _ in range(layers))
        self.reg_branches = nn.ModuleList(branch(width, 6) for _ in range(layers))
        self.queries = nn.Parameter(0.5 * torch.randn(ANCHORS**2, width))
        self.position = nn.Parameter(0.5 * torch.randn(ANCHORS**2, width))
        ticks = (torch.arange(ANCHORS) + 0.5) / ANCHORS
        self.register_buffer("anchors", torch.cartesian_prod(ticks, ticks), persistent=False)
        for reg in self.reg_branches:
            nn.init.zeros_(reg[-1].weight)  # type: ignore[index]

    def forward(self, bev: Tensor) -> list[dict[str, Tensor]]:
        """For each layer: ``scores`` (logits), ``places`` (before the sigmoid), ``shapes``: ``(N, queries, ...)``."""
        x, position = (p.expand(len(bev), -1, -1) for p in (self.queries, self.position))
        reference_points = self.anchors.expand(len(bev), -1, -1)
        found = []
        for layer, cls_branch, reg_branch in zip(self.layers, self.cls_branches, self.reg_branches, strict=True):
            x = layer(x, position, reference_points, bev)
            reg = reg_branch(x)
            places = reg[..., :2] + inverse_sigmoid(reference_points)  # the source's reg_branch_output_add
            found.append({"scores": cls_branch(x), "places": places, "shapes": reg[..., 2:]})
            reference_points = places.sigmoid().detach()
        return found


class MapHead(nn.Module):
    """Finds lines: every point of every line is a query, and each layer moves them all.

    Args:
        width: channels.
        layers: of the decoder.
        force_sharing: see :class:`PositionEmbedding`.
    """

    start: Tensor

    def __init__(self, width: int, layers: int = 4, force_sharing: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(width) for _ in range(layers))
        self.gen_sineembed_for_position = PositionEmbedding(force_sharing=force_sharing)
        self.ref_point_head = nn.Linear(2 * self.gen_sineembed_for_position.features, width)
        self.cls_branches = nn.ModuleList(class_branch(width, len(LINE_CLASSES)) for _ in range(layers))
        self.pts_branches = nn.ModuleList(branch(width, 2) for _ in range(layers))
        self.lines = nn.Parameter(0.5 * torch.randn(POLYLINES, 1, width))
        self.points = nn.Parameter(0.5 * torch.randn(1, LINE_POINTS, width))
        along = torch.linspace(0.4, 0.6, LINE_POINTS)  # all begin as short lines beside each other, around the ego
        across = torch.linspace(0.4, 0.6, POLYLINES)
        start = torch.stack(torch.meshgrid(along, across, indexing="xy"), dim=-1)
        self.register_buffer("start", start.flatten(0, 1), persistent=False)

    def forward(self, bev: Tensor) -> list[dict[str, Tensor]]:
        """For each layer: ``scores`` (logits), ``(N, lines, classes)``, and ``points`` before the sigmoid."""
        x = (self.lines + self.points).flatten(0, 1).expand(len(bev), -1, -1)
        reference_points = self.start.expand(len(bev), -1, -1)
        found = []
        for layer, cls_branch, pts_branch in zip(self.layers, self.cls_branches, self.pts_branches, strict=True):
            position = self.ref_point_head(self.gen_sineembed_for_position(reference_points))
            x = layer(x, position, reference_points, bev)
            points = pts_branch(x) + inverse_sigmoid(reference_points)
            scores = cls_branch(x.unflatten(1, (POLYLINES, LINE_POINTS)).mean(2))
            found.append({"scores": scores, "points": points.unflatten(1, (POLYLINES, LINE_POINTS))})
            reference_points = points.sigmoid().detach()
        return found


class BevNet(nn.Module):
    """The whole of it.

    Args:
        width: channels.
        annotate: see :class:`ViewTransformation`.
        force_sharing: see :class:`PositionEmbedding`.
    """

    def __init__(self, width: int = 32, annotate: bool = True, force_sharing: bool = False) -> None:
        super().__init__()
        self.backbone = Backbone(width)
        self.view_transformation = ViewTransformation(width, annotate)
        self.obstacle_head = ObstacleHead(width)
        self.map_head = MapHead(width, force_sharing=force_sharing)

    def forward(
        self, images: Tensor, reference_points: Tensor, cameras: Sequence[int]
    ) -> dict[str, list[dict[str, Tensor]]]:
        """What both heads find, layer by layer.

        Args:
            images: ``(N, cameras, 3, H, W)``, normalised.
            reference_points: ``(1, cameras, CELLS**2, heights, 2)``: where each camera sees the cells, -1 to 1 as
                ``grid_sample`` wants it, or NOT_VISIBLE.
            cameras: numbers of the cameras.
        """
        levels = [f.unflatten(0, (len(images), -1)) for f in self.backbone(images.flatten(0, 1))]
        bev = self.view_transformation(levels, reference_points, cameras)
        return {"obstacles": self.obstacle_head(bev), "map": self.map_head(bev)}
