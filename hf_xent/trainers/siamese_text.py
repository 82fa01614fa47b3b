"""The two sides that a transport compares: the states of speech at the rate of its encoder's frames, and of texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import MODEL_FOR_CTC_MAPPING

from ..patching.heads import inner_of
from .siamese_collator import TEXT, TEXT_MASK

FOLDER, PROJECTION = "text_encoder", "projection.safetensors"


class TextStates(nn.Module):
    """A text encoder and, where its width is another than that of the speech, a linear layer after it.

    Args:
        encoder: A model with `last_hidden_state`, such as AutoModel gives, or the encoder of a translation model.
        width: The width D of the states of speech.
        frozen: Whether the encoder stays as it is, in evaluation mode. The layer is trained in either case.
    """

    def __init__(self, encoder: Any, width: int, *, frozen: bool = False):
        super().__init__()
        own = encoder.config.get_text_config().hidden_size
        self.encoder, self.frozen = encoder, frozen
        self.projection = None if own == width else nn.Linear(own, width)
        if frozen:
            encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> TextStates:
        """As of any module, but a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The states [B, T, D] of ids [B, T]."""
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return states if self.projection is None else self.projection(states)

    def save(self, folder: str | Path) -> None:
        """Writes the encoder into `text_encoder` within a folder, as a checkpoint of its own, and the layer into it."""
        place = Path(folder) / FOLDER
        self.encoder.save_pretrained(place)
        if self.projection is not None:
            save_model(self.projection, str(place / PROJECTION))

    def load_projection(self, folder: str | Path) -> None:
        """Reads the layer that `save` has written into a folder. Raises: ValueError if there is none."""
        path = Path(folder) / FOLDER / PROJECTION
        if self.projection is None or not path.is_file():
            raise ValueError(f"{folder} has no {FOLDER}/{PROJECTION} for a text encoder of another width")
        load_model(self.projection, str(path))


def check_model(model: Any) -> None:
    """Raises: ValueError for a model that is not one of transformers' for CTC."""
    inner: Any = inner_of(model)
    known = MODEL_FOR_CTC_MAPPING.get(type(getattr(inner, "config", None)), None)
    known = known if isinstance(known, list | tuple) else [known]
    if not any(isinstance(inner, kind) for kind in known if kind is not None):
        raise ValueError(f"model is a {type(inner).__name__}, which has no CTC loss: pass one of AutoModelForCTC")


def check_text_encoder(args: Any, encoder: Any, speech: Any) -> None:
    """Raises: ValueError for a text encoder that has no effect, is missing, or is not one."""
    if not args.ot_weight:
        if encoder is not None:
            raise ValueError("ot_weight is 0, so text_encoder has no effect: leave it out, or set ot_weight")
        return
    if encoder is None:
        raise ValueError(f"ot_weight is {args.ot_weight}, but text_encoder is None: pass an AutoModel of texts")
    inner: Any = inner_of(encoder)
    if getattr(inner.config, "is_encoder_decoder", False) and hasattr(inner, "decoder"):
        raise ValueError(
            f"text_encoder is a {type(inner).__name__}, an encoder and a decoder: pass text_encoder.get_encoder()"
        )
    if inner is inner_of(speech):
        raise ValueError("text_encoder is the model itself: pass an encoder of texts")


def acoustic_encoder(model: Any) -> Any:
    """What is before the CTC head of a model."""
    inner: Any = inner_of(model)
    base = inner.base_model  # the model itself in Parakeet and its relatives, whose encoder has another name
    return inner.encoder if base is inner else base


def width_of(model: Any) -> int:
    """The width of the states that the CTC head of a model sees."""
    config: Any = acoustic_encoder(model).config
    config = getattr(config, "audio_config", config)  # omniASR
    if getattr(config, "add_adapter", False):  # wav2vec 2.0, WavLM
        return int(config.output_hidden_size)
    return int(config.hidden_size)


@contextmanager
def last_states(model: Any) -> Iterator[list[Tensor]]:
    """While it is open, the last states [B, S, D] of each forward pass are appended to a list.

    They are behind the adapter and the last normalization, if there are such, where `hidden_states[-1]` may not be.
    """
    seen: list[Tensor] = []
    handle = acoustic_encoder(model).register_forward_hook(lambda _, args, output: seen.append(output[0]))
    try:
        yield seen
    finally:
        handle.remove()


def frame_mask(model: Any, attention_mask: Tensor | None, frames: int, like: Tensor) -> Tensor:
    """Which frames of an encoder are of speech, not of padding: [B, frames]."""
    steps = torch.arange(frames, device=like.device)
    if attention_mask is None:
        return torch.ones(len(like), frames, dtype=torch.bool, device=like.device)
    inner: Any = inner_of(model)
    # the first is that of wav2vec 2.0 and its relatives, the second that of Parakeet, LASR, Granite and omniASR
    of_samples = getattr(inner, "_get_feat_extract_output_lengths", None)
    of_samples = of_samples or inner._get_subsampling_output_length
    return steps < of_samples(attention_mask.sum(-1)).to(like.device)[:, None]


def text_of(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The ids and the mask of a batch's texts. Raises: ValueError if it has none."""
    if batch.get(TEXT) is None:
        raise ValueError(f"a batch has {', '.join(batch)}, but the transport needs {TEXT}: add the column")
    ids, mask = batch[TEXT], batch.get(TEXT_MASK)
    return ids, torch.ones_like(ids) if mask is None else mask
