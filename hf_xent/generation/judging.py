"""Which of two responses is better, and how strongly: judges, both orders, ranks against a baseline, pairs.

    s(a, b) = P(A) / (P(A) + P(B)) = sigma(z_A - z_B)     the verdict tokens after a prompt that shows a as A, b as B
    p(a, b) = [s(a, b) + 1 - s(b, a)] / 2                 both orders, so that a position bias cancels
    p_i     = p(y_i, baseline)                            ranked pairing: one comparison per response, not per pair
    p_ij    = sigma(logit p_i - logit p_j)                Bradley-Terry, with p in [eps, 1 - eps]

A judge is any function `(rows, first, second) -> [n] probabilities that first is better, shown first`: a model
(`ModelJudge`), a program, a service. `rows` are those of the data set, so a program can read reference answers there.

Source: Zhai et al. 2024, Online Self-Preferring Language Models, arXiv:2405.14103, for ranked pairing and for strengths
of preference; no code is published. The verdict tokens, the two orders, Bradley-Terry and the clipping are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from ..data import Format
from ..lazy import LazyLogits
from ..models.anatomy import positions
from ..models.contexts import eval_mode
from ..models.padding import padded
from ..options.ranges import check_count
from ..patching import patched
from ..system import renamed
from .answering import answer_logits, answer_tokens

Row = Mapping[str, Any]

VERDICT = Format(
    "Which response answers the request better?\n\nRequest: {prompt}\n\nResponse A: {first}\n\nResponse B: {second}\n\n"
    "Reply with the letter of the better response alone, A or B.",
    ("A", "B"),
)
"""The default question; a question may use any field of a row beside `prompt`, `first` and `second`."""

SCHEMES: dict[str, Callable[[int], list[tuple[int, int]]]] = {
    "best_worst": lambda n: [(0, n - 1)],
    "adjacent": lambda n: [(i, i + 1) for i in range(n - 1)],
    "all": lambda n: list(combinations(range(n), 2)),
}
"""Name -> the pairs of ranks (better, worse) that are made from n ranked responses."""


class Judge(Protocol):
    """Any function with this signature."""

    def __call__(self, rows: Sequence[Row], first: Sequence[str], second: Sequence[str]) -> Sequence[float] | Tensor:
        """The probability [n] that `first[i]` answers `rows[i]["prompt"]` better than `second[i]`, in this order."""
        ...


class Verdicts(NamedTuple):
    """A judge's verdicts on n pairs of responses."""

    p: Tensor  # [n] probability that the first is better, float64
    steady: Tensor  # [n] whether both orders prefer the same response


class Quality(NamedTuple):
    """The quality of a judge's probabilities; nan without pairs."""

    accuracy: float  # share of pairs whose better response is preferred; a tie counts one half
    brier: float  # mean of (1 - p)^2; 0.25 if every p is 1/2


class Pair(NamedTuple):
    """Two responses by their indices, and the probability that the chosen one is better (at least 1/2)."""

    chosen: int
    rejected: int
    strength: float


def both_orders(judge: Judge, rows: Sequence[Row], first: Sequence[str], second: Sequence[str]) -> Verdicts:
    """p(first, second), which is 1 - p(second, first) for every judge.

    A judge without position bias, such as a program, is called twice too, with equal results.

    Args:
        judge: Any function with the signature of `Judge`.
        rows: n rows of a data set, with their prompts.
        first: A response to each prompt.
        second: Another response to each prompt.

    Returns:
        The probabilities [n] that the first is better, and whether both orders agree [n].

    Raises:
        ValueError: The judge did not return n probabilities.
    """
    ab, ba = (probabilities(judge(rows, *shown), len(rows)) for shown in ((first, second), (second, first)))
    return Verdicts((ab + 1 - ba) / 2, (ab - 0.5) * (ba - 0.5) <= 0)


def probabilities(verdicts: Sequence[float] | Tensor, n: int) -> Tensor:
    """What a judge answered n comparisons with [n], float64. Raises: ValueError for other than n probabilities."""
    p = torch.as_tensor(verdicts, dtype=torch.float64, device="cpu")
    if p.shape != (n,) or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(
            f"the judge answered {n} comparisons with {p}: it has to return {n} probabilities that the first response"
            " is better"
        )
    return p


def quality(judge: Judge, rows: Sequence[Row], better: Sequence[str], worse: Sequence[str]) -> Quality:
    """The quality of a judge, in both orders, on pairs whose better response is known.

    Args:
        judge: Any function with the signature of `Judge`.
        rows: n rows of a data set, with their prompts.
        better: The better response to each prompt.
        worse: The worse response to each prompt.

    Returns:
        Accuracy and Brier score, nan for no rows.

    Raises:
        ValueError: The judge did not return n probabilities.
    """
    p = both_orders(judge, rows, better, worse).p
    correct = ((p > 0.5).double() + (p >= 0.5)) / 2
    return Quality(float(correct.mean()), float((1 - p).square().mean()))


