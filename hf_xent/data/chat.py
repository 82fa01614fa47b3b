"""Weights of the turns of a chat as weights of its tokens, under any chat template.

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ..., "weight": 0}, ...]}

is the format of OpenAI's fine-tuning and of axolotl: a turn of weight 0 is not learned. Here a weight is any number
>= 0, and 1 where a turn has none. The text of a turn is what the template adds for it, its header and its end included:
it ends where the rendering of the chat up to it ends, or, if a template renders a turn otherwise when others follow (it
drops earlier reasoning), as far behind its content as it ends there. A token belongs to the turn it begins in; what
comes before the first turn and after the last one (a system prompt of the template's own) belongs to these.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

KEY = "weight"


def has_weights(messages: Any) -> bool:
    """Whether one of the turns has a weight."""
    return isinstance(messages, Sequence) and any(
        isinstance(turn, Mapping) and turn.get(KEY) is not None for turn in messages
    )


def chat_tokens(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> dict[str, list[Any]]:
    """The tokens of a chat, and the weight of each token's turn, as columns of a data set.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        messages: Turns with `role`, `content` and, optionally, `weight`.
        **options: As for `tokenizer.apply_chat_template`, such as `chat_template` or `tools`.

    Returns:
        `input_ids` and `token_weights`, lists of one length.

    Raises:
        ValueError: The template renders a turn in another way when others follow, and its end cannot be found; or the
            tokenizer is not a fast one.

    Example: `dataset.map(lambda row: chat_tokens(tokenizer, row["messages"]), remove_columns="messages")`
    """
    turns = [{name: x for name, x in turn.items() if name != KEY and x is not None} for turn in messages]
    weights = [1.0 if turn.get(KEY) is None else turn[KEY] for turn in messages]
    text = _rendered(tokenizer, turns, options)
    ends = _ends(tokenizer, turns, text, options)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer is a {type(tokenizer).__name__}, which does not say where tokens begin: load a fast one"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    last = len(turns) - 1
    owners = [min(bisect_right(ends, start), last) for start, _ in encoded["offset_mapping"]]
    return {"input_ids": encoded["input_ids"], "token_weights": [weights[owner] for owner in owners]}


def _rendered(tokenizer: Any, turns: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
    text: str = tokenizer.apply_chat_template(list(turns), tokenize=False, **options)
    return text


def _ends(tokenizer: Any, turns: list[dict[str, Any]], text: str, options: Mapping[str, Any]) -> list[int]:
    """Where each turn ends in the text of the chat. Raises: ValueError if it cannot be found."""
    ends: list[int] = []
    for i in range(1, len(turns)):
        alone = _rendered(tokenizer, turns[:i], options)
        end = len(alone) if text.startswith(alone) else _end_behind_content(turns[i - 1], alone, text, *ends[-1:])
        if end is None or end < max(ends, default=0):
            raise ValueError(
                f"messages have weights, but the chat template renders turn {i} in another way when others follow: give"
                " token_weights with input_ids instead"
            )
        ends.append(end)
    return ends


def _end_behind_content(turn: Mapping[str, Any], alone: str, text: str, start: int = 0) -> int | None:
    """The end of a turn in the whole text: what follows its content when it is the last one follows it there too."""
    content = turn.get("content")
    if not isinstance(content, str) or not content.strip():
        return None
    content = content.rsplit("</think>", 1)[-1].strip()  # what templates keep of earlier turns that reason
    found, last = text.find(content, start), alone.rfind(content)
    if not content or found < 0 or last < 0:
        return None
    tail = alone[last + len(content) :]
    end = found + len(content)
    return end + len(tail) if text.startswith(tail, end) else None
