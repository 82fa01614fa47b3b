"""Floor 3: sampling from language models, decoding methods, and judges of responses."""

from typing import Any

from ..system import renamed


def __getattr__(name: str) -> Any:
    return renamed.attribute(__name__, name)
