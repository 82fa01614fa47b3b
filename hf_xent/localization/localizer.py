"""A classifier of images that also tells where its classes are, trained on labels of images alone.

    F = the features of a middle layer [B, D, h, w]            tokens of patches are a grid, special tokens stay
    M = sigmoid(conv3x3(F))                                    `maps` [B, C, h, w], a mask for each class
    s = logits of F,   s' = logits of F M_y,   b = logits of sg[F] (1 - M_y) by the network with frozen parameters
    L = CE(s, y) + alpha CE(s', y) + BAS(s, b, y) + beta area(M_y)

`suppression.py` has the terms. Any AutoModelForImageClassification can be the classifier, with stages of maps or blocks
of tokens: `replay.py` runs what comes after the layer again, so a step costs one forward more for s' and one for b, of
the layers after it. The running statistics of batch norm are those of whole images, since s is what it predicts with.

    model = Localizer.from_classifier(AutoModelForImageClassification.from_pretrained("microsoft/resnet-18"))
    Trainer(model, arguments, train_dataset=rows).train()      # rows of pixel_values and labels
    found = localize(model, pixel_values)                      # maps, masks and boxes in pixels

Networks with layer norm do not notice that a token, or a cell of a map, is multiplied by a number if a norm comes next:
it takes the number out again, and a mask between 0 and 1 gets no gradient. There, features F0 of a blank image, of
zeros, take the place of what is erased, instead of zeros: F M + F0 (1 - M). The special tokens of a vision transformer
stay, and after some blocks they know the class by themselves, so that the layer should be an early one there.

The authors multiply the class maps of the last layer by the mask for s'; here the features of the layer are masked in
both passes, which every architecture has. Importing this file registers both classes; it is saved with the model.

Source: Wu, Zhai and Cao 2022, arXiv:2112.00580, and Zhai et al. 2023, arXiv:2309.12943 (BAS).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .replay import as_grid, record, stack, times
from .suppression import background_activation, mask_area, suppression_loss


@dataclass
class LocalizerOutput(ModelOutput):
    """What `Localizer` returns.

    Args:
        loss: The loss in nats, if labels were given.
        logits: Logits of classes [B, C], of the image as it is.
        maps: The mask of each class [B, C, h, w], from 0 to 1.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    maps: Tensor | None = None


class LocalizerConfig(PreTrainedConfig):
    """Configuration of `Localizer`.

    Args:
        classifier: The configuration of the classifier, or its dict; that of a ResNet if None.
        layer: The name of the classifier's module whose features are masked.
        feature_size: The width D of its features.
        blank: Whether features of a blank image take the place of what is erased; zeros otherwise.
        special_tokens: How many tokens come before those of patches; what is beyond a grid if None.
        alpha: The weight of the cross-entropy of what the mask keeps, 0 or more.
        beta: The weight of the area, 0 or more.
        background: Whether the loss has BAS; without it, and with alpha, a mask is learned by cross-entropy.
        saturate: As for `background_activation`.
        top_classes: Over how many predicted classes `localize` takes the mean of maps.
        **kwargs: As for `transformers.PreTrainedConfig`; classes and their names are those of the classifier.

    Raises:
        ValueError: A weight is negative, or top_classes is below 1.
    """

    model_type = "hf_xent_localizer"
    sub_configs = {"classifier": AutoConfig}  # noqa: RUF012  as in transformers
    keys_to_ignore_at_inference = ["maps"]  # noqa: RUF012  so that a Trainer's metrics see logits

    def __init__(  # noqa: PLR0913  one argument for each field of the configuration
        self, classifier: PreTrainedConfig | dict[str, Any] | None = None, layer: str = "resnet.encoder.stages.2",
        feature_size: int = 1024, blank: bool = False, special_tokens: int | None = None, alpha: float = 0.5,
        beta: float = 1.5, background: bool = True, saturate: bool = False, top_classes: int = 1, **kwargs: Any,
    ):  # fmt: skip
        for name, weight in (("alpha", alpha), ("beta", beta)):
            if not weight >= 0:
                raise ValueError(f"{name} is {weight}: choose 0 or more")
        if top_classes < 1:
            raise ValueError(f"top_classes is {top_classes}: choose 1 or more classes")
        if classifier is None or isinstance(classifier, dict):
            inner = AutoConfig.for_model(**(classifier or {"model_type": "resnet"}))
        else:  # not the classifier's own: transformers sets the attention of configurations inside this one
            inner = copy.deepcopy(classifier)
        self.classifier, self.layer, self.feature_size = inner, layer, feature_size
        self.blank, self.special_tokens, self.alpha, self.beta = blank, special_tokens, alpha, beta
        self.background, self.saturate, self.top_classes = background, saturate, top_classes
        names = {"id2label": inner.id2label, "label2id": inner.label2id}
        super().__init__(**names | kwargs)


