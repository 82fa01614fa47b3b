"""'asterisk:FOLDER': recorded prompts of telephone exchanges with their transcripts, in up to five languages.

FOLDER holds Debian's packages asterisk-core-sounds-LANGUAGE (transcripts) and asterisk-core-sounds-LANGUAGE-wav, each
unpacked into it or into a folder of its own there; '/' finds installed ones. Nothing is downloaded, no sound is copied:

    apt-get download asterisk-core-sounds-en asterisk-core-sounds-en-wav
    for package in *.deb; do dpkg -x $package FOLDER; done

One person speaks each language; files are mono, 8 kHz, 16 bits. Languages are splits; rows stand in the order of the
transcript. What is written in square or angle brackets ('[ascending tones]') is not spoken and is cut, and so is a
remark in parentheses at the end; prompts without any text left, or without a file, are no rows. Of version 1.6.1 there
are 551 English and 509 French prompts; 508 keys are in both, parallel speech and text (`parallel`).

Source: the sounds of the Asterisk project, downloads.asterisk.org/pub/telephony/sounds; Debian's asterisk-core-sounds.
Columns: key (of the prompt, 'letters/at'), language, text, file (of its sound; `hf_xent.speech.read_wav` reads it).
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .corpus import FolderCorpus, Source, checked_text, select_split
from .files import expanded_path

LANGUAGES = ("en", "es", "fr", "it", "ru")
NOT_SPOKEN = re.compile(r"\[[^]]*\]|<[^>]*>|\([^)]*\)\s*$")
"""Sounds and signs in brackets, and a remark that ends a transcript."""


def prompts(folder: str | Path, language: str) -> list[dict[str, str]]:
    """The prompts of a language, with a text and a file each: the rows of its split.

    Args:
        folder: Where the packages are unpacked, or '/' for installed ones.
        language: One of `LANGUAGES`.

    Raises:
        ValueError: The transcript, or the sounds, of the language are not in the folder.
    """
    folder = expanded_path(folder)
    transcript = _transcript(folder, language)
    sounds = list(_found(folder, f"usr/share/asterisk/sounds/{language}_*"))
    if transcript is None or not sounds:
        suffix = "" if transcript is None else "-wav"
        what = "transcripts" if transcript is None else "sounds"
        raise ValueError(f"no {what} of the language {language!r} are in {folder}: {_recipe(language, suffix)}")
    rows = []
    for key, text in _texts(transcript):
        files = [file for root in sounds if (file := root / f"{key}.wav").is_file()]
        if files and text:
            rows.append({"key": key, "language": language, "text": text, "file": str(files[0])})
    if not rows:
        raise ValueError(f"no .wav file of {transcript} is in {sounds[0]}: {_recipe(language, '-wav')}")
    return rows


def parallel(folder: str | Path, source: str = "en", target: str = "fr") -> Any:
    """The prompts that two languages share, matched by key.

    Args:
        folder: As for `prompts`.
        source: A language.
        target: Another one.

    Returns:
        A dataset with the columns key, text_SOURCE, file_SOURCE, text_TARGET, file_TARGET, in the order of the source.

    Raises:
        ValueError: As `prompts` does; or both languages are the same.
    """
    from datasets import Dataset  # lazy: half a second

    if source == target:
        raise ValueError(f"source and target are both {source!r}: choose two languages")
    there = {row["key"]: row for row in prompts(folder, target)}
    rows = []
    for row in prompts(folder, source):
        if match := there.get(row["key"]):
            pair = ((source, row), (target, match))
            texts = {f"{name}_{language}": one[name] for language, one in pair for name in ("text", "file")}
            rows.append({"key": row["key"], **texts})
    return Dataset.from_list(rows)


def music(folder: str | Path) -> list[Path]:
    """The pieces of music of Debian's package asterisk-moh-opsound-wav: mono, 8 kHz, 16 bits, 18 minutes in all.

    Args:
        folder: As for `prompts`.

    Returns:
        Their files, sorted by name.

    Raises:
        ValueError: There are none.
    """
    folder = expanded_path(folder)
    files = sorted({file.name: file for file in _found(folder, "usr/share/asterisk/moh/*.wav")}.items())
    if not files:
        raise ValueError(
            f"no music is in {folder}: apt-get download asterisk-moh-opsound-wav, then"
            " dpkg -x asterisk-moh-opsound-wav*.deb FOLDER, and name that folder"
        )
    return [file for _, file in files]


def _transcript(folder: Path, language: str) -> Path | None:
    name = f"usr/share/doc/asterisk-core-sounds-{language}/core-sounds-{language}.txt"
    return next((file for ending in (".gz", "") for file in _found(folder, name + ending)), None)


def _found(folder: Path, pattern: str) -> Iterator[Path]:
    """What the packages have at a place, if they are unpacked into the folder or each into one of its folders."""
    for place in (pattern, f"*/{pattern}"):
        yield from sorted(folder.glob(place))


def _texts(transcript: Path) -> Iterator[tuple[str, str]]:
    """Keys, and what is spoken. Raises: ValueError for a line that is neither a comment nor `key: text`."""
    content = transcript.read_bytes()
    content = gzip.decompress(content) if transcript.suffix == ".gz" else content
    for line in content.decode("utf-8-sig").splitlines():
        if line.strip() and not line.startswith(";"):
            key, colon, text = line.partition(":")
            if not colon:
                raise ValueError(f"{transcript.name} has the line {line!r}, which is not 'key: text'")
            yield key.strip(), " ".join(NOT_SPOKEN.sub(" ", text).split())


def _recipe(language: str, suffix: str) -> str:
    package = f"asterisk-core-sounds-{language}{suffix}"
    return f"apt-get download {package}, then dpkg -x {package}_*.deb FOLDER, and name that folder"


class Asterisk(FolderCorpus):
    """One row per prompt; one split per language."""

    def open(self, source: Source, split: str | None) -> Any:
        """The languages whose transcripts are in the folder, or an exported copy."""
        if source.path is None:
            raise ValueError("no folder is named")
        from datasets import Dataset  # lazy: half a second

        languages = [language for language in LANGUAGES if _transcript(source.path, language)]
        if not languages and (source.path.is_file() or (source.path / "data").is_dir()):
            return super().open(source, split)
        if not languages:
            raise ValueError(f"no transcripts are there: {_recipe('en', '')}; likewise asterisk-core-sounds-en-wav")
        parts = {language: Dataset.from_list(prompts(source.path, language)) for language in languages}
        if source.streaming:
            parts = {language: rows.to_iterable_dataset() for language, rows in parts.items()}
        return select_split(parts, split)

    def features(self) -> Any:
        """Four columns of strings."""
        from datasets import Features, Value

        return Features({name: Value("string") for name in self.columns})


def _row(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "text": checked_text(row["text"])}


CORPUS = Asterisk(
    title="Asterisk prompts",
    family="text",
    license="cc-by-sa-3.0",
    caveat="One speaker a language, sentences of telephone menus: no sample of speech. A copy has the texts, and in the"
    " column file the places of the sounds where the copy was made; the sounds are not in it.",
    source="Debian's packages asterisk-core-sounds-LANGUAGE and asterisk-core-sounds-LANGUAGE-wav (apt-get download,"
    " dpkg -x), as 'asterisk:FOLDER'",
    row=_row,
    columns=("key", "language", "text", "file"),
    splits=dict.fromkeys(LANGUAGES),
    tasks=("automatic-speech-recognition", "translation"),
    configured=True,
)