def strength(p_i: float, p_j: float, eps: float = 0.01) -> float:
    """The probability that response i is better than j, from the comparisons of both with the same baseline.

    Args:
        p_i: The probability that response i is better than the baseline.
        p_j: The probability that response j is better than the baseline.
        eps: Both probabilities are clipped to [eps, 1 - eps] first.

    Returns:
        p_ij in (0, 1).

    Raises:
        ValueError: p_i or p_j is not a probability, or eps is outside of (0, 1/2).
    """
    if not 0 < eps < 0.5:
        raise ValueError(f"eps is {eps}: choose a number above 0 and below 1/2")
    if not (0 <= p_i <= 1 and 0 <= p_j <= 1):
        raise ValueError(f"p is {p_i} and {p_j}: pass probabilities, from 0 to 1")
    clipped = torch.tensor([p_i, p_j], dtype=torch.float64).clamp(eps, 1 - eps).logit()
    return float((clipped[0] - clipped[1]).sigmoid())


def ranked_pairs(p: Sequence[float], scheme: str = "best_worst", eps: float = 0.01) -> list[Pair]:
    """Pairs of n responses, ranked by their probabilities against a baseline; ties are ranked by their index.

    Args:
        p: The probability [n] that each response is better than the baseline.
        scheme: Which ranks are paired, a name of `SCHEMES`.
        eps: As for `strength`.

    Returns:
        The pairs, the better response first.

    Raises:
        ValueError: An unknown scheme, or what `strength` refuses.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme is {scheme!r}: choose one of {', '.join(SCHEMES)}")
    order = sorted(range(len(p)), key=lambda i: -p[i])
    return [Pair(order[i], order[j], strength(p[order[i]], p[order[j]], eps)) for i, j in SCHEMES[scheme](len(p))]


@dataclass
class ModelJudge:
    """A language model as a judge: the odds of two verdict tokens, from two rows of its head at one position.

    Batches are padded on the right and only one position of each row goes through the head, so a verdict does not
    depend on the rest of its batch. The model is patched while it judges (`hf_xent.patch`), in evaluation mode.

    Args:
        model: A causal LM; None is the model of the trainer that gets the judge.
        tokenizer: The model's tokenizer; None is that of the trainer.
        format: The question and its two verdicts.
        batch_size: Number of prompts in a forward pass.

    Raises:
        ValueError: When it judges: the verdicts are not two different single tokens, a prompt has more tokens than the
            model has positions, or batch_size is below 1.
    """

    model: Any = None
    tokenizer: Any = None
    format: Format = VERDICT
    batch_size: int = 8

    def __call__(self, rows: Sequence[Row], first: Sequence[str], second: Sequence[str]) -> Tensor:
        """s(first, second) [n]."""
        check_count("batch_size", self.batch_size, 1)
        if not rows:
            return torch.empty(0)
        questions = [self._encode(*shown) for shown in zip(rows, first, second, strict=True)]
        verdicts = answer_tokens(self.format, [answers for _, answers in questions])
        prompts = [prompt for prompt, _ in questions]
        longest, room = max(map(len, prompts)), positions(self.model)
        if room is not None and longest > room:
            raise ValueError(
                f"a prompt with two responses has {longest} tokens, but the model has {room} positions: shorten it"
            )
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # batches of similar lengths
        odds = torch.empty(len(prompts))
        starts = range(0, len(order), self.batch_size)
        for start in tqdm(starts, "Judging", leave=False, disable=None):  # shown in terminals only
            part = order[start : start + self.batch_size]
            odds[part] = self._odds([prompts[i] for i in part], verdicts).float().cpu()
        return odds

    def _encode(self, row: Row, first: str, second: str) -> tuple[list[int], list[list[int]]]:
        item = {**row, "prompt": text_of(row["prompt"]), "first": first, "second": second}
        return self.format.encode(item, self.tokenizer)

    def _odds(self, prompts: list[list[int]], verdicts: list[int]) -> Tensor:
        """sigma(z_A - z_B) [n] after n prompts of any lengths."""
        model = self.model
        ids, mask = padded(prompts, device=model.device)
        with torch.no_grad(), eval_mode(model), patched(model, always=True):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return odds(logits, mask.sum(1) - 1, verdicts)


def odds(logits: LazyLogits | Tensor, last: Tensor, verdicts: list[int]) -> Tensor:
    """sigma(z_A - z_B) [n] of two tokens at one position of each row; arguments are those of `answer_logits`."""
    z = answer_logits(logits, last, verdicts)
    return (z[:, 0] - z[:, 1]).sigmoid()


def text_of(prompt: str | Sequence[Row]) -> str:
    """A prompt as text: the text, the content of a single message, or several messages with roles, one per line."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def __getattr__(name: str) -> Any:
    return renamed.attribute(__name__, name)
