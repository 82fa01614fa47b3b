"""What OpenAI-compatible servers say about the tokens of a prompt, in the two forms there are.

    vLLM      request prompt_logprobs=k        answer choices[0].prompt_logprobs: null or {id: {"logprob": x}} per token
    classic   request echo=true, logprobs=k    answer choices[0].logprobs: `tokens`, and `top_logprobs`, {token: x} each

Both have log-probabilities at temperature 1 for every token of the prompt but the first, given those before it: the k
largest, and the token's own. In the classic form a token is its text, or 'token_id:7' where the server takes vLLM's
`return_tokens_as_token_ids`. Source: the documentation of vLLM's OpenAI-compatible server and OpenAI's reference of
completions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .server import Unusable

Candidates = dict[int, float]
"""Token id -> log-probability."""
TokenOf = Callable[[str], int | None]
"""The id of a token in the classic form, or None if its text is that of several tokens or of none."""
ID = "token_id:"

PROTOCOLS: dict[str, dict[str, Any]] = {
    "prompt_logprobs": {"prompt_logprobs": ...},
    "echo_ids": {"echo": True, "logprobs": ..., "return_tokens_as_token_ids": True},
    "echo": {"echo": True, "logprobs": ...},
}
"""Name -> what a request has beside prompt and model; ... stands for k. They are tried in this order."""


def request(protocol: str, model: str, ids: Sequence[int], k: int) -> dict[str, Any]:
    """The body of a request about a prompt of token ids; one token is generated, which servers insist on."""
    options = {name: k if value is ... else value for name, value in PROTOCOLS[protocol].items()}
    return {"model": model, "prompt": list(ids), "max_tokens": 1, "temperature": 0, **options}


def answered(protocol: str, answer: Any) -> bool:
    """Whether an answer has what the protocol asks for; servers ignore what they do not know."""
    choice = _choice(answer)
    if protocol == "prompt_logprobs":
        return choice.get("prompt_logprobs") is not None
    return isinstance(choice.get("logprobs"), dict) and choice["logprobs"].get("top_logprobs") is not None


def candidates(
    protocol: str, answer: Any, ids: Sequence[int], k: int, token_of: TokenOf | None
) -> list[list[tuple[int, float]] | None]:
    """The k most probable tokens behind each token of a prompt but the last, the best one first.

    None stands for a position where the server's words for them do not tell which tokens they are.

    Raises:
        Unusable: The answer is about other tokens, or about fewer.
    """
    choice, found = _choice(answer), list[Candidates | None]()
    try:
        if protocol == "prompt_logprobs":
            given = choice["prompt_logprobs"]
            _check_length(len(given), len(ids), at_most=len(ids))
            found += [_by_id(entry, own, k) for entry, own in zip(given[1:], ids[1:], strict=True)]
        else:
            words, given = choice["logprobs"]["tokens"], choice["logprobs"]["top_logprobs"]
            _check_length(len(given), len(ids), at_most=len(ids) + 1)  # it may have generated one
            for entry, word, own in list(zip(given, words, ids, strict=False))[1:]:
                found.append(_by_word(entry, word, own, token_of or _without_tokenizer))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise Unusable(f"an answer of another form ({type(error).__name__}: {error})") from error
    best = [None if entry is None else _best(entry, k) for entry in found]
    fewest = min((len(entry) for entry in best if entry is not None), default=k)
    if len(best) != len(ids) - 1 or fewest < k:
        raise Unusable(
            f"{fewest} of {k} log-probabilities of a token (start vLLM with --max-logprobs {k}, or choose a smaller k)"
        )
    return best


def _best(entry: Candidates, k: int) -> list[tuple[int, float]]:
    """The k most probable ones: the prompt's own token may be one more."""
    return sorted(entry.items(), key=lambda x: (-x[1], x[0]))[:k]


def _choice(answer: Any) -> dict[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Unusable("an answer without choices")
    found: dict[str, Any] = choices[0]
    return found


def _check_length(found: int, tokens: int, at_most: int) -> None:
    if not tokens <= found <= at_most:
        raise Unusable(f"log-probabilities of {found} tokens for a prompt of {tokens}")


def _by_id(entry: dict[str, Any], own: int, k: int) -> Candidates:
    """Those of rank 1 to k, if ranks are given: the prompt's own token may have any."""
    if str(own) not in entry:
        raise Unusable(f"log-probabilities without that of the prompt's own token {own}")
    return {int(token): float(x["logprob"]) for token, x in entry.items() if (x.get("rank") or 1) <= k}


def _by_word(entry: dict[str, Any], word: str, own: int, token_of: TokenOf) -> Candidates | None:
    tokens = {token: _token(token, token_of) for token in (word, *entry)}
    if tokens[word] not in (own, None):
        raise Unusable(f"the token {tokens[word]} where the prompt has {own}")
    found = {tokens[token]: float(value) for token, value in entry.items()}
    return None if None in found or len(found) < len(entry) else found  # type: ignore[return-value]  # no None left


def _token(word: str, token_of: TokenOf) -> int | None:
    return int(word.removeprefix(ID)) if word.startswith(ID) else token_of(word)


def _without_tokenizer(word: str) -> int | None:
    raise Unusable(
        f"the token {word!r} as text (pass the tokenizer, or a server that takes return_tokens_as_token_ids)"
    )


def words_of(tokenizer: Any) -> TokenOf:
    """The ids of tokens by their text, where that is the text of one token alone."""
    numbers = range(len(tokenizer))
    found: dict[str, int | None] = {}
    for words in (tokenizer.batch_decode([[i] for i in numbers]), tokenizer.convert_ids_to_tokens([*numbers])):
        for i, word in zip(numbers, words, strict=True):
            found[word] = i if found.get(word, i) == i else None
    return found.get
