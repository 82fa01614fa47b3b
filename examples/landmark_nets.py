"""The networks of landmarks.py beside `LandmarkModel`: a U-Net for masks, and shapes that are linear in features.

Both are called as models of transformers are: `model(pixel_values, labels)` returns a dict with the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoBackbone, ResNetConfig

from hf_xent.models.landmarks import LandmarkConfig, LandmarkModel

BACKBONE: dict[str, Any] = {
    "num_channels": 1, "embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic",
    "out_features": ["stage1", "stage2", "stage3"],
}  # fmt: skip


def landmark_model(points: int, skips: bool) -> LandmarkModel:
    """Half as many nodes look at maps of 8 x 8 cells, all nodes at maps of 16 x 16."""
    sizes: dict[str, Any] = {"latent_map": (4, 4), "latent_size": 32, "skip_maps": [1, 0] if skips else []}
    return LandmarkModel(LandmarkConfig(backbone_config=ResNetConfig(**BACKBONE), rings=[points], **sizes))


class LinearShapes(nn.Module):
    """The mean shape and principal components of shapes [n, N, 2], weighted by linear functions of the last map."""

    def __init__(self, shapes: Tensor, components: int = 20):
        super().__init__()
        self.backbone = AutoBackbone.from_config(ResNetConfig(**BACKBONE))
        self.mean, rows = nn.Buffer(shapes.mean(0)), (shapes - shapes.mean(0)).flatten(1)
        _, scale, directions = torch.linalg.svd(rows, full_matrices=False)
        self.components = nn.Buffer(directions[:components] * scale[:components, None] / len(rows) ** 0.5)
        self.weights = nn.Linear(BACKBONE["hidden_sizes"][-1] * 4 * 4, len(self.components))

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss and landmarks [B, N, 2] of images, given landmarks."""
        weights = self.weights(self.backbone(pixel_values).feature_maps[-1].flatten(1))
        landmarks = self.mean + (weights @ self.components).view(-1, *self.mean.shape)
        return {"loss": F.mse_loss(landmarks, labels), "landmarks": landmarks}


class UNet(nn.Module):
    """Three levels of two 3 x 3 convolutions; logits of cells of 2 x 2 pixels, enlarged; CE, and soft Dice if asked."""

    def __init__(self, dice: bool, widths: tuple[int, ...] = (16, 32, 64)):
        super().__init__()
        self.dice, pairs = dice, list(zip((widths[0], *widths[:-1]), widths, strict=True))
        self.stem = nn.Conv2d(1, widths[0], 3, stride=2, padding=1)
        self.down = nn.ModuleList(self.block(a, b) for a, b in pairs)
        self.up = nn.ModuleList(self.block(a + b, a) for a, b in reversed(pairs[1:]))
        self.head = nn.Conv2d(widths[0], 2, 1)

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Module:
        """Two convolutions, each with batch norm and ReLU."""
        layers = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        return nn.Sequential(*layers, nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss and logits [B, 2, H, W], given ids [B, H, W]."""
        x, maps = self.stem(pixel_values), []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if i else x)
            maps.append(x)
        for block, skip in zip(self.up, maps[-2::-1], strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2, mode="bilinear"), skip], 1))
        logits = F.interpolate(self.head(x), scale_factor=2, mode="bilinear")
        loss = F.cross_entropy(logits, labels)
        if self.dice:
            p = logits.softmax(1)[:, 1]
            both, sizes = (p * labels).sum((1, 2)), p.sum((1, 2)) + labels.sum((1, 2))
            loss = loss + (1 - (2 * both + 1) / (sizes + 1)).mean()
        return {"loss": loss, "logits": logits}
