"""What a model makes of images, texts or sounds before its classes: features, their class means, and those of names.

    f = features(model, {"pixel_values": images})               # [N, D], of unit length
    w = class_texts(model, tokenizer, names, ["a photo of a {}."])
    logits = 100 * f @ w.T                                      # zero-shot classification by a two-tower model

A two-tower model (CLIP, SigLIP, CLAP) has `get_image_features`, `get_text_features` or `get_audio_features`. Of a
classifier the features are what its head sees. Of an encoder without a head they are the mean of the last hidden states
over tokens that are not padding, as sentence encoders pool them; over all patches, if there is no mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..classes.heads import head_of, inputs_of

TOWERS = {
    "pixel_values": "get_image_features",
    "input_ids": "get_text_features",
    "input_features": "get_audio_features",
}
"""The input of a tower -> the method of two-tower models that reads it."""


def features(model: Any, batch: Mapping[str, Any], normalize: bool = True) -> Tensor:
    """The features of a batch, with a gradient where gradients are enabled.

    Args:
        model: A two-tower model, a classifier or an encoder of transformers; its mode is left as it is.
        batch: The inputs of one tower, or of the model; labels are left out.
        normalize: Whether each is divided by its length.

    Returns:
        The features [N, D], float32 or wider.

    Raises:
        ValueError: A classifier whose head sees no vector for each row, or a model without hidden states.
    """
    batch = {name: value for name, value in batch.items() if name != "labels"}
    tower = next((method for name, method in TOWERS.items() if name in batch and hasattr(model, method)), None)
    if tower is not None:
        found = getattr(model, tower)(**batch)
        found = found if isinstance(found, Tensor) else found.pooler_output
    elif (head := classifier_head(model)) is not None:
        with inputs_of(head) as seen:
            model(**batch)
        found = _row_each(seen[-1], batch, model)
    else:
        found = _pooled(model(**batch), batch, model)
    found = found if found.itemsize > 4 else found.float()
    return F.normalize(found, dim=-1) if normalize else found


def classifier_head(model: Any) -> nn.Linear | None:
    """The linear head of a classifier; None for a model that is not one."""
    kind = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    return head_of(model) if "Classification" in kind else None


def prototypes(features: Tensor, labels: Tensor, classes: int | None = None) -> Tensor:
    """The mean of the features of each class.

    Args:
        features: [N, D].
        labels: Ids of classes [N].
        classes: The number C of classes; one more than the largest label if it is left out.

    Returns:
        The means [C, D], which are not of unit length.

    Raises:
        ValueError: A label is outside of the classes, or a class has no row.
    """
    count = int(labels.max()) + 1 if classes is None else classes
    if labels.min() < 0 or labels.max() >= count:
        raise ValueError(f"labels are {int(labels.min())} to {int(labels.max())}, but there are {count} classes")
    sizes = torch.bincount(labels, minlength=count)
    if absent := (sizes == 0).nonzero().flatten().tolist():
        raise ValueError(f"labels have no row of class {absent[0]}, which has no mean then: give rows of every class")
    sums = features.new_zeros(count, features.shape[1]).index_add(0, labels, features)
    return sums / sizes.unsqueeze(1)


@torch.no_grad()
def class_texts(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    templates: Sequence[str] = ("{}",),
    *,
    batch_size: int = 64,
    max_length: int | None = None,
) -> Tensor:
    """The features of the names of classes: the mean over templates, then of unit length.

    Args:
        model: A two-tower model, or an encoder of texts.
        tokenizer: Its tokenizer.
        names: The names of the C classes.
        templates: Texts with {} for the name.
        batch_size: Texts in a forward pass.
        max_length: Tokens after which a text is cut; the tokenizer's own limit if it is left out.

    Returns:
        [C, D], of unit length.

    Raises:
        ValueError: No names, no templates, or a template without {}.
    """
    if not names or not templates or any("{}" not in template for template in templates):
        raise ValueError(
            f"names number {len(names)}, templates are {list(templates)}: give both, each template with {{}}"
        )
    texts = [template.replace("{}", name) for name in names for template in templates]
    found = encoded(model, tokenizer, texts, batch_size=batch_size, max_length=max_length, normalize=False)
    return F.normalize(found.unflatten(0, (len(names), len(templates))).mean(1), dim=-1)


@torch.no_grad()
def encoded(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    max_length: int | None = None,
    normalize: bool = True,
) -> Tensor:
    """The features [N, D] of texts, in their order; texts of similar lengths are read together."""
    from .contexts import eval_mode

    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts, device = [], next(model.parameters()).device
    with eval_mode(model):
        for start in range(0, len(texts), batch_size):
            rows = [texts[i] for i in order[start : start + batch_size]]
            batch = tokenizer(rows, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
            batch.pop("token_type_ids", None)  # of one segment, and unknown to some text towers
            parts.append(features(model, batch.to(device), normalize))
    found = torch.cat(parts)
    return torch.empty_like(found).index_copy_(0, torch.tensor(order, device=device), found)


def token_embedding(model: Any) -> nn.Module:
    """The layer that embeds token ids, of the text tower if there are two.

    Raises:
        ValueError: The model reads no tokens.
    """
    for owner in (model, getattr(model, "text_model", None)):
        try:
            layer = owner.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(layer, nn.Embedding):
            return layer
    raise ValueError(f"model is a {type(model).__name__} without a table of token embeddings: pass a model of texts")


@contextmanager
def embedded(model: Any, states: Tensor) -> Iterator[None]:
    """While it is open, a model reads these embeddings in place of those of its `input_ids`, of the same shape.

    The ids are passed as they are, so that padding, ends of texts and positions are found where models look for them.

    Args:
        model: A model of texts.
        states: [B, T, D].
    """
    handle = token_embedding(model).register_forward_hook(lambda layer, args, output: states.to(output.dtype))
    try:
        yield
    finally:
        handle.remove()


def _row_each(seen: Tensor, batch: Mapping[str, Any], model: Any) -> Tensor:
    """What the head saw for each row; of a decoder, at the last token that is not padding."""
    if seen.ndim == 2:
        return seen
    ids = batch.get("input_ids")
    if seen.ndim != 3 or ids is None or seen.shape[:2] != ids.shape:
        raise ValueError(
            f"the head of {type(model).__name__} sees {tuple(seen.shape)}: pass a classifier of whole rows"
        )
    mask = batch.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(ids)
    steps = torch.arange(ids.shape[1], device=ids.device)
    return seen[torch.arange(len(ids), device=ids.device), (steps * (mask != 0)).argmax(-1)]


def _pooled(output: Any, batch: Mapping[str, Any], model: Any) -> Tensor:
    states = getattr(output, "last_hidden_state", None)
    if states is None:
        raise ValueError(f"model is a {type(model).__name__} without hidden states: pass an encoder or a classifier")
    if states.ndim == 4:  # [B, C, H, W]
        return states.mean((-2, -1))
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != states.shape[:2]:
        return states.mean(1)
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)
