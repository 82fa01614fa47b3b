"""Prompts tuned to tell classes from one another and from negative labels, with frozen encoders; LAPT.

    z_c = scale cos(f, t_c)         over C names of classes and M negative labels, each behind its learned context
    L   = CE(z(f), y)  +  CE(z(cross-modal), y)  +  CE(z(cross-distribution), soft label)        see `mixing.py`

    tuner = PromptTuner(clip, tokenizer, names, negatives.names, PromptOptions(epochs=10))
    tuner.fit(image_features, labels)             # labels from C on are negative labels
    ood_score(features, tuner.class_features(), tuner.negative_features())

Only the two contexts are trained, 2 n D numbers. A step embeds all C + M names; with `negatives_per_step` it embeds the
classes, the negatives of the batch and others drawn at random, and compares with the last known features of the rest.

Rows come from the names alone: LAPT trains on images that were retrieved or generated for each of them. Text encoders
can have texts that were retrieved for names, or definitions, in their place.

Source: Zhang et al., LAPT: Label-driven automated prompt tuning for OOD detection with vision-language models; sum of
the three losses, alpha, beta and the optimizer from the paper and its supplement. The released script leaves out the
cross-distribution loss, and the row itself beside its cross-modal mixture.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from ..models.embeddings import encoded
from ..options.ranges import check_count, check_fields
from ..system.files import replace_atomically
from ..system.progress import tracked
from .mixing import cross_distribution, cross_modal, partners, unsure_cross_entropy
from .prompted import LearnedPrompts

MIXINGS = ("none", "cross-modal", "full")


@dataclass(frozen=True)
class PromptOptions:
    """How prompts are made and tuned."""

    context: int | str = 4
    """How many vectors stand before a name; or a text whose tokens they start from."""
    mixing: str = "full"
    """'none' (cross-entropy), 'cross-modal' beside it, or 'full': also cross-distribution."""
    alpha: float = 1.0
    """Shares of mixed rows are drawn from Beta(alpha, alpha), one for a batch."""
    beta: float = 0.3
    """How much of the share is the probability of any negative label in cross-distribution rows."""
    scale: float = 100.0
    """What cosines are multiplied by."""
    learning_rate: float = 0.01
    """That of SGD with Nesterov's momentum .9; it falls to 0 along a cosine."""
    weight_decay: float = 1e-5
    """That of SGD."""
    batch_size: int = 32
    """Rows in a step."""
    epochs: int = 10
    """Passes over the rows."""
    negatives_per_step: int | None = None
    """How many negative labels a step embeds; all of them if it is left out."""
    templates: tuple[str, ...] = ("{}",)
    """Texts with {} for a name, one of which is drawn for each cross-modal row."""
    seed: int = 0
    """Seed of the start, the order and the mixing."""

    def __post_init__(self) -> None:
        if self.mixing not in MIXINGS:
            raise ValueError(f"mixing is {self.mixing!r}: choose one of {', '.join(MIXINGS)}")
        object.__setattr__(self, "templates", tuple(self.templates))
        if not self.templates or any("{}" not in template for template in self.templates):
            raise ValueError(f"templates are {list(self.templates)}: give at least one, each with {{}}")
        positive = dict.fromkeys(("alpha", "scale", "learning_rate"), "(0, inf)")
        check_fields(self, {**positive, "beta": "[0, inf)", "weight_decay": "[0, inf)"})
        check_count("batch_size", self.batch_size, 1)
        check_count("epochs", self.epochs, 0)
        if self.negatives_per_step is not None:
            check_count("negatives_per_step", self.negatives_per_step, 1)


