"""Train on targets whose words may have moved (EISL).

Data: 'prompt' and 'completion', which a model with an encoder reads as source and target; for others also texts, chats.
Example: hf-xent eisl --model_name_or_path my/bart --dataset_name pairs.jsonl --ce_steps 0.7 --max_steps 100
"""

from __future__ import annotations

from typing import Any

from .base import Setup, split_rows
from .text import TextArguments, TextRecipe


class EISL(TextRecipe):
    """`EISLTrainer` from the command line."""

    trainer, config = "EISLTrainer", "eisl:EISLConfig"

    def model(self, setup: Setup) -> tuple[Any, Any]:
        """A causal LM, or an encoder and a decoder if the checkpoint is one."""
        from transformers import AutoConfig, AutoModelForSeq2SeqLM

        from ..models.loading import explain_load_errors, tokenizer_of
        from .models import adapted, load

        name = setup.model.model_name_or_path
        with explain_load_errors(name) as source:
            config = AutoConfig.from_pretrained(source, revision=setup.model.model_revision)
        if not config.is_encoder_decoder:
            return super().model(setup)
        return adapted(load(AutoModelForSeq2SeqLM, setup.model), setup.model, "SEQ_2_SEQ_LM"), tokenizer_of(name)

    def datasets(self, setup: Setup, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Sources with their targets for an encoder and a decoder, else blocks or rows as of other recipes."""
        from transformers import DataCollatorForSeq2Seq

        if not model.config.is_encoder_decoder:
            return super().datasets(setup, model, tokenizer)
        data: TextArguments = setup.data
        train, test = split_rows(data, lambda source, split: _pairs(source, split, data, tokenizer), setup.config.seed)
        collator = DataCollatorForSeq2Seq(tokenizer, model, label_pad_token_id=-100)
        return {"train_dataset": train, "eval_dataset": test, "data_collator": collator}


def _pairs(source: str, split: str | None, data: TextArguments, tokenizer: Any) -> Any:
    """Tokens of prompts, and of completions as labels. Raises: ValueError if the rows have neither."""
    from ..data.text import load_rows

    rows = load_rows(source, split)
    if not {"prompt", "completion"} <= {*rows.column_names}:
        raise ValueError(
            f"{source} has the columns {', '.join(rows.column_names)}, but an encoder reads 'prompt' and a decoder"
            " writes 'completion': rename your columns"
        )

    def encode(row: Any) -> dict[str, Any]:
        options = {"truncation": True, "max_length": data.block_size}
        return {**tokenizer(row["prompt"], text_target=row["completion"], **options)}

    return rows.map(encode, remove_columns=rows.column_names, desc="tokenize")
