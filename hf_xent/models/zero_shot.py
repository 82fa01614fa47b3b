"""A classifier made of an encoder and a vector for each class: zero-shot classes of a two-tower model, or class means.

    z_c = scale cos(h(f(x)), t_c)

    model = ZeroShot(clip, class_texts(clip, tokenizer, names, ["a photo of a {}."]))
    logits = model(pixel_values=images).logits                  # [B, C]

h is a head between features and classes, such as `hf_xent.models.projection.ProjectionHead`; without one it is the
identity. Features are of unit length before the head and after it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import cached_file

from ..options.ranges import is_number
from ..system.files import replace_atomically
from .embeddings import features, token_embedding
from .loading import explain_load_errors

CENTERS = "centers.safetensors"
"""The file of the classes, in the folder of the head."""


class ZeroShot(nn.Module):
    """Logits [B, C] of classes that are vectors; see the module's docstring.

    Args:
        encoder: A two-tower model, a classifier or an encoder of transformers.
        centers: The classes [C, D], such as those of `class_texts` or `prototypes`.
        head: What is between features and classes, [B, D] -> [B, D].
        scale: What cosines are multiplied by; that of the encoder (`logit_scale`) if it has one, else 100. A scale at
            which most rows have a probability of 1 leaves attacks on probabilities without a gradient.

    Raises:
        ValueError: Centers are not one finite row a class, or the scale is not above 0.
    """

    centers: Tensor

    def __init__(self, encoder: Any, centers: Tensor, head: nn.Module | None = None, scale: float | None = None):
        super().__init__()
        if centers.ndim != 2 or len(centers) < 2:
            raise ValueError(
                f"centers have the shape {tuple(centers.shape)}: give a row for each of two classes or more"
            )
        lengths = centers.detach().float().norm(dim=-1)
        if not bool((lengths.isfinite() & (lengths > 0)).all()):
            raise ValueError(f"centers have rows of the lengths {lengths.tolist()}: give finite ones above 0")
        if scale is not None and not is_number(scale, "(0, inf)"):
            raise ValueError(f"scale is {scale!r}: choose a number above 0")
        self.encoder, self.head, self.config = encoder, head, encoder.config
        self.register_buffer("centers", F.normalize(centers.detach().float(), dim=-1))
        self.scale = float(scale) if scale is not None else _scale_of(encoder)

    def embed(self, **inputs: Any) -> Tensor:
        """The features of unit length [B, D], behind the head if there is one."""
        found = features(self.encoder, inputs)
        return found if self.head is None else F.normalize(self.head(found), dim=-1)

    def forward(self, **inputs: Any) -> SequenceClassifierOutput:
        """The logits of a batch, float32 or wider."""
        inputs.pop("labels", None)
        return SequenceClassifierOutput(logits=self.classify(self.embed(**inputs)))

    def classify(self, embedded: Tensor) -> Tensor:
        """The logits [B, C] of features of unit length [B, D]. Raises: ValueError for features of another width."""
        if embedded.shape[-1] != self.centers.shape[-1]:
            raise ValueError(
                f"features are {embedded.shape[-1]} numbers, centers {self.centers.shape[-1]}: make both by one encoder"
            )
        return self.scale * embedded @ self.centers.to(embedded.dtype).T

    def get_input_embeddings(self) -> nn.Module:
        """The table of token embeddings of the encoder."""
        return token_embedding(self.encoder)

    def share(self) -> float:
        """The share of the parameters that is the head's."""
        trained = 0 if self.head is None else sum(p.numel() for p in self.head.parameters())
        return trained / (trained + sum(p.numel() for p in self.encoder.parameters()))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the head, if it is a model of transformers, and the classes; the encoder has its own checkpoint."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        head: Any = self.head
        if head is not None:
            head.save_pretrained(folder)
        self.save_centers(folder)

    def save_centers(self, folder: str | Path) -> None:
        """Writes the classes and the scale into a folder."""
        stored = {
            "centers": self.centers.cpu().contiguous(),
            "scale": torch.tensor(self.scale, dtype=torch.float64),
            "has_head": torch.tensor(self.head is not None),
        }
        replace_atomically(Path(folder) / CENTERS, lambda draft: save_file(stored, draft))

    @classmethod
    def from_pretrained(cls, place: str | Path, encoder: Any) -> ZeroShot:
        """A classifier of an encoder, with the head and the classes that were saved for it.

        Args:
            place: A folder or a repository of `save_pretrained`, or of `EncoderCalibrationTrainer`.
            encoder: The encoder that they were saved with.

        Raises:
            OSError: There are no classes in the folder.
            ValueError: The Hub does not have it, or does not show it to this login.
        """
        from .projection import ProjectionHead

        with explain_load_errors(str(place)) as source:
            stored = load_file(str(cached_file(source, CENTERS)))
            head = ProjectionHead.from_pretrained(source) if bool(stored["has_head"]) else None
        model = cls(encoder, stored["centers"], head, float(stored["scale"]))
        model.centers = stored["centers"]  # of unit length already: once more would change their last bits
        return model


def _scale_of(encoder: Any) -> float:
    """The factor of a two-tower model's logits: CLIP and SigLIP keep one, CLAP one for each tower; else 100."""
    for name in ("logit_scale", "logit_scale_a"):
        known = getattr(encoder, name, None)
        if isinstance(known, Tensor):
            return float(known.detach().exp())
    return 100.0
