"""Landmarks on closed rings instead of pixels: HybridGNet on the feature maps of any backbone of transformers.

    z = mu + exp(logvar / 2) noise                 mu and logvar from the last map; in evaluation z = mu
    h = relu(W z)                                  half as many nodes as landmarks, M
    h = relu(norm(conv(h)))                        graph convolutions: two, a skip, one; then U doubles the nodes to N;
                                                   one more, a skip, and one
    skip: p = W h, h = [h, map around p, p]        provisional positions look at the image: twice, on M and on N nodes
    landmarks = W h                                x and y from 0 to 1 across the image
    loss = MSE(landmarks, y) + MSE(p_1, D y) + MSE(p_2, y) + kl_weight KL
    KL = -1/2 mean(1 + logvar - mu^2 - exp(logvar))

Each output is a set of closed rings: unlike a mask, it has no pieces and no holes of its own, but a ring may cross
itself, and nothing keeps two rings apart. `norm` is over the features of a node, which is what the authors' layer of
InstanceNorm does to nodes; it has no parameters. The latent variable is read from the last map at a fixed size, so that
images may have any size; theirs have one.

    config = LandmarkConfig(backbone_config=ResNetConfig(out_features=["stage3", "stage4"]), rings=[44, 50, 26])
    model = LandmarkModel(config)

Importing this file registers both classes, so that `AutoModelForKeypointDetection` loads what was saved. The file is
saved with the model, which with `trust_remote_code=True` also loads where hf_xent is not installed.

Source: Gaggion et al. 2022, arXiv:2203.10977 (code ngaggion/HybridGNet, whose encoder is a network of its own).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    AutoBackbone,
    AutoConfig,
    AutoModelForKeypointDetection,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ModelOutput

from .landmark_graphs import ChebyshevConvolution, around, halved, laplacian, ring, ring_matrices

MISSING = -100


class LandmarkConfig(PreTrainedConfig):
    """Configuration of `LandmarkModel`.

    Args:
        backbone_config: That of a backbone, with `out_features`; or its dict. A ResNet-50 if it is left out.
        rings: The number of landmarks of each ring, from 3.
        latent_size: The number of latent variables.
        latent_map: Height and width to which the last map is averaged before the latent variables are read from it.
        width: The number f of features of a landmark; of the half as many nodes it is f/2.
        order: The number K of Chebyshev polynomials.
        skip_maps: Which maps the two skips look at: the first is that of M nodes, the second of N; none if empty.
        wrap: Whether doubling and halving treat a ring as closed; as published, they do not.
        kl_weight: The factor of the divergence.
        initializer_range: Standard deviation of the first weights of the decoder.
        **kwargs: As for `transformers.PreTrainedConfig`.

    Raises:
        ValueError: A ring of fewer than 3 landmarks, a number of skips that is neither 0 nor 2, a width that is odd, a
            size or an order below 1, or a negative weight.
    """

    model_type = "hf_xent_landmarks"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012  transformers' own name and kind
    # What the Trainer leaves out of predictions, which are then the landmarks alone.
    keys_to_ignore_at_inference = ["provisional", "mu", "logvar"]  # noqa: RUF012

    def __init__(  # noqa: PLR0913  one argument for each field of the configuration
        self, backbone_config: Any = None, rings: list[int] | tuple[int, ...] = (44, 50, 26), latent_size: int = 64,
        latent_map: tuple[int, int] | list[int] = (8, 8), width: int = 32, order: int = 6,
        skip_maps: list[int] | tuple[int, ...] = (-1, -2), wrap: bool = False, kl_weight: float = 1e-5,
        initializer_range: float = 0.1, **kwargs: Any,
    ):  # fmt: skip
        ring_matrices(rings)  # refuses what is no ring
        if len(skip_maps) not in (0, 2):
            raise ValueError(f"skip_maps is {list(skip_maps)}: name two maps, or none")
        if width < 2 or width % 2:
            raise ValueError(f"width is {width}: choose an even number, half of which the first nodes have")
        if min(latent_size, order, *latent_map) < 1 or len(latent_map) != 2:
            raise ValueError(
                f"latent_size is {latent_size}, latent_map {list(latent_map)}, order {order}: choose 1 or more each, "
                "and a height and a width"
            )
        if kl_weight < 0:
            raise ValueError(f"kl_weight is {kl_weight}: choose 0 or more")
        if backbone_config is None:
            backbone_config = CONFIG_MAPPING["resnet"](out_features=["stage3", "stage4"])
        elif isinstance(backbone_config, dict):
            backbone_config = CONFIG_MAPPING[backbone_config["model_type"]].from_dict(backbone_config)
        self.backbone_config, self.rings = backbone_config, list(rings)
        self.latent_size, self.latent_map, self.width, self.order = latent_size, list(latent_map), width, order
        self.skip_maps, self.wrap, self.kl_weight = list(skip_maps), wrap, kl_weight
        self.initializer_range = initializer_range
        super().__init__(**kwargs)


@dataclass
class LandmarkOutput(ModelOutput):
    """What `LandmarkModel` returns.

    Args:
        loss: The objective, if labels are given.
        landmarks: x and y [B, N, 2], from 0 to 1 across the image, ring after ring.
        provisional: The positions [B, M, 2] and [B, N, 2] at which the skips look; None without skips.
        mu: The means of the latent variables [B, latent_size].
        logvar: The logs of their variances.
    """

    loss: Tensor | None = None
    landmarks: Tensor | None = None
    provisional: tuple[Tensor, Tensor] | None = None
    mu: Tensor | None = None
    logvar: Tensor | None = None


class Graph(nn.Module):
    """The fixed matrices of rings; they are saved with the weights, and made anew where weights are initialised."""

    laplacian: Tensor  # [N, N]
    coarse: Tensor  # [M, M], the Laplacian of half as many nodes
    down: Tensor  # [M, N]
    up: Tensor  # [N, M]

    def __init__(self, config: LandmarkConfig):
        super().__init__()
        self.rings, self.wrap = config.rings, config.wrap
        for name, matrix in self.made().items():
            self.register_buffer(name, matrix)

    def made(self) -> dict[str, Tensor]:
        """The matrices by name."""
        adjacency, down, up = ring_matrices(self.rings, self.wrap)
        coarse = torch.block_diag(*map(ring, halved(self.rings)))
        return {"laplacian": laplacian(adjacency), "coarse": laplacian(coarse), "down": down, "up": up}


class Skip(nn.Module):
    """Provisional positions of nodes, and what a feature map has around them."""

    def __init__(self, features: int):
        super().__init__()
        self.position = nn.Linear(features, 2, bias=False)

    def forward(self, h: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, N, D + C + 2] and positions [B, N, 2], from features [B, N, D] and maps [B, C, H, W]."""
        positions = self.position(h)
        return torch.cat([h, around(maps, positions).to(h.dtype), positions], -1), positions


