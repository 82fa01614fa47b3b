"""The formats of F2C: those that are packaged for 'cities', and those of a user, from a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PEOPLE = ("African", "American", "Asian", "European")
CONTINENTS = ("Africa", "America", "Asia", "Europe")
OF_CITIES = (
    ("{city} is in {country}. Its people call themselves", tuple(f"{name}s" for name in PEOPLE)),
    ("{city}, a city in {country}, has the flavors of", tuple(f"{name} cooking" for name in PEOPLE)),
    ("The {country} city of {city} is one of the largest cities in", CONTINENTS),
    ("Which part of the world is {country} in?", CONTINENTS),
    ("{country} is a country in", CONTINENTS),
)
"""Template and answers, in the order of the labels of 'cities'."""
FORM = 'a list, each with \'template: "{text} Is it about sports?"\' and \'answers: ["Yes", "No"]\''


def read_formats(given: Any) -> Any:
    """The formats, as `hf_xent.data.PromptFormats`.

    Args:
        given: A list of mappings with 'template' and 'answers', or the path of a YAML file with one; None for those of
            'cities'.

    Raises:
        ValueError: The file cannot be read, or does not hold such a list.
    """
    from ..data import Format, PromptFormats

    if given is None:
        return PromptFormats(*(Format(*pair) for pair in OF_CITIES))
    rows = _read(Path(given)) if isinstance(given, str) else given
    try:
        pairs = [(row["template"], row["answers"]) for row in rows]
    except (TypeError, KeyError) as error:
        raise ValueError(f"formats are {given!r}: give {FORM}") from error
    for template, answers in pairs:
        texts = isinstance(answers, list) and all(isinstance(answer, str) for answer in answers)
        if not isinstance(template, str) or not texts:
            raise ValueError(
                f"formats have the template {template!r} with the answers {answers!r}: write texts, in quotation marks"
                " where YAML reads something else (Yes and No)"
            )
    return PromptFormats(*(Format(template, tuple(answers)) for template, answers in pairs))


def _read(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"formats is {path}, which is not a readable YAML file: {error}") from error
