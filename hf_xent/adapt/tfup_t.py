"""TFUP-T: small adapters of classes and features, trained without labels on what a cache of unlabelled rows says.

    model = TFUPT(class_texts(encoder, tokenizer, names, normalize=False)).fit(weak, strong)
    classes = model.predict(weak)                               # [N]

    W' = normalise((1 - b) W + b R)                             R [C, D], 0 at first; b = 0.5
    f' = normalise((1 - a) f + a relu(U relu(V f)))             V [D/4, D], U [D, D/4]; a = 0.2
    z  = 100 f' W'^T                                            what predicts; the cache is for training alone

`weak` are the features of rows as they are, `strong` those of changed rows: crops of images, texts without some words.
Both are computed once, for the encoder is frozen; if there are several strong views they take turns, one an epoch.

The first epochs are cross-entropy on the 0.75 N / C most typical rows of each class, with the classes that TFUP gives
them. Later epochs are cross-entropy of the strong views of rows to whose weak view f', W' and the cache give a class
with more than 0.9, and 0.3 sum_c m_c log(m_c + 1e-6), where m is the mean softmax of the batch's strong views, as in
`hf_xent.classes.MarginalEntropy`.

Nothing is chosen by labels: the number of epochs is fixed beforehand and the last one predicts. R learns at a rate
relative to the length of W, which is that of `classes` as they are given: those of the source are not of unit length.

Source: Long et al. 2024, Training-Free Unsupervised Prompt for Vision-Language Models, arXiv:2404.16339, and its code.
There the epoch with the best accuracy on the labelled target is kept, and the cosine schedule counts the steps of the
first epochs only, so that the rate rises again; here it ends at 0 with the last step.
Limits: the second term wants equally frequent classes; where they are not, a lower `weight` is safer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from ..classes.marginal_entropy import marginal
from ..options.ranges import check_count, check_fields
from ..system.files import replace_atomically
from ..system.progress import tracked
from .cache import TFUP, unit

EPS, DECAY = 3e-3, 0.1  # of AdamW, the authors'


@dataclass(frozen=True)
class TFUPTConfig:
    """Options of `TFUPT`."""

    epochs: int = 30
    """All epochs."""
    first: int = 5
    """How many of them are on the typical rows."""
    lr: float = 0.012
    """The learning rate of AdamW at the first step."""
    batch_size: int = 256
    """Rows in a step. With few more rows than classes the mean softmax is noise."""
    threshold: float = 0.9
    """The least probability of a class that is learned from."""
    weight: float = 0.3
    """The weight of the mean softmax's entropy."""
    text: float = 0.5
    """The share b of the residual in the classes."""
    image: float = 0.2
    """The share a of the adapted features."""
    alpha: float = 0.3
    """The weight of the cache."""
    seed: int = 0
    """Of the first values of V and U and the order of rows."""
    ranges: ClassVar[dict[str, str]] = {
        "lr": "[0, inf)",
        "threshold": "[0, 1]",
        "weight": "[0, inf)",
        "text": "[0, 1)",
        "image": "[0, 1)",
        "alpha": "[0, inf)",
    }

    def __post_init__(self) -> None:
        check_fields(self, self.ranges)
        for name, least in (("epochs", 0), ("first", 0), ("batch_size", 1), ("seed", 0)):
            check_count(name, getattr(self, name), least)
        if self.first > self.epochs:
            raise ValueError(f"first is {self.first}, but there are {self.epochs} epochs: choose at most as many")


