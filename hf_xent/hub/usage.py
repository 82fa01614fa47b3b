"""How a checkpoint is loaded, as code on its card; a push writes the name of the repository into that code.

Until then the code loads from '.', the card's own folder: the name of a folder would be some repository of the Hub.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.utils import validate_repo_id

HERE = "."
"""The place of what has not been published."""
AUTO = {
    "CausalLM": "text-generation",
    "Seq2SeqLM": "text2text-generation",
    "ImageTextToText": "image-text-to-text",
    "SpeechSeq2Seq": "automatic-speech-recognition",
    "MaskedLM": "fill-mask",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
}
"""Classes of transformers that load a model, AutoModelFor..., and the Hub's name for what such a model does."""
BLOCK = re.compile(r"<!-- loads (?P<place>\S+) -->\s*```python\n(?P<code>.*?)```", re.DOTALL)
"""A block of code whose place is filled in; the comment is not shown."""


@dataclass(frozen=True)
class Usage:
    """How a checkpoint is loaded.

    Args:
        code: Python, with PLACE where the folder or the repository goes.
        library: The library that the Hub offers to load it with.
        note: Text before the code.
        task: The Hub's name for what the model does; None where it has none.
    """

    code: str
    library: str = "transformers"
    note: str = ""
    task: str | None = None

    def section(self, place: str = HERE) -> str:
        """The section 'Use' of a card, whose code loads from `place`."""
        note = f"{self.note}\n\n" if self.note else ""
        return f"## Use\n\n{note}<!-- loads {place} -->\n```python\n{self.code.replace('PLACE', place)}\n```\n"


def usage_of(model: Any) -> Usage | None:
    """How a model of transformers or peft is loaded.

    A model's attribute `hub_usage`, a function of the model that returns a `Usage`, decides if it is there: not every
    model is what its class would load. Else the Auto class of the model is used, or the class itself.

    Args:
        model: The model, unwrapped.

    Returns:
        The code and its library, or None for a model of another library.
    """
    if describe := getattr(model, "hub_usage", None):
        usage: Usage = describe(model)
        return usage
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(base, "config"):
        return None
    names = [kind.__name__ for kind in type(base).__mro__]  # a sharded model's own class is made on the spot
    auto = _auto_of(base, names)
    if getattr(model, "peft_config", None):  # what makes a model an adapter of peft's
        import peft

        kind = f"AutoPeftModelFor{auto}"
        return _loads("peft", kind, AUTO[auto]) if auto and hasattr(peft, kind) else None
    for kind, path in (getattr(base.config, "auto_map", None) or {}).items():
        if str(path).rpartition(".")[2] in names:
            return _loads("transformers", kind, AUTO.get(kind.removeprefix("AutoModelFor")), ", trust_remote_code=True")
    if auto:
        return _loads("transformers", f"AutoModelFor{auto}", AUTO[auto])
    offered = [name for name in names if type(base).__module__.startswith("transformers.")]
    offered = [name for name in offered if hasattr(sys.modules["transformers"], name)]
    return _loads("transformers", offered[0], None) if offered else None


def _auto_of(model: Any, names: list[str]) -> str | None:
    """The Auto class that makes a model of this class from its configuration."""
    import transformers

    for auto in AUTO:
        kinds = getattr(transformers, f"AutoModelFor{auto}")._model_mapping.get(type(model.config), ())
        if {kind.__name__ for kind in (kinds if isinstance(kinds, list | tuple) else [kinds])} & set(names):
            return auto
    return None


def _loads(library: str, kind: str, task: str | None, options: str = "") -> Usage:
    code = f'from {library} import {kind}\n\nmodel = {kind}.from_pretrained("PLACE"{options})'
    return Usage(code, library, task=task)


def set_place(folder: str | Path, place: str) -> None:
    """Let the code on a folder's card load from a repository, instead of where it loaded from.

    Args:
        folder: The folder with the README.md, which is written anew if something in it changes.
        place: The repository, 'user/name'.

    Raises:
        ValueError: For what is no name of a repository.
    """
    validate_repo_id(place)
    path = Path(folder) / "README.md"

    def redirect(block: re.Match[str]) -> str:
        code = block["code"].replace(f'"{block["place"]}"', f'"{place}"')
        return f"<!-- loads {place} -->\n```python\n{code}```"

    text = path.read_text(encoding="utf-8")
    if (new := BLOCK.sub(redirect, text)) != text:
        path.write_text(new, encoding="utf-8")
