"""Train on answers that a model judges itself (OSP).

Data: 'prompt', text or a conversation, and for the evaluation 'chosen' and 'rejected'.
Example: hf-xent osp --model_name_or_path smollm2 --dataset_name prompts.jsonl --num_generations 4 --use_peft
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .base import Setup
from .preferences import PAIR, PreferenceArguments, PreferenceRecipe, with_numbers

PARTS = ("{prompt}", "{first}", "{second}")


@dataclass
class OSPArguments(PreferenceArguments):
    """Where the prompts come from, and who judges the answers."""

    judge_model: str | None = field(
        default=None, metadata={"help": "Another model as the judge, by Hub id or path, in place of --judge."}
    )
    judge_question: str | None = field(
        default=None,
        metadata={"help": "What the judge is asked: a text with {prompt}, {first} and {second}, to answer A or B."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        question = self.judge_question
        if question is not None and (missing := [part for part in PARTS if part not in question]):
            raise ValueError(f"judge_question has no {' and no '.join(missing)}: write them where the texts belong")


class OSP(PreferenceRecipe):
    """`OSPTrainer` from the command line."""

    trainer, config = "OSPTrainer", "osp:OSPConfig"
    arguments = OSPArguments
    shown: ClassVar[Mapping[str, str]] = {
        name: text for name, text in PreferenceRecipe.shown.items() if name != "precompute_ref_log_probs"
    }

    def check(self, setup: Setup) -> None:
        """Raises: ValueError for two judges."""
        if setup.data.judge_model is not None and "judge" in setup.given:
            raise ValueError(
                f"judge is {setup.config.judge!r} beside judge_model {setup.data.judge_model!r}: name one of them"
            )

    def datasets(self, setup: Setup, model: Any, tokenizer: Any) -> dict[str, Any]:
        """The prompts, pairs to evaluate on if the rows have them, and the judge."""
        options = super().datasets(setup, model, tokenizer)
        train, test = options["train_dataset"], options["eval_dataset"]
        answers = [name for name in (*PAIR, "preference_prob", "weight") if name in train.column_names]
        is_pair = test is not None and set(PAIR) <= set(test.column_names)
        options |= {"train_dataset": train.remove_columns(answers), "eval_dataset": test if is_pair else None}
        return options | {"judge": _judge(setup)}

    @staticmethod
    def rows(source: str, split: str | None) -> Any:
        """The rows of a source. Raises: ValueError if it cannot be read."""
        from ..data.text import load_rows

        return with_numbers(load_rows(source, split), source)


def _judge(setup: Setup) -> Any:
    """The judge; None for the one that the configuration names."""
    data: OSPArguments = setup.data
    if data.judge_model is None and data.judge_question is None:
        return None
    from ..data import Format
    from ..generation.judging import VERDICT, ModelJudge
    from ..models import loading

    form = VERDICT if data.judge_question is None else Format(data.judge_question, VERDICT.answers)
    model, tokenizer = (None, None) if data.judge_model is None else loading.load(data.judge_model)
    return ModelJudge(model and model.to(setup.config.device), tokenizer, form)
