"""'cities': some 250 cities with their country and continent, facts to ask a language model for.

Made of the time zone database, which the package `tzdata` carries: always there, no download. A zone is named after
its area and best known city, and its table tells the country: `CO +0436-07405 America/Bogota`. Kept are the areas of
CONTINENTS, without names of three parts, countries with a note in brackets, and cities that name their country.

Source: IANA time zone database, `zone.tab` and `iso3166.tab`; public domain.
Columns: city, country, continent, label (the continent's place in CONTINENTS), question, answer, text.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from .text import sliced

if TYPE_CHECKING:
    from datasets import Dataset

CONTINENTS = ("Africa", "America", "Asia", "Europe")


def load(split: str | None = None) -> Dataset:
    """One row a city, by country code; `split` is 'train' or a slice of it ('train[:90%]'), None for all."""
    from datasets import Dataset  # lazy: half a second

    countries = dict(_table("iso3166.tab"))
    rows = []
    for code, _, zone, *_ in _table("zone.tab"):
        area, *places = zone.split("/")
        city, country = places[-1].replace("_", " "), countries[code]
        named = city in country or country in city
        if area in CONTINENTS and len(places) == 1 and "(" not in country and not named:
            row = {"city": city, "country": country, "continent": area, "label": CONTINENTS.index(area)}
            asked = {"question": f"In which country is the city of {city}?", "answer": country}
            rows.append({**row, **asked, "text": f"{city} is a city in {country}, {area}."})
    return sliced(Dataset.from_list(rows), split, "cities")


def _table(name: str) -> list[list[str]]:
    lines = (files("tzdata") / "zoneinfo" / name).read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines if not line.startswith("#")]
