"""Robust Mean Teacher: a classifier that follows its own moving average on a stream of unlabelled batches.

    loss = target_weight mean 1/2 [SCE(z, e) + SCE(z', e)] + contrast_weight SupCon(views) + source_weight CE(source)

z are the model's logits of a batch, z' those of a changed copy of it, and e those of the teacher, without a gradient.
After each step of the optimizer every parameter of the teacher moves: t <- momentum t + (1 - momentum) w. The
prediction for the batch is z + e, from before the step.

SCE is `SymmetricCE`: the cross-entropy of both directions, in equal parts. The views of a row are its features, those
of its changed copy, and the class mean of source features that is next to it by cosine, all three projected
D -> 128 -> 128 to unit length: they attract each other and repel the views of all other rows. Source rows keep the
model at its task. With source_weight 0 no source row is touched; class means are used then only if they are given.

Source: Doebler et al. 2022, Robust Mean Teacher for Continual and Gradual Test-time Adaptation, arXiv:2211.13081; code
at github.com/mariodoebler/test-time-adaptation. Here z' and the features of the changed copy are of one pass. The views
of images, texts and sounds are choices of this library (`hf_xent.adapt.views`), and so is a contrast without means.
Relations: consistency 'ce' is the usual mean teacher; `EntropyMinimization` has neither teacher nor views.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from ..classes.supcon import supervised_contrastive
from ..classes.symmetric_ce import SymmetricCE
from ..models.embeddings import classifier_head, features
from ..ops.statistics import widened
from ..options.ranges import check_count, check_number
from ..system.progress import tracked
from ..trainers.class_state import AveragedTeacher
from .source import Collate, drawn, labels_of, source_prototypes
from .streams import Stream
from .views import default_views

WIDTH = 128
CONSISTENCY = {"sce": 0.5, "ce": 0.0}
"""The share of the direction in which the model is the target, by the name of the consistency."""


@dataclass(eq=False, kw_only=True)
class RMT(Stream):
    """Robust Mean Teacher; see the module's docstring.

        rmt = RMT(model, source=rows, augment=ImageViews.of(processor, flip=True))
        for logits in rmt.stream(batches): ...

    Raises:
        ValueError: An option is out of its range or has no effect, and as `Stream`.
    """

    source: Sequence[Any] | None = None
    """Rows with the inputs of the model and `labels`, where it was trained."""
    prototypes: Tensor | None = None
    """Class means [K, D] of source features, as `source_prototypes` makes them; made of the source if left out."""
    augment: Callable[[Mapping[str, Any], torch.Generator], dict[str, Any]] | None = None
    """Makes the changed copy; that of `views.default_views` if it is left out."""
    collate: Collate | None = None
    """Makes a batch of source rows; transformers' default collator if it is left out."""
    consistency: str = "sce"
    """'sce', in both directions, or 'ce', from the teacher alone."""
    target_weight: float = 1.0
    """The weight of the agreement with the teacher."""
    contrast_weight: float = 1.0
    """The weight of the contrastive loss."""
    source_weight: float | None = None
    """The weight of the source rows' cross-entropy: 1 with a source and 0 without one, if it is left out."""
    momentum: float = 0.999
    """The share of itself that the teacher keeps in a step."""
    temperature: float = 0.1
    """What divides the similarities of views."""
    source_batch_size: int = 64
    """Source rows in a step."""
    ranges: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("target_weight", "contrast_weight", "source_weight"), "[0, inf)"),
        **{"momentum": "[0, 1]", "temperature": "(0, inf)"},
    }

    def __post_init__(self) -> None:
        self._check_model()
        if self.source_weight is None:
            self.source_weight = 0.0 if self.source is None else 1.0
        for name, interval in self.ranges.items():
            check_number(self, name, interval)
        check_count("source_batch_size", self.source_batch_size, 1)
        self._check_effects()
        self.agreement = SymmetricCE(alpha=CONSISTENCY[self.consistency], ce_weight=0.0)
        self.teacher = AveragedTeacher(self.momentum)
        self.teacher.renew(self.model)
        self.projector = self._projector() if self.contrast_weight else nn.Sequential()
        if self.contrast_weight and self.source_weight and self.prototypes is None:
            rows, size = self.source, self.source_batch_size
            self.prototypes = source_prototypes(self.model, rows, batch_size=size, collate=self.collate)  # type: ignore[arg-type]
        self._check_prototypes()
        super().__post_init__()

    def _check_prototypes(self) -> None:
        if self.prototypes is not None:
            wanted, given = (
                (int(self.model.config.num_labels), features_width(self.model)),
                tuple(self.prototypes.shape),
            )
            if given != wanted:
                raise ValueError(f"prototypes have the shape {given}: give {[*wanted]}, class means of its features")

    def _check_effects(self) -> None:
        """Refuses options that contradict each other."""
        if self.consistency not in CONSISTENCY:
            raise ValueError(f"consistency is {self.consistency!r}: choose {' or '.join(CONSISTENCY)}")
        if self.source_weight and not (self.source is not None and len(self.source)):
            raise ValueError(f"source_weight is {self.source_weight}, but there are no source rows: give them, or 0")
        if self.prototypes is not None and not self.contrast_weight:
            raise ValueError("prototypes are given, but contrast_weight is 0: leave them out")
        if not (self.target_weight or self.contrast_weight or self.source_weight):
            raise ValueError("all weights are 0: give one of them a weight")

    def _projector(self) -> nn.Sequential:
        """D -> 128 -> 128, drawn from the seed alone."""
        head = features_width(self.model)
        first = next(self.model.parameters())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            made = nn.Sequential(nn.Linear(head, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        return made.to(first.device, first.dtype)

    def learns(self) -> dict[str, nn.Parameter]:
        """Every parameter of the model that has a gradient, and the projector's."""
        own = {f"model.{name}": p for name, p in self.model.named_parameters() if p.requires_grad}
        return own and own | {f"projector.{name}": p for name, p in self.projector.named_parameters()}

    def keeps(self) -> dict[str, Tensor]:
        """The teacher's parameters."""
        return {f"teacher.{name}": p for name, p in self.teacher.model.named_parameters()}

    def models(self) -> list[nn.Module]:
        """The model and its teacher."""
        return [self.model, self.teacher.model]

    def after(self) -> None:
        """Moves the teacher."""
        self.teacher.update(self.model)

    def adapt(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """z + e, and the loss of the step."""
        z, seen = self.read(inputs)
        changed, seen_changed = self.read((self.augment or default_views)(inputs, self.generator))
        e = self.taught(inputs)
        loss = self.target_weight * (self._agreed(z, e) + self._agreed(changed, e)) / 2
        if self.contrast_weight:
            views = [seen, seen_changed]
            if self.prototypes is not None:
                views.insert(0, nearest(seen.detach(), self.prototypes.to(seen)))
            loss = loss + self.contrast_weight * contrast(self.projector(torch.stack(views, 1)), self.temperature)
        if self.source_weight:
            loss = loss + self.source_weight * self._supervised()
        return z + e, loss

    def read(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The model's logits [B, K] and what its head sees [B, D], of one pass; no features without contrast."""
        if not self.contrast_weight:
            return widened(self.model(**inputs).logits), torch.empty(0)
        outputs: list[Tensor] = []
        handle = self.model.register_forward_hook(lambda module, args, output: outputs.append(output.logits))
        try:
            seen = features(self.model, inputs, normalize=False)
        finally:
            handle.remove()
        return widened(outputs[-1]), seen

    @torch.no_grad()
    def taught(self, inputs: Mapping[str, Any]) -> Tensor:
        """The teacher's logits [B, K]."""
        logits: Tensor = widened(self.teacher.model(**inputs).logits)
        return logits

    def warm_up(self, source: Sequence[Any], steps: int) -> None:
        """Lets model and teacher agree on source rows before the stream, by the consistency alone.

            learning rate of step i = learning_rate i / steps

        Their labels are not read. A warm-up that was stopped goes on where it was when it is called again.

        Args:
            source: Rows with the inputs of the model; `source_batch_size` of them are drawn for each step.
            steps: Their number, also of those that were done before.

        Raises:
            ValueError: The stream has begun, there are no rows, or `steps` is below 1.
        """
        check_count("steps", steps, 1)
        if self.steps or not len(source):
            raise ValueError(f"source has {len(source)} rows, {self.steps} batches were read: warm up first, with rows")
        try:
            with tracked(range(self.warmed, steps), "Warming up", console=Console(stderr=True)) as bar:
                for step in bar:
                    self._set_rate(self.learning_rate * (step + 1) / steps)
                    self._step(lambda: self._warm(source), "warmed")
        finally:
            self._set_rate(self.learning_rate)
        self._start = self._state()

    def _warm(self, source: Sequence[Any]) -> tuple[Tensor, Tensor]:
        inputs = self.inputs(drawn(source, self.source_batch_size, self.collate, self.generator))
        z = widened(self.model(**inputs).logits)
        return z, self._agreed(z, self.taught(inputs))

    def _agreed(self, z: Tensor, e: Tensor) -> Tensor:
        return self.agreement(z, z.new_zeros(len(z), dtype=torch.long), second=e).mean()

    def _supervised(self) -> Tensor:
        """The cross-entropy of drawn source rows."""
        assert self.source is not None
        batch = drawn(self.source, self.source_batch_size, self.collate, self.generator)
        labels = labels_of(batch)
        logits = widened(self.model(**self.inputs(batch)).logits)
        return F.cross_entropy(logits, labels.to(logits.device))

    def _set_rate(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate


def nearest(features: Tensor, prototypes: Tensor) -> Tensor:
    """The prototype [B, D] of [K, D] that is next to each row's features [B, D] by cosine."""
    similarities = F.normalize(features, dim=-1) @ F.normalize(prototypes, dim=-1).T
    return prototypes[similarities.argmax(-1)]


def contrast(views: Tensor, temperature: float) -> Tensor:
    """The contrastive loss of views [B, V, P]: every view is an anchor, and attracts the other views of its row.

    A scalar: the mean over anchors and their V - 1 positives of -log pi, with all other views in the denominator.
    """
    rows = torch.eye(len(views), dtype=views.dtype, device=views.device).repeat_interleave(views.shape[1], 0)
    return supervised_contrastive(F.normalize(views, dim=-1).flatten(0, 1), rows, temperature)


def features_width(model: Any) -> int:
    """The number D of features that a classifier's head sees. Raises: ValueError without a linear head."""
    head = classifier_head(model)
    if head is None:
        raise ValueError(
            f"model is a {type(model).__name__} without a linear head: pass a classifier, or contrast_weight=0"
        )
    return int(head.in_features)
