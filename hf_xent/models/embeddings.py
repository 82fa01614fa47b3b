"""What a model makes of images, texts or sounds before its classes: features, their class means, and those of names.

    f = features(model, {"pixel_values": images})               # [N, D], of unit length
    w = class_texts(model, tokenizer, names, ["a photo of a {}."])
    logits = 100 * f @ w.T                                      # zero-shot classification by a two-tower model

A two-tower model (CLIP, SigLIP, CLAP) has `get_image_features`, `get_text_features` or `get_audio_features`. Of a
classifier the features are what its head sees, of a decoder at the token whose logits the model returns. Of an encoder
without a head they are the mean of the last hidden states over tokens that are not padding, as sentence encoders pool
them; over all positions, if there is no mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from ..classes.heads import head_of
from ..ops.statistics import widened
from ..options.ranges import check_count
from ..system.progress import tracked
from .anatomy import positions
from .contexts import eval_mode
from .pooling import before_head, mean_state

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
        ValueError: Inputs of two towers, a classifier of tokens, or a model without one vector for each row.
    """
    batch = {name: value for name, value in batch.items() if name != "labels"}
    towers = [name for name, method in TOWERS.items() if name in batch and hasattr(model, method)]
    if len(towers) > 1:
        raise ValueError(f"batch has {' and '.join(towers)}: give the inputs of one tower at a time")
    if towers:
        found = getattr(model, TOWERS[towers[0]])(**batch)
        found = found if isinstance(found, Tensor) else found.pooler_output
    elif (head := classifier_head(model)) is not None:
        found = before_head(head, model, batch)
    else:
        found = mean_state(model(**batch), batch, model)
    if found.ndim != 2:
        raise ValueError(
            f"model is a {type(model).__name__}, whose features are {tuple(found.shape)}: pass one that has a vector"
            " for each row"
        )
    found = widened(found)
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
        The means [C, D], float32 or wider, which are not of unit length.

    Raises:
        ValueError: Not a label for each row, no row, a label outside of the classes, or a class without a row.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise ValueError(
            f"features are {tuple(features.shape)} and labels {tuple(labels.shape)}: give rows, and a label for each"
        )
    if labels.is_floating_point():
        raise ValueError(f"labels are {labels.dtype}: give the ids of classes, integers")
    count = int(labels.max()) + 1 if classes is None else classes
    if labels.min() < 0 or labels.max() >= count:
        raise ValueError(f"labels are {int(labels.min())} to {int(labels.max())}, but there are {count} classes")
    sizes = torch.bincount(labels, minlength=count)
    if absent := (sizes == 0).nonzero().flatten().tolist():
        raise ValueError(f"labels have no row of class {absent[0]}, which has no mean then: give rows of every class")
    features = widened(features)
    sums = features.new_zeros(count, features.shape[1]).index_add(0, labels, features)
    return sums / sizes.unsqueeze(1)


def class_texts(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    templates: Sequence[str] = ("{}",),
    *,
    batch_size: int = 64,
    max_length: int | None = None,
    normalize: bool = True,
) -> Tensor:
    """The features of the names of classes: the mean over templates, then of unit length.

    Args:
        model: A two-tower model, or an encoder of texts.
        tokenizer: Its tokenizer.
        names: The names of the C classes.
        templates: Texts with {} for the name.
        batch_size: Texts in a forward pass.
        max_length: As in `encoded`.
        normalize: Whether each mean is divided by its length.

    Returns:
        [C, D], float32 or wider.

    Raises:
        ValueError: No names, no templates, a template without {}, or as `encoded`.
    """
    if isinstance(names, str) or isinstance(templates, str):
        raise ValueError(f"names are {names!r}, templates {templates!r}: give a list of each, not one text")
    if not names or not templates or any("{}" not in template for template in templates):
        raise ValueError(
            f"names number {len(names)}, templates are {list(templates)}: give both, each template with {{}}"
        )
    texts = [template.replace("{}", name) for name in names for template in templates]
    found = encoded(model, tokenizer, texts, batch_size=batch_size, max_length=max_length, normalize=False)
    means = found.unflatten(0, (len(names), len(templates))).mean(1)
    return F.normalize(means, dim=-1) if normalize else means


