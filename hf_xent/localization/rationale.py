"""Which tokens of a text carry its label, learned from labels alone: a mask over tokens, on any classifier of texts.

    h        states of the classifier after a layer                                                 [B, T, D]
    M        sigmoid(conv(norm(h))): a map for each class, of which that of y is taken               [B, T]
    z, s, b  logits of the text, of what the mask keeps, and of what it leaves: the embeddings of words are weighed by
             w = M and by w = 1 - M, e' = w e + (1 - w) e_mask, and the classifier runs again
    L        CE(z, y) + alpha CE(s, y) + gamma BAS(z', b') + beta area                           `suppression.py`

Special tokens and padding always have the weight 1, and do not count in the area. The classifier runs on weighed texts
with constants for parameters, so that BAS moves the mask alone. It learns from whole texts, by CE(z, y): a classifier
that learned from masked texts could read the label off the mask, which is chosen by y, however wrong its tokens are.
With `joint`, as in the paper, CE(s, y) trains the classifier too, and all terms reach the layers below the mask.

Why embeddings: the paper weighs features of a middle layer, as `erase='states'` does. In a text the states of other
tokens know the whole text there, above all the token that is read; a mask of states has little to suppress.

Why z' = relu(z - mean(z)), and b' alike: an activation counts from 0, but softmax does not see what is added to all
logits. BAS asks for no more once the logit of y is not above the mean of the classes.

    model = Rationale.from_classifier(classifier, tokenizer)
    masks = model(**tokenizer(texts, padding=True, return_tensors="pt")).masks       [B, T], of the predicted class

Importing this file registers both classes, so that `AutoModelForSequenceClassification` loads what was saved. The file
is saved with the model, which with `trust_remote_code=True` also loads where hf_xent is not installed.

Source: Zhai, Wu, Zhai, Cao and Zha 2023, arXiv:2309.12943 (BAS), for images; Lei, Barzilay and Jaakkola 2016,
arXiv:1606.04155, for rationales of texts.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .replay import Forward, record, stack
from .suppression import background_activation, mask_area, suppression_loss

IGNORED = -100
ERASE = ("inputs", "states")


@dataclass
class RationaleOutput(ModelOutput):
    """The loss, logits of the whole text [B, C], and the mask of its tokens [B, T], 0 where no word is."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    masks: Tensor | None = None


class RationaleConfig(PreTrainedConfig):
    """Configuration of `Rationale`; ids and names of labels are those of the classifier.

    Args:
        classifier: The configuration of the classifier, or its dict; that of a BERT if None.
        layer: The layer whose states the mask is computed from, from 1; two thirds of the way through if None.
        special_ids: Ids of tokens that are no words, which are never weighed.
        mask_id: The id of the token that replaces words; if None, their embeddings go to 0, which networks that
            normalize their inputs, such as Llama, hardly see before they are 0.
        erase: 'inputs' weighs the embeddings, 'states' multiplies the states after `layer`.
        joint: Whether the loss of the mask trains the classifier, too.
        alpha: The weight of the cross-entropy of what the mask keeps.
        gamma: The weight of BAS.
        beta: The weight of the area.
        **kwargs: As for `transformers.PreTrainedConfig`.

    Raises:
        ValueError: A weight below 0, an unknown `erase`, or a classifier of several labels a text, or of numbers.
    """

    model_type = "hf_xent_rationale"
    sub_configs = {"classifier": AutoConfig}  # noqa: RUF012  as in transformers
    keys_to_ignore_at_inference = ["masks"]  # noqa: RUF012  so that a Trainer's metrics see logits

    def __init__(  # noqa: PLR0913  one argument for each field of the configuration
        self, classifier: PreTrainedConfig | dict[str, Any] | None = None, layer: int | None = None,
        special_ids: Any = (), mask_id: int | None = None, erase: str = "inputs", joint: bool = False,
        alpha: float = 1.0, gamma: float = 1.0, beta: float = 1.0, **kwargs: Any,
    ):  # fmt: skip
        if erase not in ERASE:
            raise ValueError(f"erase is {erase!r}: choose one of {', '.join(ERASE)}")
        for name, weight in (("alpha", alpha), ("gamma", gamma), ("beta", beta)):
            if not weight >= 0:
                raise ValueError(f"{name} is {weight}: choose 0 or more")
        if classifier is None or isinstance(classifier, dict):
            inner = AutoConfig.for_model(**(classifier or {"model_type": "bert"}))
        else:  # not the classifier's own: transformers sets the attention of configurations inside this one
            inner = copy.deepcopy(classifier)
        problem = inner.problem_type
        if problem not in (None, "single_label_classification") or inner.num_labels < 2:
            raise ValueError(
                f"the classifier has problem_type {problem!r} and num_labels {inner.num_labels}: give one that chooses"
                " one of two or more classes"
            )
        self.classifier, self.layer, self.special_ids = inner, layer, sorted(map(int, special_ids))
        self.mask_id, self.erase, self.joint = mask_id, erase, joint
        self.alpha, self.gamma, self.beta = alpha, gamma, beta
        super().__init__(**{"id2label": inner.id2label, "label2id": inner.label2id} | kwargs)


