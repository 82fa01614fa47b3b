"""Tags of words from a few marked sentences, and from the sentences to tag themselves: RePRI with words for pixels.

    tagger = TransductiveTagger(encoder, tokenizer)
    p = tagger.tag(sentences, marks, others)            # a few sentences, 0 or 1 for each of their words, many others
    p[0]                                                # the probability that each word of others[0] has the tag

Sentences are lists of words. A word's feature is the mean of the last hidden states of its tokens, or that of the first
one, under a frozen encoder. All words of the sentences to tag are one query: the share of words that have the tag, and
how certain the tagger is, are of all of them together, so pass as many as there are.

Several tags are several tasks of two classes each; words may have more than one of them, or none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.contexts import eval_mode
from ..ops.statistics import widened
from ..options.ranges import check_count
from .repri import RePRI

POOLINGS = ("mean", "first")
Marks = Sequence[Sequence[int]]
"""For each sentence, a number for each word: 1, 0 or -100."""


class TransductiveTagger:
    """A tagger of words under a frozen encoder; the module's docstring has an example.

    Args:
        encoder: An encoder of texts of transformers, or a model with one as its `base_model`.
        tokenizer: Its fast tokenizer, which knows the words of tokens.
        repri: The inference; `RePRI(kl=0, entropy=0)` learns from marked sentences alone, `RePRI(kl=0)` adds the
            entropy, `RePRI(steps=0)` compares with a prototype.
        pooling: Whether a word is the 'mean' of its tokens or the 'first' of them.
        max_length: Tokens after which a sentence is cut; the tokenizer's own limit if it is left out.
        batch_size: Sentences in a forward pass.

    Raises:
        ValueError: A tokenizer without words of tokens, another pooling, or a number below 1.
    """

    def __init__(
        self,
        encoder: Any,
        tokenizer: Any,
        repri: RePRI | None = None,
        *,
        pooling: str = "mean",
        max_length: int | None = None,
        batch_size: int = 32,
    ):
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"tokenizer is a {type(tokenizer).__name__}, which does not know words: pass a fast one")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is {pooling!r}: choose from {', '.join(POOLINGS)}")
        check_count("batch_size", batch_size, 1)
        if max_length is not None:
            check_count("max_length", max_length, 1)
        self.encoder, self.tokenizer, self.repri = encoder, tokenizer, repri or RePRI()
        self.pooling, self.max_length, self.batch_size = pooling, max_length, batch_size

    def tag(
        self,
        support: Sequence[Sequence[str]],
        marks: Marks | Mapping[str, Marks],
        query: Sequence[Sequence[str]],
        *,
        prior: float | Mapping[str, float] | None = None,
    ) -> Any:
        """The probability of a tag for each word.

        Args:
            support: Marked sentences, each a list of words.
            marks: For each of them, 1 for words with the tag and 0 for the others, or -100 where it is not known; or
                a mapping from tags to such lists.
            query: The sentences to tag.
            prior: The share of words of the query with the tag, where it is known; of several tags, one for each.

        Returns:
            For each sentence of the query, probabilities [number of words], float32, on the CPU; of several tags, a
            dictionary of such lists. A word that was cut off, or has no token, is nan; it is left out of a support.

        Raises:
            ValueError: No sentence, marks that do not fit the words, priors that do not fit the tags, or a tag without
                a marked word (that was not cut off).
        """
        tags: Mapping[str, Marks] = marks if isinstance(marks, Mapping) else {"": marks}
        labels = [_labels(support, rows, name) for name, rows in tags.items()]
        if not labels or not query:
            raise ValueError(f"marks have {len(labels)} tags and query has {len(query)} sentences: give one or more")
        if isinstance(prior, Mapping) and prior.keys() != tags.keys():
            raise ValueError(f"prior is of {sorted(prior)}, but the tags are {sorted(tags)}: give one for each")
        shares = torch.tensor([prior[name] for name in tags]) if isinstance(prior, Mapping) else prior
        known, asked = (self.features(sentences) for sentences in (support, query))
        rows, words = torch.cat(known), torch.cat(asked)
        read, seen = (~part.isnan().any(-1) for part in (rows, words))
        marked = torch.stack(labels).to(rows.device)[:, read]
        if len(bare := (~(marked == 1).any(1)).nonzero().flatten()):
            name = list(tags)[int(bare[0])]
            raise ValueError(f"marks{f' of {name!r}' if name else ''} have no word that is read: mark one with 1")
        if not seen.any():
            raise ValueError("query has no word with a token: give sentences of words")
        count = len(labels)
        p = torch.full((count, len(words)), torch.nan)
        p[:, seen.cpu()] = self.repri.fit_predict(
            rows[read].expand(count, -1, -1), marked, words[seen].expand(count, -1, -1), prior=shares,
            shots=len(support),
        ).float().cpu()  # fmt: skip
        lists = [list(found.split([len(part) for part in asked])) for found in p]
        return dict(zip(tags, lists, strict=True)) if isinstance(marks, Mapping) else lists[0]

    def features(self, sentences: Sequence[Sequence[str]]) -> list[Tensor]:
        """The features of words, as `word_features` has them."""
        options: Any = {"pooling": self.pooling, "max_length": self.max_length, "batch_size": self.batch_size}
        return word_features(self.encoder, self.tokenizer, sentences, **options)


@torch.no_grad()
def word_features(
    encoder: Any,
    tokenizer: Any,
    sentences: Sequence[Sequence[str]],
    *,
    pooling: str = "mean",
    max_length: int | None = None,
    batch_size: int = 32,
) -> list[Tensor]:
    """The features of words: the mean, or the first, of the last hidden states of their tokens.

    Args:
        encoder: An encoder of texts, or a model with one as its `base_model`.
        tokenizer: Its fast tokenizer.
        sentences: Lists of words.
        pooling: 'mean' or 'first'.
        max_length: Tokens after which a sentence is cut, the last word too if some of its tokens are left; the
            tokenizer's own limit if it is left out.
        batch_size: Sentences in a forward pass; those of similar lengths are read together.

    Returns:
        For each sentence [number of words, D], float32 or wider; nan for a word that was cut, or has no token.

    Raises:
        ValueError: Hidden states that are not finite.
    """
    inner = encoder.get_base_model() if hasattr(encoder, "get_base_model") else encoder
    inner = getattr(inner, "base_model", inner)
    device = next(inner.parameters()).device
    found: list[Any] = [None] * len(sentences)
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    with eval_mode(inner):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            words = [list(sentences[i]) for i in rows]
            batch = tokenizer(
                words, is_split_into_words=True, padding=True, truncation=True, max_length=max_length,
                return_tensors="pt", return_offsets_mapping=False,
            )  # fmt: skip
            inputs = {name: value.to(device) for name, value in batch.items() if name != "token_type_ids"}
            states = widened(inner(**inputs).last_hidden_state)
            whole = tokenizer(words, is_split_into_words=True, verbose=False)
            for place, row in enumerate(rows):
                ids = batch.word_ids(place)
                found[row] = _pooled(states[place], ids, whole.word_ids(place), len(words[place]), pooling)
    return found


def _pooled(states: Tensor, ids: list[int | None], whole: list[int | None], count: int, pooling: str) -> Tensor:
    """One feature a word [count, D] from those of tokens [T, D]; `whole` are the words of the tokens before the cut."""
    device, pairs = states.device, [(place, word) for place, word in enumerate(ids) if word is not None]
    places, words = torch.tensor(pairs, dtype=torch.long, device=device).reshape(-1, 2).unbind(1)
    before = torch.tensor([word for word in whole if word is not None], dtype=torch.long, device=device)
    if not states[places].isfinite().all():  # else these words would look as if they had been cut
        raise ValueError("encoder gives hidden states that are not finite: load it in bfloat16 or float32")
    sizes = torch.bincount(words, minlength=count)
    read = (sizes > 0) & (sizes == torch.bincount(before, minlength=count))
    if pooling == "first":
        new = words.diff(prepend=words.new_tensor([-1])) != 0
        places, words, sizes = places[new], words[new], sizes.clamp(max=1)
    sums = states.new_zeros(count, states.shape[-1]).index_add(0, words, states[places])
    return torch.where(read[:, None], sums / sizes[:, None].clamp(min=1), torch.nan)


def _labels(sentences: Sequence[Sequence[str]], marks: Marks, name: str) -> Tensor:
    """The marks of all words [N]."""
    owner = f"marks of {name!r}" if name else "marks"
    lengths = [[len(row) for row in rows] for rows in (sentences, marks)]
    if lengths[0] != lengths[1] or not sentences:
        raise ValueError(f"{owner} have the lengths {lengths[1]} and the sentences {lengths[0]}: mark every word")
    return torch.tensor([mark for row in marks for mark in row])
