"""Membership scores while a model is trained: before it is, and after some epochs.

    from hf_xent.callbacks.membership import MembershipCallback         # imports transformers, as detection does not

    watch = MembershipCallback(scorer, texts, labels, epochs=(1, 2, 4))
    trainer = XentTrainer(model, config, train_dataset=rows, callbacks=[watch])
    trainer.train()
    watch.found[4]["min_k_pp"]["auroc"]                  # by epoch and score; the rows of `detection.evaluate`

The model before the training is a reference that needs no second model: if the scorer has 'loss', 'reference' and
'reference_gap' are of it. Epoch 0 is that model, when every score should be near chance.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from numpy.typing import ArrayLike
from transformers import TrainerCallback

from ..detection.evaluation import evaluate
from ..detection.scorer import TextScorer


class MembershipCallback(TrainerCallback):
    """Evaluates the scores of texts when it is made, and after some epochs; see the module's docstring.

    `found` has the metrics by epoch and score, 0 for the model before the training.

    Args:
        scorer: Scores texts under the model that is trained.
        texts: Those that were trained on, and others [N].
        labels: 1 for a text that was trained on, else 0 [N].
        epochs: The epochs after which the scores are evaluated.
        **options: As for `hf_xent.detection.evaluate`.
    """

    def __init__(
        self, scorer: TextScorer, texts: Sequence[str], labels: ArrayLike, epochs: Collection[int], **options: Any
    ):
        self.scorer, self.texts, self.labels, self.epochs, self.options = scorer, texts, labels, epochs, options
        self.before = scorer(texts)
        self.found = {0: self._evaluated(self.before)}

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer."""
        if (epoch := round(state.epoch)) in self.epochs:
            self.found[epoch] = self._evaluated(self.scorer(self.texts))

    def _evaluated(self, scores: dict[str, Any]) -> dict[str, dict[str, float]]:
        """Metrics of every score, and of words alone."""
        if "loss" in scores:
            before, after = self.before["loss"], scores["loss"]
            scores = scores | {"reference": after / before, "reference_gap": before - after}
        return evaluate(scores, self.labels, self.texts, **self.options)