class MaskHead(nn.Module):
    """Maps of classes from states: sigmoid(conv(norm(h))), over three neighboring tokens."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, classes, 3, padding=1)

    def forward(self, states: Tensor, attended: Tensor) -> Tensor:
        """Maps [B, T, C] of states [B, T, D], with `attended` [B, T] 0 at padding."""
        states = self.norm(states.to(self.norm.weight.dtype)) * attended[..., None]  # padding is as the text's end
        return self.conv(states.mT).mT.sigmoid()


class Rationale(PreTrainedModel):
    """A classifier of texts that says which tokens its class comes from.

    `transformers.Trainer` trains it. To explain a classifier that is trained already, call
    `model.classifier.requires_grad_(False)` before: the mask alone is learned then. An adapter (PEFT) has to be merged
    into the classifier first.

    Args:
        config: The configuration.
        classifier: The classifier; one with random weights if None.

    Raises:
        ValueError: A layer that the classifier does not have.
    """

    config_class = RationaleConfig
    main_input_name = "input_ids"
    accepts_loss_kwargs = False  # the loss is a mean over the texts of a batch

    def __init__(self, config: RationaleConfig, classifier: PreTrainedModel | None = None):
        super().__init__(config)
        if classifier is None:
            classifier = AutoModelForSequenceClassification.from_config(config.classifier)
        self.classifier: Any = classifier
        text = self.classifier.config.get_text_config()
        self.layer = max(1, round(text.num_hidden_layers * 2 / 3)) if config.layer is None else config.layer
        if not 1 <= self.layer <= text.num_hidden_layers:
            raise ValueError(f"layer is {self.layer}: the classifier has layers 1 to {text.num_hidden_layers}")
        self.head = MaskHead(text.hidden_size, self.classifier.config.num_labels)
        self.post_init()

    @classmethod
    def from_classifier(cls, classifier: PreTrainedModel, tokenizer: Any, **options: Any) -> Rationale:
        """A classifier and a mask with random weights.

        Args:
            classifier: A model such as AutoModelForSequenceClassification; it is not copied.
            tokenizer: Its tokenizer, which tells the special tokens, and the one that replaces words: the mask token,
                or, as decoders have none, the unknown one, or that of the end.
            **options: Fields of `RationaleConfig`.

        Returns:
            The model, on the device and in the dtype of the classifier.

        Raises:
            ValueError: What is no model of transformers, such as one with an adapter around it.
        """
        if not isinstance(classifier, PreTrainedModel):
            raise ValueError(f"classifier is a {type(classifier).__name__}: give a model of transformers, with adapters"
                             " merged (`merge_and_unload`)")  # fmt: skip
        names = ("bos_token_id", "eos_token_id", "sep_token_id", "pad_token_id", "cls_token_id", "mask_token_id")
        special = {getattr(tokenizer, name) for name in names} - {None}  # not the unknown token, which is a word
        fill = [getattr(tokenizer, name) for name in ("mask_token_id", "unk_token_id", "eos_token_id")]
        given = {"special_ids": special, "mask_id": next((x for x in fill if x is not None), None), **options}
        model = cls(RationaleConfig(classifier.config, **given), classifier)
        model.head.to(next(classifier.parameters()))
        return model

    def get_input_embeddings(self) -> nn.Module:
        """Those of the classifier."""
        return self.classifier.get_input_embeddings()

    def _init_weights(self, module: nn.Module) -> None:
        """The head starts as torch's layers do; the classifier has its own beginning."""
        if isinstance(module, nn.Conv1d | nn.LayerNorm):
            module.reset_parameters()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> RationaleOutput:  # fmt: skip
        """Logits and masks of texts, and the loss if labels are given.

        Args:
            input_ids: Ids of tokens [B, T].
            attention_mask: 0 at padding [B, T]; nothing is padding if None.
            token_type_ids: Ids of segments [B, T], if the classifier has them.
            labels: Ids of classes [B]; texts with -100 are left out of the loss.

        Returns:
            `loss`, `logits` [B, C], and `masks` [B, T] without gradient: of the labels in training, where they are
            known, and of the predicted classes in evaluation.
        """
        attended = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        inputs = {"input_ids": input_ids, "attention_mask": attended}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        outputs, run = record(self.classifier, self._erased(), **inputs, output_hidden_states=True, return_dict=True)
        states = outputs.hidden_states[self.layer]
        maps = self.head(states if self.config.joint else states.detach(), attended)
        words = word_tokens(input_ids, attended, self.config.special_ids)
        found = _of_class(maps, outputs.logits.argmax(-1)) * words
        loss = None
        if labels is not None:
            known = labels != IGNORED
            masks = torch.where(known[:, None], _of_class(maps, labels.clamp(min=0)) * words, found)
            loss = self._loss(run, outputs.logits, labels, masks, words)
            found = masks if self.training else found
        return RationaleOutput(loss=loss, logits=outputs.logits, masks=found.detach())

    def _loss(self, run: Forward, logits: Tensor, labels: Tensor, masks: Tensor, words: Tensor) -> Tensor:
        """The mean over texts with a label; 0 without one."""
        known, config = labels != IGNORED, self.config
        if not known.any():
            return 0 * (logits.sum() + masks.sum()).float()
        kept = background = None
        if config.alpha:
            kept = self._weighed(run, torch.where(words, masks, 1), frozen=not config.joint)[known]
        if config.gamma:
            left = self._weighed(run, 1 - masks, frozen=True)
            whole, outside = (_activations(x[known]) for x in (logits, left))
            background = config.gamma * background_activation(whole, outside, labels[known])
        return suppression_loss(
            logits[known], labels[known], masked=kept, background=background, area=mask_area(masks, words)[known],
            alpha=config.alpha, beta=config.beta,
        )  # fmt: skip

    def _erased(self) -> str:
        """The name of the classifier's module whose outputs are weighed."""
        if self.config.erase == "states":
            names, count = stack(self.classifier), self.classifier.config.get_text_config().num_hidden_layers
            if len(names) != count:
                raise ValueError(f"erase is 'states', but {count} layers are not {len(names)} modules: choose 'inputs'")
            return names[self.layer - 1]
        embeddings = self.get_input_embeddings()
        return next(name for name, module in self.classifier.named_modules() if module is embeddings)

    def _weighed(self, run: Forward, weights: Tensor, frozen: bool) -> Tensor:
        """Logits of texts whose tokens have weights w [B, T]: w e + (1 - w) e_mask."""
        states = run.features.detach() if frozen else run.features
        w, fill = weights[..., None].to(states.dtype), self.config.mask_id
        weighed = w * states
        if fill is not None and self.config.erase == "inputs":
            other = run.layer(torch.full((1, 1), fill, device=states.device))
            weighed = weighed + (1 - w) * (other.detach() if frozen else other)
        return run.replay(weighed, frozen=frozen).logits


def word_tokens(input_ids: Tensor, attention_mask: Tensor, special_ids: Any) -> Tensor:
    """True where a token is neither padding nor special [B, T]."""
    special = torch.as_tensor(list(special_ids), dtype=input_ids.dtype, device=input_ids.device)
    return attention_mask.bool() & ~torch.isin(input_ids, special)


def _activations(logits: Tensor) -> Tensor:
    """How far each class is above the mean of the classes [B, C], in float32; 0 for those below."""
    return (logits.float() - logits.float().mean(-1, keepdim=True)).relu()


def _of_class(maps: Tensor, labels: Tensor) -> Tensor:  # [B, T, C], [B] -> [B, T]
    return maps.gather(2, labels[:, None, None].expand(-1, maps.shape[1], 1))[..., 0]


AutoConfig.register(RationaleConfig.model_type, RationaleConfig, exist_ok=True)
AutoModelForSequenceClassification.register(RationaleConfig, Rationale, exist_ok=True)
RationaleConfig.register_for_auto_class()
Rationale.register_for_auto_class("AutoModelForSequenceClassification")