class TFUPT(nn.Module):
    """Adapters of classes and features; see the module's docstring.

    Args:
        classes: Features of the names of classes [C, D], of any length.
        config: Options.

    Raises:
        ValueError: Classes that are not one finite row each.
    """

    source: Tensor
    """The classes as they were given [C, D]."""

    def __init__(self, classes: Tensor, config: TFUPTConfig | None = None):
        super().__init__()
        self.config = config or TFUPTConfig()
        self.cache = TFUP(classes, alpha=self.config.alpha)
        self.register_buffer("source", classes.detach().to(self.cache.classes.dtype))
        d = classes.shape[1]
        narrow = max(1, d // 4)
        self.residual = nn.Parameter(torch.zeros_like(self.source))
        self.down = nn.Parameter(self.source.new_empty(narrow, d))
        self.up = nn.Parameter(self.source.new_empty(d, narrow))
        draw = torch.Generator().manual_seed(self.config.seed)
        for matrix in (self.down, self.up):  # as nn.Linear draws them
            with torch.no_grad():
                matrix.copy_((torch.rand(matrix.shape, generator=draw) * 2 - 1) * matrix.shape[1] ** -0.5)
        self.history: list[dict[str, float]] = []
        """Of each epoch: the mean loss, and the share of rows with a class to learn from."""

    def classes(self) -> Tensor:
        """The adapted classes W' [C, D], of unit length."""
        return F.normalize((1 - self.config.text) * self.source + self.config.text * self.residual, dim=-1)

    def images(self, f: Tensor) -> Tensor:
        """The adapted features f' [N, D] of unit features [N, D], of unit length."""
        added = F.relu(F.relu(f @ self.down.T) @ self.up.T)
        return F.normalize((1 - self.config.image) * f + self.config.image * added, dim=-1)

    def forward(self, f: Tensor) -> Tensor:
        """The logits [N, C] of unit features [N, D]."""
        return self.cache.scale * self.images(f) @ self.classes().T

    def fit(self, weak: Tensor, strong: Tensor, progress: bool = False) -> TFUPT:
        """Train on rows without labels, from the present adapters on.

        Args:
            weak: The features of rows as they are [N, D].
            strong: Those of the same rows, changed: [N, D], or several views [V, N, D].
            progress: Whether a bar of epochs is shown on standard error.

        Returns:
            The model itself.

        Raises:
            ValueError: Fewer rows than classes, views of other rows, or features that are not finite.
        """
        device, width = self.source.device, self.source.shape[1]
        views = unit(strong if strong.ndim == 3 else strong.unsqueeze(0), width, "strong", 3).to(self.source)
        rows = unit(weak, width, "weak").to(self.source)
        if views.shape[1:] != rows.shape or not len(views):
            raise ValueError(f"strong are {tuple(strong.shape)}, weak {tuple(weak.shape)}: give views of the same rows")
        self.cache.fit(rows)
        n, c = len(rows), len(self.source)
        typical = self.cache.typical(rows, min(n, max(9, int(0.75 * n / c)))).flatten()
        given = self.cache.predict(rows[typical])
        config = self.config
        sizes = [len(typical)] * config.first + [n] * (config.epochs - config.first)
        optimizer = torch.optim.AdamW(self.parameters(), lr=config.lr, eps=EPS, weight_decay=DECAY)
        steps = sum(-(-size // config.batch_size) for size in sizes)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        draw = torch.Generator().manual_seed(config.seed)
        bar = tracked(range(config.epochs), "TFUP-T", console=Console(stderr=True), disable=not progress)
        with bar as epochs:
            for epoch in epochs:
                view, losses, kept = views[epoch % len(views)], [], 0
                for part in self._parts(sizes[epoch], draw):
                    part = part.to(device)
                    if epoch < config.first:
                        loss, count = F.cross_entropy(self(view[typical[part]]), given[part]), len(part)
                    else:
                        loss, count = self.loss(rows[part], view[part])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    losses.append(float(loss.detach()) * len(part))
                    kept += count
                self.history.append({"loss": sum(losses) / sizes[epoch], "share": kept / sizes[epoch]})
        return self

    def loss(self, weak: Tensor, strong: Tensor) -> tuple[Tensor, int]:
        """The loss of later epochs for two views [B, D] of rows, and how many of these had a class to learn from."""
        with torch.no_grad():
            p = self.cache.scored(self.images(weak), self.classes()).softmax(-1)
            confidence, labels = p.max(-1)
            sure = confidence > self.config.threshold
        logits = self(strong)
        loss = self.config.weight * marginal(logits)
        if sure.any():
            loss = loss + F.cross_entropy(logits[sure], labels[sure])
        return loss, int(sure.sum())

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """The logits [N, C] of rows [N, D]. Raises: ValueError for bad features."""
        found: Tensor = self(unit(features, self.source.shape[1]).to(self.source))
        return found

    def predict(self, features: Tensor) -> Tensor:
        """The classes [N] of rows [N, D]."""
        return self.logits(features).argmax(-1)

    def save(self, file: str | Path) -> Path:
        """Write adapters, classes and options into a file of safetensors; an existing one is replaced."""
        from safetensors.torch import save_file

        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        meta = {"config": json.dumps(asdict(self.config)), "format": "pt"}
        return replace_atomically(Path(file), lambda draft: save_file(state, draft, meta))

    @classmethod
    def load(cls, file: str | Path) -> TFUPT:
        """The model of a file that `save` wrote. Raises: ValueError for another file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(file), "pt") as stored:
                state: dict[str, Any] = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
                model = cls(state["source"], TFUPTConfig(**json.loads(stored.metadata()["config"])))
            model.load_state_dict(state)
        except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{file} holds no adapters ({reason}): choose a file that TFUPT.save has written"
            ) from error
        return model

    def _parts(self, size: int, draw: torch.Generator) -> Iterator[Tensor]:
        """Indices of `size` rows in a new order, in parts that differ by one row at most."""
        return iter(torch.randperm(size, generator=draw).tensor_split(-(-size // self.config.batch_size)))
