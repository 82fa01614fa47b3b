"""What the tokens of a tokenizer stand for, and which tokens of two vocabularies stand for the same.

ordinary   tokens of text. A byte-level vocabulary spells bytes in characters of its own, sentencepiece writes a space
           as U+2581 and single bytes as '<0x0A>'; both are read back to the bytes that the token stands for
special    tokens that stand for no text: the end of a sequence, the turns of a chat. They are known by what is written
           in the vocabulary ('<|im_end|>') and by their role ('eos')

Two tokens are shared if they are ordinary and stand for the same bytes, or are special and written alike, or are
special and have the same role. That tokens stand for the same does not make the text around them split alike.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROLES = ("eos", "bos", "pad", "unk")
"""What special tokens are matched by if they are written differently; of two roles of a token the first counts."""
SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _spelled_bytes() -> dict[str, int]:
    """Character -> byte of byte-level vocabularies: printable ones spell themselves, the others follow at 256."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


SPELLED = _spelled_bytes()


@dataclass(frozen=True)
class Vocabulary:
    """What the tokens of a tokenizer stand for; `vocabulary_of` reads it.

    Args:
        ordinary: Token id -> the bytes that it stands for.
        special: Token id -> how a token that stands for no text is written.
        roles: Role -> token id, for those of `ROLES` that the tokenizer has.
        fallback: Ids of single bytes beside which the vocabulary may have the same byte as text.
    """

    ordinary: dict[int, bytes]
    special: dict[int, str]
    roles: dict[str, int]
    fallback: frozenset[int] = frozenset()

    def by_bytes(self) -> dict[bytes, int]:
        """Bytes -> the token that stands for them: a piece of text before a single byte, then the lowest id."""
        order = sorted(self.ordinary, key=lambda token: (token not in self.fallback, -token))
        return {self.ordinary[token]: token for token in order}


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """What the tokens of a tokenizer stand for.

    Args:
        tokenizer: A transformers tokenizer: byte-level, or sentencepiece with or without byte fallback.

    Returns:
        The vocabulary.

    Raises:
        ValueError: Its tokens do not spell the text: those of WordPiece, for instance, have no spaces.
    """
    added = tokenizer.added_tokens_decoder
    special = {token: entry.content for token, entry in added.items() if entry.special}
    special |= {token: tokenizer.convert_ids_to_tokens(token) for token in tokenizer.all_special_ids}
    pieces = {token: piece for piece, token in tokenizer.get_vocab().items() if token not in added | special}
    backend = getattr(tokenizer, "backend_tokenizer", None)  # those written in Python have none
    model = "" if backend is None else type(backend.model).__name__
    fallback = frozenset[int]()
    if any(SPACE in piece for piece in pieces.values()):
        fallback = frozenset(token for token, piece in pieces.items() if _BYTE.fullmatch(piece))
        ordinary = {token: _sentencepiece(piece) for token, piece in pieces.items()}
    elif model not in ("WordPiece", "WordLevel") and all(SPELLED.keys() >= {*piece} for piece in pieces.values()):
        ordinary = {token: bytes(SPELLED[letter] for letter in piece) for token, piece in pieces.items()}
    else:
        raise ValueError(
            f"tokenizer is a {type(tokenizer).__name__} whose tokens do not spell the text: pass one that is byte-level"
            " or sentencepiece"
        )
    ordinary |= {token: entry.content.encode() for token, entry in added.items() if token not in special}
    found = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    roles = dict(zip(ROLES, found, strict=True))
    if roles["unk"] in (roles["eos"], roles["bos"], roles["pad"]):  # named, but never made: GPT-2's
        del roles["unk"]
    return Vocabulary(ordinary, special, {role: x for role, x in roles.items() if x is not None}, fallback)


def _sentencepiece(piece: str) -> bytes:
    byte = _BYTE.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(SPACE, " ").encode()


def shared_tokens(student: Any, teacher: Any) -> tuple[Tensor, Tensor]:
    """The tokens that stand for the same in two vocabularies: the same bytes, or special tokens alike.

    Args:
        student: A transformers tokenizer.
        teacher: Another one.

    Returns:
        The student's ids [S], ascending, and the teacher's [S], int64; no id appears twice. Of one vocabulary, whatever
        heads are over it, all ids.

    Raises:
        ValueError: The tokens of one of them do not spell the text (`vocabulary_of`), or none is shared.
    """
    if same_vocabulary(student, teacher):
        every = torch.tensor(sorted({*student.get_vocab().values()} & {*teacher.get_vocab().values()}))
        return every, every
    ours, theirs = vocabulary_of(student), vocabulary_of(teacher)
    ours_by_bytes, theirs_by_bytes = ours.by_bytes(), theirs.by_bytes()
    pairs = {token: theirs_by_bytes[text] for text, token in ours_by_bytes.items() if text in theirs_by_bytes}
    pairs |= shared_specials(ours, theirs)
    if not pairs:
        raise ValueError("the tokenizers of student and teacher share no token: choose a teacher of the same language")
    ids = sorted(pairs)
    return torch.tensor(ids), torch.tensor([pairs[token] for token in ids])


def shared_specials(ours: Vocabulary, theirs: Vocabulary) -> dict[int, int]:
    """Our special token -> theirs: written alike, or else of the same role."""
    written = {text: token for token, text in theirs.special.items()}
    pairs = {token: written[text] for token, text in ours.special.items() if text in written}
    for role in ROLES:
        mine, other = ours.roles.get(role), theirs.roles.get(role)
        if mine in ours.special and other in theirs.special and mine not in pairs and other not in pairs.values():
            pairs[mine] = other
    return pairs


def same_vocabulary(student: Any, teacher: Any) -> bool:
    """Whether two tokenizers have the same tokens under the same ids, but for what one of them has beside those.

    Heads over one vocabulary may still differ: they are padded to different sizes.
    """
    ours, theirs = student.get_vocab().items(), teacher.get_vocab().items()
    return student is teacher or ours <= theirs or theirs <= ours
