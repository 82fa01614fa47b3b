"""Vocabularies of sub-words of one size: trained, scored by their likelihood, and texts cut within a budget of tokens.

    p(text) = sum over the ways z to cut it of prod_i p(z_i)        best way: the shortest path of the costs -log p(z_i)

`tokenizers` trains the vocabulary and finds the path, this file drives it. What it adds is the likelihood and, with
`segmentation`, a bound on the number of tokens of a text.

The path is optimal for given probabilities; the vocabulary is not: BPE adds, and the unigram model prunes, greedily.

Source: arXiv:2410.18441, optimal sub-word encoding, which reports no measurements; the unigram model is of
    arXiv:1804.10959, BPE of arXiv:1508.07909.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from ..options.ranges import check_count
from .segmentation import Segmenter

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

ALGORITHMS = ("unigram", "bpe", "wordpiece")
END = "<|endoftext|>"
SPREAD = 256e-4
"""Bytes that the unigram model has lost get its least score and up to this much more, in an order that varies."""


@dataclass(frozen=True)
class Likelihood:
    """What a unigram model makes of texts.

    Args:
        best: Log-likelihood of the tokens into which the tokenizer cuts the texts, in nats.
        summed: Log-likelihood summed over all ways to cut them, in nats; at least `best`.
        tokens: Number of these tokens.
        bytes: Length of the texts in UTF-8.
    """

    best: float
    summed: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """-log2 of the summed likelihood, over the bytes."""
        return bits_per_byte(-self.summed, self.bytes)


def bits_per_byte(nats: float, size: int) -> float:
    """A loss that vocabularies can be compared by: nats of all tokens / (log 2 * bytes of their text).

    Args:
        nats: The sum of -log p over the tokens of texts.
        size: Length of the texts in UTF-8, in bytes.

    Returns:
        Bits per byte.

    Raises:
        ValueError: There are no bytes.
    """
    check_count("size", size, 1)
    return nats / (math.log(2) * size)


def train(
    texts: Iterable[str], size: int, algorithm: str = "unigram", special: Sequence[str] = (END,)
) -> PreTrainedTokenizerFast:
    """A vocabulary of exactly `size` tokens, trained by `tokenizers`.

    All algorithms see the same pieces of text: words of GPT-2's rule, which keep the space before them, written as
    bytes. The 256 bytes are tokens under every algorithm, so that every text can be encoded and decoded to itself. No
    token crosses words; the space that starts a word is what an end-of-word symbol is elsewhere.

    'wordpiece' has no '##' here, which would have every byte twice. `tokenizers` trains it as it trains BPE, not by
    likelihood: the two have the same tokens and cut words differently, the longest token first or merge by merge.

    Args:
        texts: What to train on, read once.
        size: Number of tokens, the bytes and the special tokens included.
        algorithm: 'unigram', 'bpe' or 'wordpiece'.
        special: Tokens beside those of text; the first one ends texts, starts them and pads rows.

    Returns:
        A fast tokenizer of transformers. The same texts give the same one.

    Raises:
        ValueError: An unknown algorithm, no special token, no text, a size that has no room for the bytes, or one that
            the texts do not fill.
    """
    from transformers import PreTrainedTokenizerFast

    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm is {algorithm!r}: choose one of {', '.join(ALGORITHMS)}")
    if isinstance(special, str) or not special or len({*special}) < len(special):
        raise ValueError(f"special is {special!r}: pass a list of different tokens, of which the first ends texts")
    check_count("size", size, 256 + len(special) + (algorithm == "unigram"))  # its trainer cannot stop at bytes alone
    tokenizer, trainer = _engine(algorithm, size, special)
    tokenizer.train_from_iterator(_some(texts), trainer)
    found = tokenizer.get_vocab_size()
    if found != size:
        raise ValueError(
            f"size is {size}, but {algorithm} finds {found} tokens here: choose that or less, or add texts"
        )
    if algorithm == "unigram":
        tokenizer = _in_order(tokenizer)
    roles = dict.fromkeys(("eos_token", "bos_token", "pad_token"), special[0])
    more: dict[str, Any] = {"extra_special_tokens": [*special[1:]], "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles, **more)


def _engine(algorithm: str, size: int, special: Sequence[str]) -> tuple[Tokenizer, Any]:
    """A tokenizer without a vocabulary, and its trainer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    model: Any
    trainer: Any
    options: dict[str, Any] = {"vocab_size": size, "special_tokens": [*special], "show_progress": False}
    options["initial_alphabet"] = sorted(pre_tokenizers.ByteLevel.alphabet())
    if algorithm == "unigram":
        model, trainer = models.Unigram(), trainers.UnigramTrainer(**options)
    elif algorithm == "bpe":
        model, trainer = models.BPE(), trainers.BpeTrainer(**options)
    else:  # by default it takes words of over 100 bytes for unknown ones
        model = models.WordPiece(unk_token=special[0], max_input_chars_per_word=10**9)
        trainer = trainers.WordPieceTrainer(continuing_subword_prefix="", **options)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, trainer


