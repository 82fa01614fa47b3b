"""A student's sequence of tokens in the tokens of a teacher: the same text, as far as it can be shown to be the same.

The student's tokens are read as bytes, not decoded, so that sampled sequences, which no tokenizer would have made, have
exact offsets too. The teacher's tokenizer gets the text, and its tokens are read back: where they do not stand for the
student's bytes (a normalizer, an unknown token), there is no translation.

special tokens   a student's is the teacher's of the same spelling, else of the same role (`eos`, ...); without one, the
                 markers of chats are written out in letters, and tokens that have a role are left out
beginning        the student's `bos` is left out, and the teacher gets its own if its tokenizer puts one there; a marker
                 of chats that is called `bos` is treated like the others
spaces           a space that a sentencepiece tokenizer puts before text is not one of the text
end              bytes of a character that a sequence cuts off are left out
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .vocabularies import Vocabulary, shared_specials, vocabulary_of

Part = bytes | int
"""A stretch of text, or a special token of the teacher's."""


@dataclass(frozen=True)
class Translated:
    """A sequence in both vocabularies. Lengths are bytes; a special token counts as one, one that is left out as none.

    Args:
        student_lengths: What each of the student's tokens covers.
        teacher_ids: The teacher's tokens.
        teacher_lengths: What each of them covers.
    """

    student_lengths: list[int]
    teacher_ids: list[int]
    teacher_lengths: list[int]


class Translation:
    """From the tokens of one tokenizer to those of another.

    Args:
        student: A transformers tokenizer.
        teacher: Another one.

    Raises:
        ValueError: The tokens of one of them do not spell the text (`vocabulary_of`).
    """

    def __init__(self, student: Any, teacher: Any):
        self.tokenizer = teacher
        self.ours, self.theirs = vocabulary_of(student), vocabulary_of(teacher)
        self.specials = shared_specials(self.ours, self.theirs)
        self.prefixes = _prefixes(student, self.ours)
        bos = self.theirs.roles.get("bos")
        self.start = [bos] if bos is not None and teacher("a")["input_ids"][:1] == [bos] else []

    def __call__(self, sequences: Sequence[Sequence[int]]) -> list[Translated | None]:
        """The translation of each sequence of ids, None where there is no exact one."""
        found: list[Translated | None] = []
        read = [_joined(self._student_pieces(ids), lambda n: self.prefixes[n > 0]) for ids in sequences]
        written = [None if reading is None else self._written(reading[0]) for reading in read]
        answers = (
            self.tokenizer([text or "" for text in written], add_special_tokens=False)["input_ids"] if read else []
        )
        for reading, text, ids in zip(read, written, answers, strict=True):
            lengths = None if reading is None or text is None else self._lengths(ids, reading[0])
            if reading is None or lengths is None:
                found.append(None)
            else:
                found.append(Translated(reading[1], [*self.start, *ids], [0] * len(self.start) + lengths))
        return found

    def _student_pieces(self, ids: Sequence[int]) -> Iterator[Part | None]:
        """What each token is to the teacher; None if that is not known."""
        ours = self.ours
        for k, token in enumerate(ids):
            if token in ours.ordinary:
                yield ours.ordinary[token]
            elif token not in ours.special or token == ours.roles.get("unk"):
                yield None
            elif k == 0 and token == ours.roles.get("bos") and not self._is_marker(token):
                yield b""
            elif token in self.specials:
                yield self.specials[token]
            else:
                yield b"" if token in ours.roles.values() else ours.special[token].encode()

    def _is_marker(self, bos: int) -> bool:
        """Whether a `bos` is more than that: the teacher has it, too, but not as what its tokenizer begins with."""
        other = self.specials.get(bos)
        return other is not None and [other] != self.start and self.theirs.special[other] == self.ours.special[bos]

    def _written(self, parts: list[Part]) -> str | None:
        """The text for the teacher's tokenizer; None if bytes inside of it are no characters."""
        try:
            texts = [part.decode() if isinstance(part, bytes) else self.theirs.special[part] for part in parts[:-1]]
            return "".join([*texts, _without_cut(parts[-1]).decode()])
        except UnicodeDecodeError:
            return None

    def _lengths(self, ids: Sequence[int], parts: list[Part]) -> list[int] | None:
        """What each of the teacher's tokens covers; None if they do not stand for the parts."""
        theirs = self.theirs
        pieces = [theirs.ordinary.get(token, token if token in theirs.special else None) for token in ids]
        found = _joined(pieces, lambda n: False)
        if found is None or len(found[0]) != len(parts):
            return None
        expected = [*parts[:-1], _without_cut(parts[-1])]
        stretches = zip(found[0][::2], expected[::2], strict=True)
        spaces = {n for n, (x, wanted) in enumerate(stretches) if isinstance(wanted, bytes) and x == b" " + wanted}
        found = _joined(pieces, lambda n: n in spaces)
        return found[1] if found is not None and found[0] == expected else None


def _joined(pieces: Iterable[Part | None], strips: Callable[[int], bool]) -> tuple[list[Part], list[int]] | None:
    """The parts that pieces make, text and special tokens in turn, and what each piece covers; None if one is unknown.

    `strips(n)` tells whether a space before stretch n of text is not one of the text.
    """
    parts, lengths, text, at_start = list[Part](), list[int](), bytearray(), True
    for piece in pieces:
        if piece is None:
            return None
        if isinstance(piece, int):
            parts += [bytes(text), piece]
            text, at_start = bytearray(), True
            lengths.append(1)
            continue
        if piece and at_start:
            piece = piece[1:] if piece[:1] == b" " and strips(len(parts) // 2) else piece
            at_start = False
        text += piece
        lengths.append(len(piece))
    return [*parts, bytes(text)], lengths


def _without_cut(text: Part) -> bytes:
    """Bytes without a character at their end that is not complete."""
    assert isinstance(text, bytes)  # text and special tokens take turns, and text is last
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return text[: error.start] if error.reason == "unexpected end of data" else text
    return text


def _prefixes(tokenizer: Any, vocabulary: Vocabulary) -> tuple[bool, bool]:
    """Whether a tokenizer puts a space before the first text of a sequence, and before text after a special token."""
    special = next(iter(vocabulary.special.values()), "")
    first, later = tokenizer(["a", special + "a"], add_special_tokens=False)["input_ids"]
    starts = (vocabulary.ordinary.get(ids[k], b"") if len(ids) > k else b"" for ids, k in ((first, 0), (later, 1)))
    one, two = (start[:1] == b" " for start in starts)
    return one, two
