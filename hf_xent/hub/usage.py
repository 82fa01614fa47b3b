"""How a checkpoint is loaded, as code on its card; a push writes the name of the repository into that code.

Before a push the code loads from '.', the folder of the card: the name of a folder could be a repository on the Hub.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub.utils import validate_repo_id

HERE = "."
"""The location of a checkpoint that has not been published."""
AUTO = {
    "CausalLM": "text-generation",
    "Seq2SeqLM": "text2text-generation",
    "ImageTextToText": "image-text-to-text",
    "SpeechSeq2Seq": "automatic-speech-recognition",
    "CTC": "automatic-speech-recognition",
    "MaskedLM": "fill-mask",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
    "ImageClassification": "image-classification",
    "AudioClassification": "audio-classification",
    "SemanticSegmentation": "image-segmentation",
    "KeypointDetection": "keypoint-detection",
}
"""Suffix of a class AutoModelFor... of transformers -> the Hub's name of the task of its models."""
EXAMPLES = {
    "text-generation": """tokens = tokenizer("once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(tokens, max_new_tokens=20)[0]))""",
    "text-classification": """tokens = tokenizer("a text to classify", return_tensors="pt").input_ids
print(model(tokens).logits)""",
}
"""The Hub's name of a task -> code that uses a model and its tokenizer."""
BLOCK = re.compile(r"<!-- loads (?P<place>\S+) -->\s*```python\n(?P<code>.*?)```", re.DOTALL)
"""A block of code after a comment, which the Hub does not show, with the location from which the code loads."""


@dataclass(frozen=True)
class Usage:
    """How a checkpoint is loaded.

    Args:
        code: Python code, with PLACE instead of the folder or the repository.
        library: The library with which the Hub offers to load it.
        note: Text before the code.
        task: The Hub's name of the model's task; None if there is none.
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
    """How a model of transformers or PEFT is loaded.

    A model may have an attribute `hub_usage`, a function of the model that returns a `Usage`, if its class would load
    another model than this one. Otherwise the Auto class of the model is used, or the class itself.

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
    found, loss = _of_class(model, base), getattr(base.config, "hf_xent_loss", None)
    if found is None or loss is None or loss["classes"] == base.config.num_labels:
        return found
    return replace(found, note="Its outputs are not its classes: `hf_xent.classes.predict(model, logits)` reads them.")


def with_tokenizer(usage: Usage) -> Usage:
    """The same with the tokenizer and an example, for a model of transformers or PEFT; another usage as it is.

    Args:
        usage: How the model is loaded, in one line after an import.
    """
    example = EXAMPLES.get(usage.task or "")
    if example is None or not re.match(r"from (transformers|peft) import Auto", usage.code):
        return usage
    first, _, rest = usage.code.partition("\n")
    more = "\nfrom transformers import AutoTokenizer" if first.startswith("from peft") else ", AutoTokenizer"
    trust = ", trust_remote_code=True" if "trust_remote_code" in rest else ""
    loads = f'tokenizer = AutoTokenizer.from_pretrained("PLACE"{trust})'
    return replace(usage, code=f"{first}{more}\n{rest}\n{loads}\n{example}")


def _of_class(model: Any, base: Any) -> Usage | None:
    """How a model is loaded, by the names of its class."""
    if auto := getattr(type(base), "_auto_class", None):  # its code is saved with it
        return _loads("transformers", auto, AUTO.get(auto.removeprefix("AutoModelFor")), ", trust_remote_code=True")
    if type(base).__module__.startswith("hf_xent.models."):  # of no other library
        return replace(_loads(type(base).__module__, type(base).__name__, None), library="hf_xent")
    names = [cls.__name__ for cls in type(base).__mro__]  # with its bases: sharding derives a class for the model
    auto = _auto_of(base, names)
    if getattr(model, "peft_config", None):  # set in models of PEFT
        import peft

        name = f"AutoPeftModelFor{auto}"
        return _loads("peft", name, AUTO[auto]) if auto and hasattr(peft, name) else None
    for name, path in (getattr(base.config, "auto_map", None) or {}).items():
        if str(path).rpartition(".")[2] in names:
            return _loads("transformers", name, AUTO.get(name.removeprefix("AutoModelFor")), ", trust_remote_code=True")
    if auto:
        return _loads("transformers", f"AutoModelFor{auto}", AUTO[auto])
    offered = [name for name in names if type(base).__module__.startswith("transformers.")]
    offered = [name for name in offered if hasattr(sys.modules["transformers"], name)]
    return _loads("transformers", offered[0], None) if offered else None


def _auto_of(model: Any, names: list[str]) -> str | None:
    """The suffix of the AutoModelFor... class that loads a model of this class; None if there is none."""
    import transformers

    for auto in AUTO:
        classes = getattr(transformers, f"AutoModelFor{auto}")._model_mapping.get(type(model.config), ())
        if {cls.__name__ for cls in (classes if isinstance(classes, list | tuple) else [classes])} & set(names):
            return auto
    return None


def _loads(library: str, class_name: str, task: str | None, options: str = "") -> Usage:
    code = f'from {library} import {class_name}\n\nmodel = {class_name}.from_pretrained("PLACE"{options})'
    return Usage(code, library, task=task)


def set_place(folder: str | Path, place: str) -> None:
    """Makes the code on a folder's card load from a repository, instead of the location before.

    Args:
        folder: The folder with the README.md, which is rewritten if anything in it changes.
        place: The repository, 'user/name'.

    Raises:
        ValueError: `place` is not a name of a repository.
    """
    validate_repo_id(place)
    path = Path(folder) / "README.md"

    def redirect(block: re.Match[str]) -> str:
        code = block["code"].replace(f'"{block["place"]}"', f'"{place}"')
        return f"<!-- loads {place} -->\n```python\n{code}```"

    text = path.read_text(encoding="utf-8")
    if (new := BLOCK.sub(redirect, text)) != text:
        path.write_text(new, encoding="utf-8")
