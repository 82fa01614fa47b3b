"""Train question answering by self-distillation.

Data: SQuAD's 'question', 'context' and 'answers', or a column 'answer' whose text is in the context; 'id' if you like.
Example: hf-xent self-distil-qa --model_name_or_path my/encoder --dataset_name rajpurkar/squad --max_steps 100
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .base import DataArguments, Recipe, Setup, split_rows

CITIES = "cities"


@dataclass
class QuestionArguments(DataArguments):
    """Where the questions come from, and how their contexts are cut."""

    dataset_name: str = field(
        default=CITIES,
        metadata={
            "help": "The rows: 'cities' (packaged, offline), a JSON, CSV or Parquet file, a folder, or a Hub id."
        },
    )
    max_length: int = field(default=384, metadata={"help": "Tokens of a window of question and context."})
    doc_stride: int = field(default=128, metadata={"help": "Tokens that two neighboring windows share."})
    max_answer_tokens: int = field(default=30, metadata={"help": "The most tokens of an answer, in evaluation."})


class SelfDistilQA(Recipe):
    """`SelfDistilQATrainer` from the command line."""

    trainer, config = "SelfDistilQATrainer", "self_distil_qa:SelfDistilQAConfig"
    arguments = QuestionArguments

    def model(self, setup: Setup) -> tuple[Any, Any]:
        """A model that answers questions, whose head is new unless the checkpoint has one."""
        from transformers import AutoModelForQuestionAnswering

        from ..models.loading import tokenizer_of
        from .labeled import padded_by
        from .models import adapted, load

        tokenizer = tokenizer_of(setup.model.model_name_or_path)
        model = load(AutoModelForQuestionAnswering, setup.model, new_head=True, num_labels=2)
        padded_by(model, tokenizer)
        return adapted(model, setup.model, "QUESTION_ANS"), tokenizer

    def datasets(self, setup: Setup, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Windows of tokens, and the measures of their answers."""
        from ..data.questions import windows
        from ..models.anatomy import check_room
        from ..trainers import AnswerMetrics

        data: QuestionArguments = setup.data
        check_room(model, data.max_length, "max_length")
        train, test = split_rows(data, questions, setup.config.seed)
        shape = {"max_length": data.max_length, "stride": data.doc_stride}
        options: dict[str, Any] = {"train_dataset": windows(train, tokenizer, **shape), "eval_dataset": None}
        if test is not None:
            features = windows(test, tokenizer, **shape)
            no_answer = any(not answers["text"] for answers in test["answers"])
            metrics = {"max_answer_tokens": data.max_answer_tokens, "no_answer": no_answer}
            options |= {"eval_dataset": features, "compute_metrics": AnswerMetrics(test, features, **metrics)}
        return options


def questions(source: str, split: str | None) -> Any:
    """Rows with the columns of SQuAD.

    Raises:
        ValueError: The source cannot be read, has none of the columns, or an answer is not in its context.
    """
    from ..data.questions import COLUMNS
    from ..data.text import load_rows

    rows = load_rows(source, split)
    if source == CITIES:
        rows = rows.rename_column("text", "context")
    if "id" in rows.column_names:
        rows = rows.remove_columns("id").add_column("id", [str(row_id) for row_id in rows["id"]])
    else:
        rows = rows.add_column("id", [str(i) for i in range(len(rows))])
    known = rows.column_names
    if missing := [name for name in ("question", "context") if name not in known]:
        raise ValueError(
            f"{source} has no column {' and no '.join(missing)}, but {', '.join(known)}: rename its columns"
        )
    if "answers" not in known:
        if "answer" not in known:
            raise ValueError(f"{source} has neither 'answers' nor 'answer', but {', '.join(known)}: rename its columns")
        rows = rows.map(_found, desc="answers")
    return rows.select_columns(COLUMNS)


def _found(row: Mapping[str, Any]) -> dict[str, Any]:
    """SQuAD's column for an answer that is a text in its context. Raises: ValueError if it is not there."""
    answer, context = row["answer"], row["context"]
    if not answer:
        return {"answers": {"text": [], "answer_start": []}}
    start = context.find(answer)
    if start < 0:
        raise ValueError(f"row {row['id']!r}: its answer {answer!r} is not in its context {context[:60]!r}: correct it")
    return {"answers": {"text": [answer], "answer_start": [start]}}
