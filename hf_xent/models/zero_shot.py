"""A classifier made of an encoder and a vector for each class: zero-shot classes of a two-tower model, or class means.

    z_c = scale cos(h(f(x)), t_c)

    model = ZeroShot(clip, class_texts(clip, tokenizer, names, ["a photo of a {}."]))
    logits = model(pixel_values=images).logits                  # [B, C]

h is a head between features and classes, such as `hf_xent.trainers.ProjectionHead`; without one it is the identity.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput

from .embeddings import features


class ZeroShot(nn.Module):
    """Logits [B, C] of classes that are vectors; see the module's docstring.

    Args:
        encoder: A two-tower model, a classifier or an encoder of transformers.
        centers: The classes [C, D], such as those of `class_texts` or `prototypes`.
        head: What is between features and classes.
        scale: What cosines are multiplied by; that of the encoder (`logit_scale`) if it has one, else 100.

    Raises:
        ValueError: Centers are not one row a class.
    """

    def __init__(self, encoder: Any, centers: Tensor, head: nn.Module | None = None, scale: float | None = None):
        super().__init__()
        if centers.ndim != 2 or len(centers) < 2:
            raise ValueError(
                f"centers have the shape {tuple(centers.shape)}: give a row for each of two classes or more"
            )
        self.encoder, self.head, self.config = encoder, head, encoder.config
        self.register_buffer("centers", F.normalize(centers.detach().float(), dim=-1))
        known = getattr(encoder, "logit_scale", None)  # CLIP, SigLIP; CLAP has one for each tower
        known = getattr(encoder, "logit_scale_a", None) if known is None else known
        self.scale = float(known.exp()) if scale is None and known is not None else scale or 100.0

    def embed(self, **inputs: Any) -> Tensor:
        """The features of unit length [B, D], behind the head if there is one."""
        found = features(self.encoder, inputs)
        return found if self.head is None else F.normalize(self.head(found), dim=-1)

    def forward(self, **inputs: Any) -> SequenceClassifierOutput:
        """The logits of a batch, float32 or wider."""
        inputs.pop("labels", None)
        logits = self.scale * self.embed(**inputs) @ self.centers.T
        return SequenceClassifierOutput(logits=logits)

    def get_input_embeddings(self) -> nn.Module:
        """The table of token embeddings of the encoder."""
        from .embeddings import token_embedding

        return token_embedding(self.encoder)