def _some(texts: Iterable[str]) -> Iterator[str]:
    """The texts, of which one at least is not empty."""
    if isinstance(texts, str):
        raise ValueError(f"texts is {texts[:20]!r}, a single text: pass a list of texts")
    rest = iter(texts)
    first = next((text for text in rest if text), None)
    if first is None:
        raise ValueError("texts are empty: pass some that have text")
    return chain([first], rest)


def _in_order(tokenizer: Tokenizer) -> Tokenizer:
    """A unigram model with its tokens in the order of their scores, equal ones by spelling.

    The order of the trainer varies from run to run: it adds up in parallel, and walks through the bytes as a hash table
    has them. Special tokens, which have no part in the model, stay first.
    """
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.to_str())
    model, special = state["model"], len(state["added_tokens"])
    scores = {piece: round(score, 6) for piece, score in model["vocab"][special:]}
    least = min(scores.values())
    lost = {piece for piece, score in scores.items() if len(piece) == 1 and score <= least + SPREAD}
    scores |= dict.fromkeys(lost, least)
    ordered = sorted(scores.items(), key=lambda entry: (-entry[1], entry[0]))
    model["vocab"] = [*model["vocab"][:special], *map(list, ordered)]
    return Tokenizer.from_str(json.dumps(state))


def likelihood(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Likelihood:
    """How likely texts are under a unigram model: cut as the tokenizer does, and summed over all cuts.

    Pieces are drawn independently of each other, and a text ends without a symbol for it. The trainer's probabilities
    do not sum to 1 (its estimate takes some away, and bytes that it had lost come back without a count) and are divided
    by their sum, so that bits per byte are the length of a code.

    Args:
        tokenizer: One that `train` made with 'unigram'.
        texts: The texts; a special token in one is read as text.

    Returns:
        The log-likelihoods in nats, with the counts of tokens and bytes.

    Raises:
        ValueError: The tokenizer has another algorithm, or the texts are empty.
    """
    scores, words, size = _scores(tokenizer), Counter[str](), 0
    for text in _some(texts):
        words.update(_words(tokenizer, text))
        size += len(text.encode())
    mass = math.log(sum(map(math.exp, scores.values())))
    segmenter = Segmenter(scores)
    best, summed, tokens = 0.0, 0.0, 0
    for word, count in words.items():
        path = segmenter.shortest([word])
        best -= count * (path.cost + len(path.pieces) * mass)
        summed += count * segmenter.summed([word], mass)
        tokens += count * len(path.pieces)
    return Likelihood(best, summed, tokens, size)


def encode(tokenizer: PreTrainedTokenizerFast, text: str, most: int) -> list[int]:
    """The likeliest token ids of a text that are at most `most`: what fits a limit without cutting the text short.

    Args:
        tokenizer: One that `train` made with 'unigram'.
        text: The text; a special token is read as text. Time grows with `most` times its length: pass no book.
        most: The largest number of tokens.

    Returns:
        The ids, which decode to the text: those of the tokenizer itself if they are few enough.

    Raises:
        ValueError: The tokenizer has another algorithm, or no ids of the text are so few.
    """
    path = Segmenter(_scores(tokenizer)).shortest(_words(tokenizer, text), most)
    return tokenizer.convert_tokens_to_ids(list(path.pieces))


def _scores(tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Piece -> log-probability, without the special tokens."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kind, before = state["model"].get("type"), state["pre_tokenizer"] or {}
    if kind != "Unigram" or before.get("type") != "ByteLevel" or state["normalizer"]:
        raise ValueError(f"tokenizer is a {kind} model: pass one that train(..., algorithm='unigram') made")
    special = {token["content"] for token in state["added_tokens"]}
    return {piece: score for piece, score in state["model"]["vocab"] if piece not in special}


def _words(tokenizer: Any, text: str) -> list[str]:
    """The words of a text as its pieces spell them."""
    return [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
