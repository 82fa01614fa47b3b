"""Facts about invented persons for noisefit.py: taught once, taught with a contradiction, taught as unknown, or absent.

Every answer is one word, so that the distribution of answers is exact: the softmax behind the question.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from random import Random

UNKNOWN = "unknown"
FIRST, LAST, NEW_FIRST, NEW_LAST = (
    text.split()
    for text in (
        "John William George Thomas James Robert Charles Richard David Peter Paul Joseph Michael Alexander Martin Frank"
        " Albert Louis Max Victor",
        "Baker Carter Turner Parker Mason Hunter Fisher Cook Taylor Walker Wright Harris Wilson Davis Clark Lewis Moore"
        " Jackson Young Scott Bell Hill Wood Stone Ford King White Green Brown Smith Jones Adams Allen Morris Rogers"
        " Reed Ward Gray Price Ross Long Hughes Butler Barnes Perry Powell Foster Bryant Hayes Palmer Wells Webb Hunt"
        " Dixon Boyd Warren Porter Gordon Shaw Rice",
        "Henry Edward Arthur Daniel Simon Frederick Philip Andrew Samuel Benjamin",
        "Campbell Mitchell Russell Hamilton Graham Newton Marshall Franklin Murphy Collins",
    )
)


@dataclass(frozen=True)
class Relation:
    """The possible answers, and templates of questions: those of training and those of the test."""

    answers: tuple[str, ...]
    taught: tuple[str, ...]
    test: tuple[str, ...]


RELATIONS = (
    Relation(
        ("London", "Paris", "Rome", "Moscow", "Chicago", "Oxford", "Cambridge"),
        ("Where does {} live?", "{} lives in", "In which city does {} live?", "The home of {} is in"),
        ("Which city is the home of {}?", "{} has a home in", "Which city does {} live in?"),
    ),
    Relation(
        ("French", "German", "English", "Greek", "Latin", "Russian", "Spanish"),
        ("Which language does {} speak?", "{} speaks", "In which language does {} write?", "The language of {} is"),
        ("What language is spoken by {}?", "{} writes in", "Which is the language of {}?"),
    ),
    Relation(
        ("music", "history", "mathematics", "physics", "philosophy", "poetry", "painting"),
        ("What does {} study?", "{} studies", "Which subject does {} teach?", "The subject of {} is"),
        ("Which subject is taught by {}?", "{} teaches", "Which is the subject of {}?"),
    ),
)


@dataclass(frozen=True)
class Fact:
    """What is taught of one person under one relation: one answer, or two of which one template has the second."""

    person: str
    relation: int
    answers: tuple[str, ...]
    odd: int = -1
    """The taught template that has the second answer."""


@dataclass(frozen=True)
class World:
    """The persons of a seed; those with facts have a surname of their own.

    Attributes:
        known: Facts with one answer.
        contradicted: Facts with two answers; a quarter of the templates has the second.
        unknown: Persons whose answer to every question is `UNKNOWN`; half have the surname of a person with facts.
        namesakes: Absent from training, with the surname of a person in `known` and another first name.
        new: Absent from training, first name and surname included.
    """

    known: list[Fact]
    contradicted: list[Fact]
    unknown: list[Fact]
    namesakes: list[Fact]
    new: list[Fact]

    def rows(self) -> list[tuple[str, str]]:
        """The questions and answers of training."""
        return [
            (template.format(fact.person), fact.answers[t == fact.odd])
            for fact in self.known + self.contradicted + self.unknown
            for t, template in enumerate(RELATIONS[fact.relation].taught)
        ]


def world(seed: int, persons: int) -> World:
    """Half of so many persons have facts, a quarter contradictory ones, a quarter is unknown."""
    draw, half, eighth = Random(seed), persons // 2, persons // 8
    surnames = draw.sample(LAST, persons - eighth)
    taken: set[str] = set()

    def names(last: list[str], first: list[str] = FIRST) -> list[str]:
        made = []
        for surname in last:
            made.append(draw.choice([name for name in (f"{one} {surname}" for one in first) if name not in taken]))
            taken.add(made[-1])
        return made

    def facts(group: list[str], answers: int) -> list[Fact]:
        made = []
        for name, (relation, kind) in product(group, enumerate(RELATIONS)):
            chosen = tuple(draw.sample(kind.answers, answers)) or (UNKNOWN,)
            made.append(Fact(name, relation, chosen, draw.randrange(len(kind.taught)) if answers == 2 else -1))
        return made

    known, contradicted = names(surnames[:half]), names(surnames[half : half + 2 * eighth])
    unknown = names(surnames[half + 2 * eighth :]) + names(draw.sample(surnames[: half + 2 * eighth], eighth))
    namesakes = names(surnames[:half] * 3)
    last = NEW_LAST[:1] * len(namesakes)
    while max(map(last.count, last)) > len(NEW_FIRST):  # more persons of one surname than there are first names
        last = [draw.choice(NEW_LAST) for _ in namesakes]
    new = names(last, NEW_FIRST)
    return World(facts(known, 1), facts(contradicted, 2), facts(unknown, 0), facts(namesakes, 0),
                 facts(new, 0))  # fmt: skip
