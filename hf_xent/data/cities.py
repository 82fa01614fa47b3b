"""'cities': some 250 cities with their country and continent, facts to ask a language model for.

Made of the time zone database, which the package `tzdata` carries: always there, no download. A zone is named after
its area and best known city, and its table tells the country: `CO +0436-07405 America/Bogota`. Kept are the areas of
CONTINENTS, without names of three parts, countries with a note in brackets, and cities that name their country.

Source: IANA time zone database, `zone.tab` and `iso3166.tab`; public domain.
Columns: city, country, continent, label (the continent's place in CONTINENTS), question, answer, text.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from .corpus import InstalledCorpus

CONTINENTS = ("Africa", "America", "Asia", "Europe")


def make() -> Any:
    """One row a city, by country code."""
    from datasets import Dataset  # lazy: half a second

    countries = dict(_table("iso3166.tab"))
    rows = []
    for code, _, zone, *_ in _table("zone.tab"):
        area, *names = zone.split("/")
        city, country = names[-1].replace("_", " "), countries[code]
        alike = city in country or country in city
        if area in CONTINENTS and len(names) == 1 and "(" not in country and not alike:
            row = {"city": city, "country": country, "continent": area, "label": CONTINENTS.index(area)}
            question = {"question": f"In which country is the city of {city}?", "answer": country}
            rows.append({**row, **question, "text": f"{city} is a city in {country}, {area}."})
    return Dataset.from_list(rows)


def _table(name: str) -> list[list[str]]:
    lines = (files("tzdata") / "zoneinfo" / name).read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines if not line.startswith("#")]


CORPUS = InstalledCorpus(
    title="cities",
    family="text",
    license="other",
    caveat="In the public domain; the names of zones are those of one version of the database.",
    source="the IANA time zone database in the package tzdata",
    row=dict,
    columns=("city", "country", "continent", "label", "question", "answer", "text"),
    splits={"train": None},
    tasks=("text-classification", "question-answering"),
    make=make,
    numbers=("label",),
)