@torch.no_grad()
def encoded(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    max_length: int | None = None,
    normalize: bool = True,
    progress: bool = False,
) -> Tensor:
    """The features of texts, by a model in evaluation mode; texts of similar lengths are read together.

    Some text towers (SigLIP's) read the last position, padding or not, and were trained on texts that padding fills up
    to the last of their positions. A tower whose features of a text change with padding is given such texts.

    Args:
        model: A two-tower model, a classifier or an encoder of texts.
        tokenizer: Its tokenizer.
        texts: N texts.
        batch_size: Texts in a forward pass.
        max_length: Tokens after which a text is cut; if it is left out, what the tokenizer and the model have room for.
        normalize: Whether each is divided by its length.
        progress: Whether a bar is shown on standard error.

    Returns:
        [N, D], in the order of the texts, float32 or wider, on the device of the model.

    Raises:
        ValueError: No text, one without a token, more tokens than the model has positions, or a tokenizer that cannot
            pad.
    """
    check_count("batch_size", batch_size, 1)
    if isinstance(texts, str) or not len(texts):
        raise ValueError(f"texts are {texts!r}: give a list of one or more")
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer has no padding token: set tokenizer.pad_token, for example to its eos_token")
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    starts = range(0, len(texts), batch_size)
    bar = tracked(starts, "reading texts", console=Console(stderr=True), disable=not progress)
    device, parts = next(model.parameters()).device, []
    with eval_mode(model), bar as steps:
        options = text_padding(model, tokenizer, max_length)
        for start in steps:
            rows = order[start : start + batch_size]
            batch = tokenizer([texts[i] for i in rows], return_tensors="pt", **options)
            batch.pop("token_type_ids", None)  # of one segment, and unknown to some text towers
            mask = batch.get("attention_mask", batch["input_ids"])
            if not mask.shape[1] or ("attention_mask" in batch and not mask.any(1).all()):
                raise ValueError(f"texts have one without a token among rows {rows[:5]}: leave out empty texts")
            parts.append(features(model, batch.to(device), normalize))
    found = torch.cat(parts)
    return torch.empty_like(found).index_copy_(0, torch.tensor(order, device=device), found)


def token_embedding(model: Any) -> nn.Module:
    """The layer that embeds token ids, of the text tower if there are two.

    Raises:
        ValueError: The model reads no tokens.
    """
    for owner in (model, _text_tower(model)):
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
        model: A model of texts that is no encoder-decoder.
        states: What the table of token embeddings returns, [B, T, D].

    Raises:
        ValueError: An encoder-decoder, which reads a text twice, ids of another shape, or a model that did not read its
            table of embeddings.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"model is a {type(model).__name__}, an encoder and a decoder: pass one of them")
    read = []

    def swap(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        read.append(output.shape)
        if output.shape != states.shape:
            raise ValueError(
                f"states are {tuple(states.shape)}, but ids have embeddings {tuple(output.shape)}: give one for each id"
            )
        return states.to(output.dtype)

    handle = token_embedding(model).register_forward_hook(swap)
    try:
        yield
    finally:
        handle.remove()
    if not read:
        raise ValueError(f"model is a {type(model).__name__} that has not read its embeddings: call it on input_ids")


def _text_tower(model: Any) -> Any:
    return getattr(model, "text_model", model)


def text_padding(model: Any, tokenizer: Any, max_length: int | None = None) -> dict[str, Any]:
    """Options of the tokenizer: where texts are cut, and up to where padding fills them; `encoded` says which do."""
    room = positions(_text_tower(model))
    if max_length is not None:
        check_count("max_length", max_length, 1)
        if room is not None and max_length > room:
            raise ValueError(f"max_length is {max_length}, but the model has {room} positions: choose at most {room}")
    rooms = [size for size in (room, tokenizer.model_max_length) if size is not None and size < 10**9]
    limit = min(rooms, default=None)  # a tokenizer without a limit has 10^30
    length = max_length or limit
    filled = hasattr(model, TOWERS["input_ids"]) and _reads_padding(model, tokenizer)
    if filled and (length is None or length != (limit or length)):
        raise ValueError(
            f"max_length is {max_length}, but the text tower was trained on texts that padding fills up: choose"
            f" {limit or 'their length'}"
        )
    return {"truncation": length is not None, "max_length": length, "padding": "max_length" if filled else True}


def _reads_padding(model: Any, tokenizer: Any) -> bool:
    """Whether a text tower makes other features of a text if padding follows it."""
    short = tokenizer(["a"], return_tensors="pt")
    length = short["input_ids"].shape[1] + 4
    if length == 4:  # a vocabulary without this letter
        return False
    found = []
    for batch in (short, tokenizer(["a"], padding="max_length", max_length=length, return_tensors="pt")):
        batch.pop("token_type_ids", None)
        found.append(features(model, batch.to(next(model.parameters()).device)))
    return bool((found[0] * found[1]).sum() < 0.999)  # rounding in half precision moves the cosine by 1e-6