class Localizer(PreTrainedModel):
    """A classifier with a mask for each class.

    Args:
        config: The configuration.
        classifier: The classifier; one with random weights if None.
    """

    config_class = LocalizerConfig
    main_input_name = "pixel_values"
    accepts_loss_kwargs = False  # the loss is a mean over the images of a batch
    supports_gradient_checkpointing = False  # a layer that is computed again would not have the features of a replay

    def __init__(self, config: LocalizerConfig, classifier: PreTrainedModel | None = None):
        super().__init__(config)
        if classifier is None:
            classifier = AutoModelForImageClassification.from_config(config.classifier)
        self.classifier = classifier
        self.generator = nn.Conv2d(config.feature_size, config.num_labels, 3, padding=1)
        self.post_init()

    @classmethod
    def from_classifier(cls, classifier: PreTrainedModel, layer: str | None = None, **options: Any) -> Localizer:
        """A localizer that has this classifier, the object itself, and masks that are 1/2 nearly everywhere.

        Args:
            classifier: An AutoModelForImageClassification.
            layer: The name of the module whose features are masked; early ones have finer maps and know less. If None,
                the stage or block three quarters of the way through, or one quarter with special tokens.
            **options: As for `LocalizerConfig`, such as alpha and beta; blank is True for networks with layer norm.

        Returns:
            The localizer, to be trained.

        Raises:
            ValueError: There is no such module, or its features are neither maps nor tokens.
        """
        names = stack(classifier) if layer is None else []
        layer = layer or names[max(3 * len(names) // 4 - 1, 0)]
        config: Any = copy.deepcopy(classifier.config)
        config.architectures = [type(classifier).__name__]  # which of several a configuration may stand for
        side = getattr(config, "image_size", None) or 64
        size = (side, side) if isinstance(side, int) else tuple(side)
        image = torch.zeros(1, config.num_channels, *size, device=classifier.device, dtype=classifier.dtype)
        features = _features(classifier, layer, image)
        grid = as_grid(features, size, options.get("special_tokens"))
        if names and features.ndim == 3 and features.shape[1] > grid[0, 0].numel():
            layer = names[max(len(names) // 4 - 1, 0)]  # all blocks have the same shapes
        norms = [type(m).__name__ for m in classifier.modules()]
        options = {"blank": any("LayerNorm" in x or "RMSNorm" in x for x in norms), **options}
        made = cls(LocalizerConfig(config, layer, grid.shape[1], **options), classifier)
        made.generator.to(classifier.device, classifier.dtype)
        return made.train(classifier.training)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> LocalizerOutput:
        """Logits and maps of images, and the loss if labels are given.

        Args:
            pixel_values: Images [B, channels, H, W].
            labels: Ids of classes [B].
            **kwargs: Passed to the classifier.

        Returns:
            The output.

        Raises:
            ValueError: Labels that are not one id for each image; or the model is a copy that `nn.DataParallel` made,
                whose parameters cannot be frozen.
        """
        if next(self.parameters(), None) is None:
            raise ValueError("the model is a copy that nn.DataParallel made, without parameters: start torchrun")
        outputs, forward = record(self.classifier, self.config.layer, pixel_values, return_dict=True, **kwargs)
        features = forward.features
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        maps = self.generator(as_grid(features, size, self.config.special_tokens)).sigmoid()
        if labels is None:
            return LocalizerOutput(logits=outputs.logits, maps=maps)
        if labels.shape != (len(pixel_values),) or labels.is_floating_point():
            raise ValueError(f"labels has shape {tuple(labels.shape)}, {labels.dtype}: give one id for each image, [B]")
        config, mask = self.config, maps[torch.arange(len(maps), device=maps.device), labels]
        image = torch.zeros_like(pixel_values[:1])
        blank = _features(self.classifier, config.layer, image, **kwargs) if config.blank else None
        terms: dict[str, Any] = {"alpha": config.alpha, "beta": config.beta}
        if config.alpha:
            terms["masked"] = forward.replay(times(features, mask, blank)).logits
        if config.background:
            erased = forward.replay(times(features.detach(), 1 - mask, blank), frozen=True).logits
            terms["background"] = background_activation(outputs.logits, erased, labels, saturate=config.saturate)
        loss = suppression_loss(outputs.logits, labels, area=mask_area(mask), **terms)
        return LocalizerOutput(loss=loss, logits=outputs.logits, maps=maps)


def _features(classifier: nn.Module, layer: str, images: Tensor, **kwargs: Any) -> Tensor:
    """The features of a layer, constant and in evaluation, as batch norm learns nothing of them."""
    modes = [(module, module.training) for module in classifier.modules()]
    try:
        with torch.no_grad():
            return record(classifier.eval(), layer, images, return_dict=True, **kwargs)[1].features
    finally:
        for module, training in modes:
            module.training = training


AutoConfig.register(LocalizerConfig.model_type, LocalizerConfig, exist_ok=True)
AutoModelForImageClassification.register(LocalizerConfig, Localizer, exist_ok=True)
LocalizerConfig.register_for_auto_class()
Localizer.register_for_auto_class("AutoModelForImageClassification")
