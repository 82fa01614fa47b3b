"""A classifier of images that also tells where its classes are, trained on labels of images alone.

    F = the features of a middle layer [B, D, h, w]            tokens of patches are a grid, special tokens stay
    M = sigmoid(conv3x3(F))                                    `maps` [B, C, h, w], a mask for each class
    s = logits of F,   s' = logits of F M_y,   b = logits of sg[F] (1 - M_y) by the network with frozen parameters
    L = CE(s, y) + alpha CE(s', y) + BAS(s, b, y) + beta area(M_y)

`suppression.py` has the terms. Any AutoModelForImageClassification can be the classifier, with stages of maps or blocks
of tokens: `replay.py` runs what comes after the layer again, so a step costs one forward more for s' and one for b, of
the layers after it. Batch norm sees s and s' in training, as the classifier has to know both.

    model = Localizer.from_classifier(AutoModelForImageClassification.from_pretrained("microsoft/resnet-18"))
    Trainer(model, arguments, train_dataset=rows).train()      # rows of pixel_values and labels
    found = localize(model, pixel_values)                      # maps, masks and boxes in pixels

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
        layer: The name of the classifier's module whose features are masked; the module three quarters of the way
            through its stages or blocks if None.
        feature_size: The width D of its features.
        special_tokens: How many tokens come before those of patches; what is beyond a grid if None.
        alpha: The weight of the cross-entropy of what the mask keeps, 0 or more.
        beta: The weight of the area, 0 or more.
        background: Whether the loss has BAS; without it, and with alpha, a mask is learned by cross-entropy.
        saturate: As for `background_activation`.
        top_k: Over how many predicted classes `localize` takes the mean of maps.
        **kwargs: As for `transformers.PreTrainedConfig`; classes and their names are those of the classifier.

    Raises:
        ValueError: A weight is negative, or top_k is below 1.
    """

    model_type = "hf_xent_localizer"
    sub_configs = {"classifier": AutoConfig}  # noqa: RUF012  as in transformers
    keys_to_ignore_at_inference = ["maps"]  # noqa: RUF012  so that a Trainer's metrics see logits

    def __init__(  # noqa: PLR0913  one argument for each field of the configuration
        self, classifier: PreTrainedConfig | dict[str, Any] | None = None, layer: str | None = None,
        feature_size: int = 1024, special_tokens: int | None = None, alpha: float = 0.5, beta: float = 1.5,
        background: bool = True, saturate: bool = False, top_k: int = 1, **kwargs: Any,
    ):  # fmt: skip
        for name, weight in (("alpha", alpha), ("beta", beta)):
            if not weight >= 0:
                raise ValueError(f"{name} is {weight}: choose 0 or more")
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}: choose 1 or more classes")
        if classifier is None or isinstance(classifier, dict):
            inner = AutoConfig.for_model(**(classifier or {"model_type": "resnet"}))
        else:  # not the classifier's own: transformers sets the attention of configurations inside this one
            inner = copy.deepcopy(classifier)
        self.classifier, self.layer, self.feature_size = inner, layer, feature_size
        self.special_tokens, self.alpha, self.beta = special_tokens, alpha, beta
        self.background, self.saturate, self.top_k = background, saturate, top_k
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
    supports_gradient_checkpointing = False  # a layer that is computed again would not have the features of a replay

    def __init__(self, config: LocalizerConfig, classifier: PreTrainedModel | None = None):
        super().__init__(config)
        if classifier is None:
            classifier = AutoModelForImageClassification.from_config(config.classifier)
        self.classifier = classifier
        self.layer = middle(classifier) if config.layer is None else config.layer
        self.generator = nn.Conv2d(config.feature_size, config.num_labels, 3, padding=1)
        self.post_init()

    @classmethod
    def from_classifier(cls, classifier: PreTrainedModel, layer: str | None = None, **options: Any) -> Localizer:
        """A localizer that has this classifier, the object itself, and masks that are 1/2 nearly everywhere.

        Args:
            classifier: An AutoModelForImageClassification.
            layer: The name of the module whose features are masked; early ones have finer maps and know less.
            **options: As for `LocalizerConfig`, such as alpha and beta.

        Returns:
            The localizer, to be trained.

        Raises:
            ValueError: There is no such module, or its features are neither maps nor tokens.
        """
        layer = middle(classifier) if layer is None else layer
        config: Any = classifier.config
        side = getattr(config, "image_size", None) or 64
        size = (side, side) if isinstance(side, int) else tuple(side)
        image = torch.zeros(1, config.num_channels, *size, device=classifier.device, dtype=classifier.dtype)
        training = classifier.training
        with torch.no_grad():
            features = record(classifier.eval(), layer, image)[1].features
        classifier.train(training)
        width = as_grid(features, size, options.get("special_tokens")).shape[1]
        made = cls(LocalizerConfig(classifier=config, layer=layer, feature_size=width, **options), classifier)
        made.generator.to(classifier.device, classifier.dtype)
        return made.train(training)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> LocalizerOutput:
        """Logits and maps of images, and the loss if labels are given.

        Args:
            pixel_values: Images [B, channels, H, W].
            labels: Ids of classes [B].
            **kwargs: Passed to the classifier.

        Returns:
            The output.

        Raises:
            ValueError: Labels that are not one id for each image.
        """
        outputs, forward = record(self.classifier, self.layer, pixel_values, return_dict=True, **kwargs)
        features = forward.features
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        maps = self.generator(as_grid(features, size, self.config.special_tokens)).sigmoid()
        if labels is None:
            return LocalizerOutput(logits=outputs.logits, maps=maps)
        if labels.shape != (len(pixel_values),) or labels.is_floating_point():
            raise ValueError(f"labels has shape {tuple(labels.shape)}, {labels.dtype}: give one id for each image, [B]")
        config, mask = self.config, maps[torch.arange(len(maps), device=maps.device), labels]
        terms: dict[str, Any] = {"alpha": config.alpha, "beta": config.beta}
        if config.alpha:
            terms["masked"] = forward.replay(times(features, mask)).logits
        if config.background:
            erased = forward.replay(times(features.detach(), 1 - mask), frozen=True).logits
            terms["background"] = background_activation(outputs.logits, erased, labels, saturate=config.saturate)
        loss = suppression_loss(outputs.logits, labels, area=mask_area(mask), **terms)
        return LocalizerOutput(loss=loss, logits=outputs.logits, maps=maps)


def middle(classifier: nn.Module) -> str:
    """The name of the module three quarters of the way through the stages or blocks."""
    names = stack(classifier)
    return names[max(3 * len(names) // 4 - 1, 0)]


AutoConfig.register(LocalizerConfig.model_type, LocalizerConfig, exist_ok=True)
AutoModelForImageClassification.register(LocalizerConfig, Localizer, exist_ok=True)
LocalizerConfig.register_for_auto_class()
Localizer.register_for_auto_class("AutoModelForImageClassification")
