"""Classification items as prompts in several formats: templates and answer choices, applied to a dataset.

    formats = PromptFormats(
        Format("{premise} So is it true that {hypothesis}?", ("Yes", "No")),
        Format("Premise: {premise} Hypothesis: {hypothesis} Answer:", ("True", "False")),
    )
    rows = formats.build(dataset, tokenizer)          # one row an item: all formats with all answers, as token ids
    batch = formats.collate(rows[:2], pad=0)          # [items, formats, answers, tokens]

An answer is what a model should continue the prompt with; it follows a space, unless the prompt ends in one, and is
followed by nothing. A tokenizer with a chat template puts the prompt into a user's message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Format:
    """One way to ask for the class of an item; both arguments have an item's fields in braces.

    Args:
        template: The prompt: '{premise} So is it true that {hypothesis}?'.
        answers: One answer for each choice: ('Yes', 'No').
    """

    template: str
    answers: tuple[str, ...]

    def encode(self, item: Mapping[str, Any], tokenizer: Any, chat: bool = True) -> tuple[list[int], list[list[int]]]:
        """Token ids of an item's prompt and answers.

        Args:
            item: Its fields by name.
            tokenizer: The model's.
            chat: Whether the prompt goes through the tokenizer's chat template, if it has one.

        Returns:
            The ids of the prompt, and those of each answer.

        Raises:
            ValueError: For a field the item does not have, or a prompt whose tokens are no prefix of those with its
                answer.
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
        special = not templated  # a chat template writes its own
        prompt = tokenizer(text, add_special_tokens=special)["input_ids"]
        encoded = []
        for answer in answers:
            whole = tokenizer(text + space + answer, add_special_tokens=special)["input_ids"]
            if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
                raise ValueError(
                    f"the tokens of a prompt are no prefix of those with its answer {answer!r}: end the template on a"
                    f" token boundary: {self.template!r}"
                )
            encoded.append(whole[len(prompt) :])
        return prompt, encoded


class PromptFormats:
    """The K formats of a task with C answer choices; see the module's docstring.

    Args:
        *formats: Two at least, all with the same number of answers, two at least.

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
        """All items in all formats.

        Args:
            dataset: A `datasets.Dataset` with the fields of the templates.
            tokenizer: The model's.
            label: The column with the number of the right answer, where there is one.
            chat: Whether prompts go through the tokenizer's chat template, if it has one.

        Returns:
            A dataset of `prompts` (K lists of tokens), `answers` (K times C of them) and, with labels, `gold`.

        Raises:
            ValueError: For a field an item does not have, or a prompt whose tokens are no prefix of those with its
                answer.
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
            pad: The id that fills up shorter sequences.

        Returns:
            `input_ids`, `attention_mask` and `answers` (-100 off the answer), padded on the right, [B, K, C, L]; and
            `gold` [B], if all rows have it.
        """
        import torch  # lazy: a second, which datasets can do without

        sequences = [
            [
                [(prompt, answer) for answer in answers]
                for prompt, answers in zip(row["prompts"], row["answers"], strict=True)
            ]
            for row in rows
        ]
        length = max(len(p) + len(a) for row in sequences for form in row for p, a in form)

        def filled(write: Any, fill: int) -> Tensor:
            ragged = [[[write(p, a) for p, a in form] for form in row] for row in sequences]
            return torch.tensor([[[x + [fill] * (length - len(x)) for x in form] for form in row] for row in ragged])

        batch = {
            "input_ids": filled(lambda p, a: p + a, pad),
            "attention_mask": filled(lambda p, a: [1] * (len(p) + len(a)), 0),
            "answers": filled(lambda p, a: [-100] * len(p) + a, -100),
        }
        if all("gold" in row for row in rows):
            batch["gold"] = torch.tensor([int(row["gold"]) for row in rows])
        return batch
