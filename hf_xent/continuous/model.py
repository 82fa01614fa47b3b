"""Sequences of vectors: a decoder of transformers reads them, and `DigitHead` predicts the next one as digits.

    h_0, h_1, ... = backbone([s, U x_1, U x_2, ...])        s one learned vector, or that of the sequence's class
    p(digits of x_t | x_1..x_t-1) = DigitHead(h_t-1),       loss = mean of its nats over vectors and digits

    quantiles = Quantiles.fit(rows, levels=64)                                   # rows [N, D]
    config = DigitModelConfig(GPT2Config(vocab_size=1, n_embd=64, n_layer=2, n_head=4), **quantiles.to_dict())
    model = DigitModel(config)
    model(values, labels=values).loss                                            # values [B, T, D]
    model.generate(values, steps=24)                                             # [B, 24, D]

`values`, `tails` and the normalisation are in the configuration, so a saved model knows its units. `inputs` says what
the backbone reads of a vector: its numbers, normalised ('values'); the same rounded to their digits, as it finds them
when it generates ('rounded', as published); or a sum of embeddings of digits ('digits').

Importing this file registers both classes, so that `AutoModel` loads what was saved. The file is saved with the model,
which with `trust_remote_code=True` also loads where hf_xent is not installed.

Source: Wang et al. 2025, arXiv:2503.16430, for digits on a decoder; they predict masked tokens of images, this
model the next vector.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from transformers import AutoConfig, AutoModel, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .head import DigitHead, ZeroLinear, check_head
from .quantiles import Quantiles

INPUTS = ("values", "rounded", "digits")


class DigitModelConfig(PreTrainedConfig):
    """Configuration of `DigitModel`.

    Args:
        backbone_config: The configuration of the decoder, or its fields as a dictionary with `model_type`.
        values: The values of digits [D, L], those of `Quantiles`; a row for each dimension.
        tails: As for `Quantiles`.
        kind: The kind of head: 'factorised', 'autoregressive' or 'random_order'.
        layers: As for `DigitHead`.
        width: As for `DigitHead`.
        heads: As for `DigitHead`.
        sigma: As for `DigitHead`.
        inputs: What the backbone reads: 'values', 'rounded' or 'digits'.
        mean: What is subtracted from each dimension of the inputs [D]; nothing if None.
        std: What it is divided by [D], above 0; nothing if None.
        classes: How many classes sequences have; 0 for none.
        **kwargs: As for `transformers.PreTrainedConfig`.

    Raises:
        ValueError: A kind of head or input that is unknown, or numbers out of range.
    """

    model_type = "hf_xent_digits"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": AutoConfig}

    def __init__(  # noqa: PLR0913  one argument for each field of the configuration
        self, backbone_config: Any = None, values: list[list[float]] | None = None,
        tails: list[list[float]] | None = None, kind: str = "autoregressive", layers: int | None = None,
        width: int = 64, heads: int = 4, sigma: float = 0.0, inputs: str = "values", mean: list[float] | None = None,
        std: list[float] | None = None, classes: int = 0, **kwargs: Any,
    ):  # fmt: skip
        if isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**backbone_config)
        if backbone_config is None:
            small = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
            backbone_config = AutoConfig.for_model("llama", vocab_size=1, bos_token_id=None, eos_token_id=None, **small)
        values = [[-1.0, 1.0]] if values is None else values
        dims = len(values)
        self.layers = check_head(dims, len(values[0]), kind, layers, width, heads, sigma)
        if inputs not in INPUTS:
            raise ValueError(f"inputs is {inputs!r}: choose one of {', '.join(INPUTS)}")
        for name, given in (("mean", mean), ("std", std)):
            if given is not None and inputs == "digits":
                raise ValueError(f"{name} is given, but inputs is 'digits', which are not scaled: leave it out")
            if given is not None and len(given) != dims:
                raise ValueError(f"{name} has {len(given)} numbers: give one for each of {dims} dimensions of values")
        if std is not None and not min(std) > 0:
            raise ValueError(f"std has the number {min(std)}: give 1 for a dimension that is constant")
        if not isinstance(classes, int) or classes < 0:
            raise ValueError(f"classes is {classes!r}: choose 0, or the number of classes")
        self.backbone_config, self.values, self.tails, self.kind = backbone_config, values, tails, kind
        self.width, self.heads, self.sigma, self.inputs = width, heads, sigma, inputs
        self.mean, self.std, self.classes = mean, std, classes
        super().__init__(**kwargs)


@dataclass
class DigitModelOutput(ModelOutput):
    """What `DigitModel` returns.

    Args:
        loss: The mean of nats over vectors and digits, if labels are given.
        nll: -log p of every digit, given the vectors before [B, T, D] (and the digits before it, unless factorised).
        last_hidden_state: What the head reads [B, T + 1, H]: element t predicts vector t, counted from 0.
    """

    loss: Tensor | None = None
    nll: Tensor | None = None
    last_hidden_state: Tensor | None = None


class DigitModel(PreTrainedModel):
    """A decoder over vectors with a `DigitHead`; see the module's docstring."""

    config_class = DigitModelConfig
    main_input_name = "values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    mean: Tensor
    std: Tensor

    def __init__(self, config: DigitModelConfig):
        super().__init__(config)
        self.quantiles = Quantiles(config.values, config.tails)
        dims, levels = self.quantiles.values.shape
        self.backbone = AutoModel.from_config(config.backbone_config)
        hidden = config.backbone_config.hidden_size
        self.start = nn.Embedding(max(1, config.classes), hidden)
        self.embed = nn.Embedding(dims * levels, hidden) if config.inputs == "digits" else nn.Linear(dims, hidden)
        options = {name: getattr(config, name) for name in ("kind", "layers", "width", "heads", "sigma")}
        self.head = DigitHead(hidden, dims, levels, **options)
        self.register_buffer("mean", torch.tensor(config.mean or [0.0] * dims))
        self.register_buffer("std", torch.tensor(config.std or [1.0] * dims))
        named = inspect.signature(self.backbone.forward).parameters
        self._cache_name = "cache" if "cache" in named else "past_key_values"  # renamed in transformers 5
        self._has_positions = "position_ids" in named
        self.post_init()

    @classmethod
    def from_backbone(cls, backbone: PreTrainedModel, quantiles: Quantiles, **options: Any) -> DigitModel:
        """A model on a decoder that has weights already.

        Args:
            backbone: A decoder as `AutoModel` loads it, without a head; it becomes part of the model.
            quantiles: Values of digits, a row for each dimension.
            **options: Fields of `DigitModelConfig`.

        Returns:
            The model, whose other weights are new.
        """
        model = cls(DigitModelConfig(backbone.config, **quantiles.to_dict(), **options)).to(backbone.dtype)
        model.backbone = backbone
        return model

    def _init_weights(self, module: nn.Module) -> None:
        """Modulations start at 0, the others as transformers' layers do."""
        if isinstance(module, ZeroLinear):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        """What embeds vectors, or their digits."""
        return self.embed

    def forward(
        self, values: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        classes: Tensor | None = None, order: Tensor | None = None,
    ) -> DigitModelOutput:  # fmt: skip
        """Hidden states that predict each vector from those before it, and the loss if labels are given.

        Args:
            values: Sequences of vectors [B, T, D], in the units of the quantiles.
            attention_mask: 1 for a vector, 0 for padding [B, T]; what is there may be anything. All ones if None.
            labels: The vectors to predict [B, T, D], as a rule `values` itself: they are shifted here. nan is ignored.
            classes: The class of each sequence [B], if the configuration has classes.
            order: Dimensions in the order of prediction [D], for a head of random order; None draws in training.

        Returns:
            The loss, nats of each digit, and the hidden states.

        Raises:
            ValueError: Shapes that do not fit, classes that are missing or not wanted, nan among values.
        """
        self._check(values, classes)
        if labels is not None and labels.shape != values.shape:
            raise ValueError(f"labels has shape {tuple(labels.shape)}: give that of values, {tuple(values.shape)}")
        mask = values.new_ones(values.shape[:2], dtype=torch.long) if attention_mask is None else attention_mask.long()
        hidden = self._states(values, classes, mask, attention_mask is not None)
        if labels is None:
            return DigitModelOutput(last_hidden_state=hidden)
        known = mask[..., None].bool() & ~labels.isnan()
        digits = self.quantiles.encode(labels.where(known, 0.0)).where(known, -100).flatten(0, 1)
        given = hidden[:, :-1].flatten(0, 1)
        trained = self.head.loss(given, digits, order)
        loss = trained.sum() / known.sum().clamp(min=1)
        nll = trained if not (self.training or self.config.sigma) else self.head.nll(given, digits, order).detach()
        return DigitModelOutput(loss=loss, nll=nll.view(labels.shape), last_hidden_state=hidden)

    @torch.no_grad()
    def generate(
        self, values: Tensor, steps: int, temperature: float = 1.0, seed: int | None = None,
        classes: Tensor | None = None, use_cache: bool = True,
    ) -> Tensor:  # fmt: skip
        """Vectors that continue sequences, drawn one after another.

        Args:
            values: Sequences without padding [B, T, D]; T is 0 to begin from nothing.
            steps: How many vectors to draw, at least 1.
            temperature: Divides the logits of digits; 0 takes the most likely one.
            seed: Makes the draws repeatable; None uses torch's own generator.
            classes: As for `forward`.
            use_cache: Whether the backbone keeps keys and values; without, it reads the whole sequence at every step.

        Returns:
            The new vectors [B, steps, D], in the type of `values`.

        Raises:
            ValueError: As for `forward`, no step, or a temperature as for `DigitHead.sample`.
        """
        self._check(values, classes)
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps is {steps!r}: choose a whole number of at least 1")
        generator = None if seed is None else Generator().manual_seed(seed)
        drawn = []
        embeds = torch.cat([self._first(values, classes), self._embedded(values)], 1)
        cache = DynamicCache(config=self.config.backbone_config) if use_cache else None
        for _ in range(steps):
            kept = {"use_cache": True, self._cache_name: cache} if use_cache else {"use_cache": False}
            hidden = self.backbone(inputs_embeds=embeds, **kept).last_hidden_state[:, -1]
            digits = self.head.sample(hidden, temperature, generator)
            drawn.append(self.quantiles.decode(digits, values.dtype))
            new = self._embedded(drawn[-1][:, None])
            embeds = new if use_cache else torch.cat([embeds, new], 1)
        return torch.stack(drawn, 1)

    def _states(self, values: Tensor, classes: Tensor | None, mask: Tensor, padded: bool) -> Tensor:
        """Hidden states [B, T + 1, H]."""
        values = values.where(mask[..., None].bool(), 0.0)  # padding may be nan
        embeds = torch.cat([self._first(values, classes), self._embedded(values)], 1)
        given: dict[str, Tensor] = {}
        if padded:  # on the left, too: the first element comes before it
            given["attention_mask"] = torch.cat([mask.new_ones(len(mask), 1), mask], 1)
            if self._has_positions:
                given["position_ids"] = given["attention_mask"].cumsum(1) - 1
        hidden = self.backbone(inputs_embeds=embeds, use_cache=False, **given).last_hidden_state
        if not padded:
            return hidden
        places = torch.arange(hidden.shape[1], device=hidden.device) * given["attention_mask"]
        return hidden.gather(1, places.cummax(1).values[..., None].expand_as(hidden))  # of the last that is no padding

    def _first(self, values: Tensor, classes: Tensor | None) -> Tensor:
        """The element before the first vector [B, 1, H]."""
        ids = torch.zeros(len(values), dtype=torch.long, device=values.device) if classes is None else classes
        return self.start(ids)[:, None]

    def _embedded(self, values: Tensor) -> Tensor:
        """What the backbone reads of vectors [B, T, D]: [B, T, H]."""
        if self.config.inputs == "digits":
            ids = self.quantiles.encode(values)
            return self.embed(ids + torch.arange(ids.shape[-1], device=ids.device) * self.quantiles.levels).sum(-2)
        if self.config.inputs == "rounded":
            values = self.quantiles.round(values)
        return self.embed(((values.float() - self.mean.float()) / self.std.float()).to(self.embed.weight.dtype))

    def _check(self, values: Tensor, classes: Tensor | None) -> None:
        dims = len(self.quantiles.values)
        if values.ndim != 3 or values.shape[-1] != dims:
            raise ValueError(f"values has shape {tuple(values.shape)}: give sequences of vectors, [B, T, {dims}]")
        if (classes is None) != (self.config.classes == 0):
            given = "missing" if classes is None else "given"
            raise ValueError(f"classes is {given}, but the model has {self.config.classes}: set classes of its config")


AutoConfig.register(DigitModelConfig.model_type, DigitModelConfig, exist_ok=True)
AutoModel.register(DigitModelConfig, DigitModel, exist_ok=True)
DigitModelConfig.register_for_auto_class()
DigitModel.register_for_auto_class("AutoModel")
