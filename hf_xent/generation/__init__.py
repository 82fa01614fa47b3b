"""Floor 3: what is sampled from a language model, how it is decoded, and who judges it."""

from typing import Any

from ..system import renamed


def __getattr__(name: str) -> Any:
    return renamed.attribute(__name__, name)