class Decoder(nn.Module):
    """From latent variables and feature maps to landmarks."""

    def __init__(self, config: LandmarkConfig, channels: list[int]):
        super().__init__()
        f, half, order = config.width, config.width // 2, config.order
        self.nodes, self.skip_maps = sum(halved(config.rings)), config.skip_maps
        first, second = (channels[i] + 2 for i in config.skip_maps) if config.skip_maps else (0, 0)
        self.graph = Graph(config)
        self.start = nn.Linear(config.latent_size, self.nodes * half)
        sizes = [(half, half), (half, half), (half + first, f), (f, f), (f + second, f)]
        self.convolutions = nn.ModuleList(ChebyshevConvolution(a, b, order) for a, b in sizes)
        self.skips = nn.ModuleList([Skip(half), Skip(f)] if config.skip_maps else [])
        self.landmarks = nn.Linear(f, 2, bias=False)

    def forward(self, z: Tensor, maps: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Landmarks [B, N, 2] and provisional positions, from latent variables [B, latent_size] and the maps."""
        h, provisional = self.start(z).relu().unflatten(1, (self.nodes, -1)), []
        for i, convolution in enumerate(self.convolutions):
            if i in (2, 4) and self.skips:
                skip = i // 2 - 1
                h, positions = self.skips[skip](h, maps[self.skip_maps[skip]])
                provisional.append(positions)
            h = convolution(h, self.graph.coarse if i < 3 else self.graph.laplacian)
            h = F.layer_norm(h, h.shape[-1:]).relu()
            if i == 2:
                h = self.graph.up @ h
        return self.landmarks(h), tuple(provisional)


class LandmarkModel(PreTrainedModel):
    """Finds the landmarks of closed rings in images; see the module's docstring.

    Args:
        config: A `LandmarkConfig`.

    Raises:
        ValueError: A skip that looks at a map that the backbone does not return.
    """

    config_class = LandmarkConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: LandmarkConfig):
        super().__init__(config)
        self.backbone = AutoBackbone.from_config(config.backbone_config)
        channels = list(self.backbone.channels)
        if any(not -len(channels) <= i < len(channels) for i in config.skip_maps):
            raise ValueError(
                f"skip_maps is {config.skip_maps}, but the backbone returns {len(channels)} maps: add stages to its "
                "out_features, or name others"
            )
        size = channels[-1] * config.latent_map[0] * config.latent_map[1]
        self.mu, self.logvar = nn.Linear(size, config.latent_size), nn.Linear(size, config.latent_size)
        self.decoder = Decoder(config, channels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The decoder starts with normal numbers, as published; the latent layers as torch's do."""
        if module in (self.mu, self.logvar):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            for parameter in filter(lambda p: p is not None, (module.weight, module.bias)):
                nn.init.normal_(parameter, std=self.config.initializer_range)
        elif isinstance(module, Graph):
            for name, matrix in module.made().items():
                getattr(module, name).copy_(matrix)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> LandmarkOutput:
        """Landmarks of images, and the loss if labels are given.

        Args:
            pixel_values: Images [B, C, H, W], of any size that the backbone takes.
            labels: x and y of landmarks [B, N, 2], from 0 to 1 across the image as it is given (with its padding). A
                landmark with a coordinate that is not finite, or -100, is missing and counts nowhere.

        Returns:
            A `LandmarkOutput`.

        Raises:
            ValueError: Labels of another shape than the rings have.
        """
        maps = self.backbone(pixel_values).feature_maps
        latent = F.adaptive_avg_pool2d(maps[-1], self.config.latent_map).flatten(1)
        mu, logvar = self.mu(latent), self.logvar(latent)
        z = mu + torch.exp(logvar / 2) * torch.randn_like(mu) if self.training else mu
        landmarks, provisional = self.decoder(z, maps)
        loss = None
        if labels is not None:
            if labels.shape != landmarks.shape:
                raise ValueError(
                    f"labels has the shape {tuple(labels.shape)}: give x and y of the {landmarks.shape[1]} landmarks "
                    f"of each of {len(landmarks)} images, {tuple(landmarks.shape)}"
                )
            loss = self._loss(landmarks, provisional, labels.to(landmarks.device))
            spread = 1 + _wide(logvar) - _wide(mu) ** 2 - _wide(logvar).exp()
            loss = loss - self.config.kl_weight * spread.mean() / 2
        return LandmarkOutput(loss=loss, landmarks=landmarks, provisional=provisional or None, mu=mu, logvar=logvar)

    def _loss(self, landmarks: Tensor, provisional: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """The squared errors of final and provisional positions, of landmarks that are known."""
        known = (labels.isfinite() & (labels != MISSING)).all(-1)
        target = _wide(labels).where(known[..., None], 0)
        loss = _mse(landmarks, target, known)
        if provisional:
            down = self.decoder.graph.down.to(target.dtype)
            halves = (~known).to(target.dtype) @ down.T == 0  # all nodes of the mean are known
            loss = loss + _mse(provisional[0], down @ target, halves) + _mse(provisional[1], target, known)
        return loss


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mse(found: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """The mean of squared errors of coordinates [B, N, 2] over nodes that are known [B, N]; 0 if there are none."""
    squares = ((_wide(found) - target) ** 2).mean(-1)
    return squares.where(known, 0).sum() / known.sum().clamp(min=1)


AutoConfig.register(LandmarkConfig.model_type, LandmarkConfig, exist_ok=True)
AutoModelForKeypointDetection.register(LandmarkConfig, LandmarkModel, exist_ok=True)
LandmarkConfig.register_for_auto_class()
LandmarkModel.register_for_auto_class("AutoModelForKeypointDetection")
