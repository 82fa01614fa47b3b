"""Membership scores of texts while a model is trained: before the training, and after chosen epochs.

    from hf_xent.callbacks.membership import MembershipCallback         # imports transformers, as detection does not

    membership = MembershipCallback(scorer, texts, labels, epochs=(1, 2, 4))
    trainer = XentTrainer(model, config, train_dataset=rows, callbacks=[membership])
    trainer.train()
    membership.results[4]["min_k_pp"]["auroc"]           # by epoch and score; the rows of `detection.evaluate`

The model before the training serves as the reference, so no second model is needed: if the scorer has 'loss',
'reference' and 'reference_gap' compare with it. Epoch 0 is that model, when every score should be near chance.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Any

from numpy.typing import ArrayLike
from transformers import TrainerCallback

from ..detection.evaluation import evaluate
from ..detection.scorer import TextScorer


class MembershipCallback(TrainerCallback):
    """Evaluates the scores of texts when it is made, and after chosen epochs; see the module's docstring.

    `results` has the metrics by epoch and score; epoch 0 is the model before the training.

    Args:
        scorer: Scores texts under the model that is trained.
        texts: Texts that are trained on, and others [N].
        labels: 1 for a text that is trained on, else 0 [N].
        epochs: The epochs after which the scores are evaluated.
        **options: As for `hf_xent.detection.evaluate`.
    """

    def __init__(
        self, scorer: TextScorer, texts: Sequence[str], labels: ArrayLike, epochs: Collection[int], **options: Any
    ):
        self.scorer, self.texts, self.labels, self.epochs, self.options = scorer, texts, labels, epochs, options
        self.before = scorer(texts)
        self.results = {0: self._evaluated(self.before)}

    @property
    def found(self) -> dict[int, dict[str, dict[str, float]]]:
        """The former name of `results`."""
        warnings.warn("MembershipCallback.found is now results: use the new name", DeprecationWarning, stacklevel=2)
        return self.results

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer."""
        if (epoch := round(state.epoch)) in self.epochs:
            self.results[epoch] = self._evaluated(self.scorer(self.texts))

    def _evaluated(self, scores: dict[str, Any]) -> dict[str, dict[str, float]]:
        """Metrics of every score, and of a classifier of the words alone."""
        if "loss" in scores:
            before, after = self.before["loss"], scores["loss"]
            scores = scores | {"reference": after / before, "reference_gap": before - after}
        return evaluate(scores, self.labels, self.texts, **self.options)
