"""Classification items as prompts in several formats: templates and answer choices, applied to a dataset.

    formats = PromptFormats(
        Format("{premise} So is it true that {hypothesis}?", ("Yes", "No")),
        Format("Premise: {premise} Hypothesis: {hypothesis} Answer:", ("True", "False")),
    )
    rows = formats.build(dataset, tokenizer)          # a row has an item in all formats with all answers, as token ids
    batch = formats.collate(rows[:2], pad=0)          # [items, formats, answers, tokens]

An answer is a continuation of the prompt; it follows a space, unless the prompt ends in one, and nothing follows it. A
tokenizer with a chat template puts the prompt into a user message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Format:
    """One way to ask for the class of an item; both arguments may have fields of the item in braces.

    Args:
        template: The prompt: '{premise} So is it true that {hypothesis}?'.
        answers: One answer for each choice: ('Yes', 'No').
    """

    template: str
    answers: tuple[str, ...]

    def encode(self, item: Mapping[str, Any], tokenizer: Any, chat: bool = True) -> tuple[list[int], list[list[int]]]:
        """Token ids of an item's prompt and answers.

        Args:
            item: The item's fields by name.
            tokenizer: The model's tokenizer.
            chat: Whether the tokenizer's chat template is applied to the prompt, if it has one.

        Returns:
            The ids of the prompt, and those of each answer.

        Raises:
            ValueError: For a field that the item does not have, or a prompt whose tokens are not a prefix of those with
                its answer.
        """
        try:
            text = self.template.format_map(item)
            answers = [answer.format_map(item) for answer in self.answers]
        except KeyError as error:
            raise ValueError(
                f"a format has the field {error}, but items have {', '.join(item)}: {self.template!r}"
            ) from error
        templated = chat and getattr(tokenizer, "chat_template", None)
        if templated:
            message = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        space = "" if text[-1:].isspace() else " "
        special = not templated  # a chat template has its own special tokens
        prompt = tokenizer(text, add_special_tokens=special)["input_ids"]
        encoded = []
        for answer in answers:
            whole = tokenizer(text + space + answer, add_special_tokens=special)["input_ids"]
            if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
                raise ValueError(
                    f"the tokens of a prompt are not a prefix of those with its answer {answer!r}: end the template on"
                    f" a token boundary: {self.template!r}"
                )
            encoded.append(whole[len(prompt) :])
        return prompt, encoded


class PromptFormats:
    """The K formats of a task with C answer choices; see the module's docstring.

    Args:
        *formats: At least two formats, all with the same number of answers, at least two.

    Raises:
        ValueError: For fewer than two formats or answers, or formats with different numbers of answers.
    """

    def __init__(self, *formats: Format):
        self.formats = formats
        counts = {len(form.answers) for form in formats}
        if len(formats) < 2 or len(counts) != 1 or counts == {1}:
            raise ValueError(
                f"formats have {sorted(counts)} answers and there are {len(formats)}: pass at least two formats, all"
                " with the same number of answers, at least two"
            )

    def build(self, dataset: Any, tokenizer: Any, *, label: str | None = "label", chat: bool = True) -> Any:
        """Encodes all items in all formats.

        Args:
            dataset: A `datasets.Dataset` with the fields of the templates.
            tokenizer: The model's tokenizer.
            label: The column with the number of the right answer, if there is one; None for no `gold`.
            chat: Whether the tokenizer's chat template is applied to prompts, if it has one.

        Returns:
            A dataset of `prompts` (K lists of tokens), `answers` (K times C of them) and, with labels, `gold`.

        Raises:
            ValueError: For a field that an item does not have, or a prompt whose tokens are not a prefix of those with
                its answer.
        """

        def encode(item: dict[str, Any]) -> dict[str, Any]:
            pairs = [form.encode(item, tokenizer, chat) for form in self.formats]
            prompts, answers = ([pair[i] for pair in pairs] for i in (0, 1))
            row: dict[str, Any] = {"prompts": prompts, "answers": answers}
            if label is not None and label in item:
                row["gold"] = item[label]
            return row

        return dataset.map(encode, remove_columns=dataset.column_names, desc="formats")

    @staticmethod
    def collate(rows: list[dict[str, Any]], pad: int = 0) -> dict[str, Tensor]:
        """A batch of rows that `build` made.

        Args:
            rows: B rows.
            pad: The id with which shorter sequences are padded.

        Returns:
            `input_ids`, `attention_mask` and `answers` (-100 outside of the answer), padded on the right, [B, K, C, L];
            and `gold` [B], if all rows have it.
        """
        import torch  # lazy: it takes a second, and data sets do not need it

        sequences = [
            [
                [(prompt, answer) for answer in answers]
                for prompt, answers in zip(row["prompts"], row["answers"], strict=True)
            ]
            for row in rows
        ]
        length = max(len(p) + len(a) for row in sequences for form in row for p, a in form)

        def padded(join: Any, fill: int) -> Tensor:
            ragged = [[[join(p, a) for p, a in form] for form in row] for row in sequences]
            return torch.tensor([[[x + [fill] * (length - len(x)) for x in form] for form in row] for row in ragged])

        batch = {
            "input_ids": padded(lambda p, a: p + a, pad),
            "attention_mask": padded(lambda p, a: [1] * (len(p) + len(a)), 0),
            "answers": padded(lambda p, a: [-100] * len(p) + a, -100),
        }
        if all("gold" in row for row in rows):
            batch["gold"] = torch.tensor([int(row["gold"]) for row in rows])
        return batch
