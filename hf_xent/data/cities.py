"""'cities': some 250 cities with their country and continent, as facts to ask a language model for.

They come from the time zone database of the package `tzdata`, without a download. A zone is named after its area and
best known city, and its table gives the country: `CO +0436-07405 America/Bogota`. Areas outside of CONTINENTS, names of
three parts, countries with a note in brackets, and cities whose name has that of the country (or the reverse) are left
out.

Source: IANA time zone database, `zone.tab` and `iso3166.tab`; public domain.
Columns: city, country, continent, label (the continent's index in CONTINENTS), question, answer, text.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from .corpus import InstalledCorpus

CONTINENTS = ("Africa", "America", "Asia", "Europe")


def make() -> Any:
    """One row for each city, in the order of country codes."""
    from datasets import Dataset  # lazy: half a second

    countries = dict(_table("iso3166.tab"))
    rows = []
    for code, _, zone, *_ in _table("zone.tab"):
        area, *names = zone.split("/")
        city, country = names[-1].replace("_", " "), countries[code]
        name_each_other = city in country or country in city
        if area in CONTINENTS and len(names) == 1 and "(" not in country and not name_each_other:
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
