"""Names that a package offers, whose modules are imported when a name is first asked for: some take seconds."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def offered(package: str, homes: Mapping[str, str], name: str) -> Any:
    """What a package offers under a name, for its `__getattr__`.

    Args:
        package: The package's own name, `__name__`.
        homes: Public name -> the module that has it: 'hf_xent.models.embeddings', or '.cache' beside the package.
        name: The name that is asked for.

    Raises:
        AttributeError: The package offers no such name.
    """
    if name in homes:
        return getattr(import_module(homes[name], package), name)
    raise AttributeError(f"module {package!r} has no attribute {name!r}")
