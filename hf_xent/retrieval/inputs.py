"""Sources as the inputs of a model, one example each, and candidates as tokens.

A source is text, put into a template, or the inputs that a model's processor has made of one recording or image. A
candidate is text, put into a template of its own, or tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..patching import inner_of
from .trees import Tokens

Source = str | Mapping[str, Tensor]
Candidate = str | Sequence[int]


@dataclass
class Encoder:
    """From sources and candidates to tensors and tokens.

    Args:
        model: The model.
        processor: Its tokenizer, or a processor that has one.
        template: What a source is written into, in the place of '{}'.
        target: What a candidate is written into, in the place of '{}'.

    Raises:
        ValueError: A template does not have '{}' once; a model of encoder and decoder names no start token.
    """

    model: Any
    processor: Any
    template: str = "{}"
    target: str = "{}"

    def __post_init__(self) -> None:
        for name in ("template", "target"):
            text = getattr(self, name)
            if not isinstance(text, str) or text.count("{}") != 1:
                raise ValueError(f"{name} is {text!r}: write {{}} once, where the text stands")
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        config: Any = inner_of(self.model).config
        self.has_decoder = bool(config.is_encoder_decoder)  # beside an encoder
        self.start: Any = getattr(config, "decoder_start_token_id", None)
        if self.has_decoder and self.start is None:
            raise ValueError("model names no start token: set model.config.decoder_start_token_id")

    def source(self, source: Source) -> dict[str, Tensor]:
        """The inputs of a model for one source, each [1, ...].

        Raises: ValueError for several examples, padding, or a prompt without tokens.
        """
        if isinstance(source, str):
            return self._text(source)
        inputs = {name: value for name, value in source.items() if isinstance(value, Tensor)}
        mask = inputs.get("attention_mask")
        if not inputs or inputs.get("input_ids", torch.zeros(1, 1)).shape[0] != 1:
            raise ValueError(f"a source has the inputs {_shapes(inputs)}: pass those of one example, [1, ...] each")
        if mask is not None and not self.has_decoder and not bool(mask.all()):
            raise ValueError("a source has an attention_mask with zeros: pass one example without padding")
        return {name: value.to(self.model.device) for name, value in inputs.items()}

    def candidate(self, candidate: Candidate) -> Tokens:
        """The tokens of a candidate that are predicted. Raises: ValueError if there are none."""
        if isinstance(candidate, str):
            ids = self._target_ids(self.target.replace("{}", candidate))
        else:
            ids = [int(token) for token in candidate]
        if not ids:
            raise ValueError(f"a candidate is {candidate!r}, which has no tokens: leave it out")
        return tuple(ids)

    def _target_ids(self, text: str) -> list[int]:
        if not self.has_decoder:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        ids = list(self.tokenizer(text_target=text)["input_ids"])  # ends with the end of a sequence
        return ids[1:] if ids[:1] == [self.start] else ids  # Whisper's tokenizer writes the start, which is given

    def _text(self, text: str) -> dict[str, Tensor]:
        ids = self.tokenizer(self.template.replace("{}", text))["input_ids"]
        if not ids:
            starts = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
            ids = [token for token in starts if token is not None][:1]
        if not ids:
            raise ValueError(f"a source is {text!r}, which has no tokens under template {self.template!r}: add words")
        tensor = torch.tensor([ids], device=self.model.device)
        return {"input_ids": tensor, "attention_mask": torch.ones_like(tensor)}


def _shapes(inputs: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items()) or "none"