class PromptTuner:
    """Two learned contexts, of the names of classes and of negative labels; see the module's docstring.

    Args:
        model: A two-tower model, or an encoder of texts; its parameters stay as they are.
        tokenizer: Its tokenizer.
        names: The names of the C classes.
        negatives: The M negative labels.
        options: How prompts are made and tuned.

    Raises:
        ValueError: As `LearnedPrompts` does, or more negatives a step than there are.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        names: Sequence[str],
        negatives: Sequence[str],
        options: PromptOptions | None = None,
    ):
        self.options = o = options or PromptOptions()
        self.model, self.tokenizer = model, tokenizer
        self.names, self.negatives = list(names), list(negatives)
        self.prompts = LearnedPrompts(model, tokenizer, names, negatives, o.context, o.seed)
        if (o.negatives_per_step or 0) > len(self.negatives):
            raise ValueError(f"negatives_per_step is {o.negatives_per_step} of {len(negatives)}: leave it out for all")
        self.losses: list[float] = []
        """The mean loss of each epoch."""
        self.bank: Tensor | None = None
        """The last known features of all names, [C + M, D]."""

    def class_features(self) -> Tensor:
        """The features of the names of classes behind their context, [C, D]."""
        return self._features(0, len(self.names))

    def negative_features(self) -> Tensor:
        """The features of the negative labels behind their context, [M, D]."""
        return self._features(len(self.names), len(self.prompts))

    @torch.no_grad()
    def _features(self, start: int, end: int) -> Tensor:
        return self.prompts(torch.arange(start, end))

    def fit(self, features: Tensor, labels: Tensor, folder: str | Path | None = None) -> list[float]:
        """Tune the contexts.

        Args:
            features: Those of the rows [R, D], of images or of texts.
            labels: [R]; c < C for a row of a class, C + m for one of the m-th negative label.
            folder: Where the state is kept after each epoch, so that a run that was stopped resumes there.

        Returns:
            The mean loss of each epoch, also of those that were resumed.

        Raises:
            ValueError: Labels that are out of range or not one for each row, or a folder of another run.
        """
        rows = F.normalize(features.detach().to(self.prompts.contexts.device).float(), dim=-1)
        if labels.shape != rows.shape[:1] or not len(rows) or labels.min() < 0 or labels.max() >= len(self.prompts):
            raise ValueError(
                f"labels have the shape {tuple(labels.shape)} for features {tuple(rows.shape)}: give one from 0 to"
                f" {len(self.prompts) - 1} for each row"
            )
        o = self.options
        optimizer = torch.optim.SGD(
            [self.prompts.contexts], o.learning_rate, 0.9, weight_decay=o.weight_decay, nesterov=True
        )
        steps = max(1, o.epochs * -(-len(rows) // o.batch_size))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        file = None if folder is None else Path(folder) / "prompts.pt"
        state = {"optimizer": optimizer, "schedule": schedule}
        self.losses, self.bank = [], None
        done = self._resumed(file, state, rows, labels)
        if done < o.epochs:
            self._train(rows, labels.to(rows.device), state, (done, file))
        return self.losses

    def _train(self, rows: Tensor, labels: Tensor, state: dict[str, Any], where: tuple[int, Path | None]) -> None:
        (done, file), o = where, self.options
        if self.bank is None and o.negatives_per_step is not None:
            self.bank = self._features(0, len(self.prompts))
        texts = None if o.mixing == "none" else self._templates(labels)
        with tracked(range(done, o.epochs), "tuning prompts", console=Console(stderr=True)) as epochs:
            for epoch in epochs:
                draw = np.random.default_rng((o.seed, epoch))  # of its own, so that a resumed run draws the same
                order = torch.from_numpy(draw.permutation(len(rows))).to(rows.device)
                losses = []
                for batch in order.split(o.batch_size):
                    loss = self._loss(rows[batch], labels[batch], texts, draw)
                    state["optimizer"].zero_grad()
                    loss.backward()
                    state["optimizer"].step()
                    state["schedule"].step()
                    losses.append(float(loss.detach()))
                self.losses.append(float(np.mean(losses)))
                if file is not None:
                    self._keep(file, state, rows, labels)

    def _loss(self, rows: Tensor, labels: Tensor, texts: Tensor | None, draw: np.random.Generator) -> Tensor:
        o, table = self.options, self._table(labels, draw).float()
        targets = F.one_hot(labels, len(table)).to(rows.dtype)
        loss = F.cross_entropy(o.scale * rows @ table.T, labels)
        if texts is not None:
            drawn = torch.from_numpy(draw.integers(len(texts), size=len(rows))).to(labels.device)
            mixed = cross_modal(rows, texts[drawn, labels], draw.beta(o.alpha, o.alpha))
            loss = loss + F.cross_entropy(o.scale * mixed @ table.T, labels)
        if o.mixing == "full" and (other := partners(labels, len(self.names), draw)) is not None:
            share = draw.beta(o.alpha, o.alpha)
            mixed, soft = cross_distribution(rows, targets, other, share)
            logits, weight = o.scale * mixed @ table.T, min(1.0, o.beta * share)
            loss = loss + unsure_cross_entropy(logits, soft, weight, len(self.names))
        return loss

    def _table(self, labels: Tensor, draw: np.random.Generator) -> Tensor:
        """The features of all names [C + M, D], of which those that this step embeds have a gradient."""
        o, classes, total = self.options, len(self.names), len(self.prompts)
        if self.bank is None or o.negatives_per_step is None:
            return self.prompts(torch.arange(total))
        own = np.unique(labels.cpu().numpy()[labels.cpu().numpy() >= classes])[: o.negatives_per_step]
        others = np.setdiff1d(np.arange(classes, total), own)
        more = draw.choice(others, o.negatives_per_step - len(own), replace=False)
        which = torch.from_numpy(np.concatenate([np.arange(classes), own, more]))
        fresh = self.prompts(which)
        where = which.to(self.bank.device)
        found = self.bank.index_copy(0, where, fresh.to(self.bank.dtype))
        self.bank = found.detach()
        return found

    def _templates(self, labels: Tensor) -> Tensor:
        """The features of the labels' names in each template [T, C + M, D]; zero for names that no row has."""
        all_names, used = self.names + self.negatives, labels.unique().tolist()
        parts = []
        for template in self.options.templates:
            texts = [template.replace("{}", all_names[label]) for label in used]
            found = encoded(self.model, self.tokenizer, texts, batch_size=64).to(labels.device)
            where = torch.tensor(used, device=labels.device)
            parts.append(found.new_zeros(len(all_names), found.shape[1]).index_copy(0, where, found))
        return torch.stack(parts)

    def _settings(self, rows: Tensor, labels: Tensor) -> str:
        """What a run depends on, beside the model."""
        data = [len(rows), float(rows.double().abs().sum()), labels.tolist()]
        return json.dumps([asdict(self.options), self.names, self.negatives, data])

    def _keep(self, file: Path, state: dict[str, Any], rows: Tensor, labels: Tensor) -> None:
        kept = {name: part.state_dict() for name, part in state.items()}
        kept |= {"contexts": self.prompts.contexts.detach(), "bank": self.bank, "losses": self.losses}
        kept["settings"] = self._settings(rows, labels)
        replace_atomically(file, lambda draft: torch.save(kept, draft))

    def _resumed(self, file: Path | None, state: dict[str, Any], rows: Tensor, labels: Tensor) -> int:
        """How many epochs a stopped run has done, whose state is taken over."""
        if file is None or not file.exists():
            return 0
        kept = torch.load(file, map_location=rows.device)
        if kept["settings"] != self._settings(rows, labels):
            raise ValueError(f"folder is {str(file.parent)!r}, which has prompts of another run: choose another one")
        for name, part in state.items():
            part.load_state_dict(kept[name])
        self._take(kept["contexts"])
        self.bank, self.losses = kept["bank"], kept["losses"]
        return len(self.losses)

    def _take(self, contexts: Tensor) -> None:
        """Raises: ValueError if contexts are not of this shape."""
        own = self.prompts.contexts
        if contexts.shape != own.shape:
            raise ValueError(f"contexts have the shape {tuple(contexts.shape)}, but {tuple(own.shape)} is expected")
        with torch.no_grad():
            own.copy_(contexts)

    def save(self, file: str | Path) -> Path:
        """Write the contexts, the names and the options to a file of safetensors, and return it."""
        from safetensors.torch import save_file

        stored = {"names": self.names, "negatives": self.negatives, "options": asdict(self.options)}
        tensors = {"contexts": self.prompts.contexts.detach().cpu().contiguous()}
        metadata = {key: json.dumps(value) for key, value in stored.items()}
        return replace_atomically(Path(file), lambda draft: save_file(tensors, draft, metadata))

    @classmethod
    def load(cls, file: str | Path, model: Any, tokenizer: Any) -> PromptTuner:
        """The prompts of a file, for the model that they were tuned for.

        Raises:
            ValueError: The model has token embeddings of another width.
        """
        from safetensors import safe_open

        with safe_open(str(file), "pt") as stored:
            found = {key: json.loads(value) for key, value in (stored.metadata() or {}).items()}
            contexts = stored.get_tensor("contexts")
        tuner = cls(model, tokenizer, found["names"], found["negatives"], PromptOptions(**found["options"]))
        tuner._take(contexts)
        return tuner
